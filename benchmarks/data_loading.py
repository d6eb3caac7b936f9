"""How many images a second become mini-batches: decoded every time, and from the cache of decoded images, by threads.

``python benchmarks/data_loading.py`` makes up JPEG files of 500 x 375 pixels (noise with the spectrum of photos) and times
whole epochs of training mini-batches: random crops to 224 x 224, mirrored or not. The reference is torchvision's
``ImageFolder`` with its own transforms in one process, as PILOT has it. Rounds of all ways alternate, and medians are kept:
as ratios to the reference a machine's speed drops out. Files and cache are in memory (page cache) when they are read, so no
disk is measured. The first opening, which checks every image and makes the cache, is timed once, and the checksums that are
compared whenever images are read from the cache are timed by themselves.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from store import medians

from zeroflow.data import ImageDataset, class_incremental, load_dataset, prefetched, transforms
from zeroflow.data.decoded import DecodedSamples, checksum
from zeroflow.data.scenario import View
from zeroflow.trial import randomness
from zeroflow.trial.result import provenance

OUTPUT = Path("results/benchmarks/data_loading.json")
HEIGHT, WIDTH, SIZE, CLASSES = 375, 500, 224, 4


def photo(random: np.random.Generator) -> Image.Image:
    """Noise of equal energy in every octave, as photos have it: their files are about as large, and as slow to decode."""
    pixels = np.full((HEIGHT, WIDTH, 3), 128.0)
    for octave in range(9):
        shape = (max(2, HEIGHT >> octave), max(2, WIDTH >> octave))
        noise = np.dstack([random.normal(0, 11, shape).repeat(1, axis=0)] * 3) + random.normal(0, 4, (*shape, 3))
        layers = [
            Image.fromarray(noise[..., c].astype(np.float32)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        pixels += np.dstack([np.asarray(layer) for layer in layers])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_files(root: Path, images: int) -> float:
    """Write an image folder; the mean size of its files in KiB."""
    random = np.random.default_rng(0)
    for part, count in (("train", images), ("test", CLASSES)):
        for i in range(count):
            folder = root / part / f"class {i % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            photo(random).save(folder / f"{i:05d}.jpg", quality=90)
    sizes = [path.stat().st_size for path in root.glob("train/*/*.jpg")]
    return sum(sizes) / len(sizes) / 1024


def epoch(view: View, batch: int) -> None:
    """All training mini-batches of an epoch, in the order and with the draws of a trial."""
    order = randomness.batch_order(0, 0, 0, len(view))
    makers = (
        functools.partial(view.training_batch, order[first : first + batch], randomness.generator(0, 1, first))
        for first in range(0, len(order), batch)
    )
    for images, _ in prefetched(makers, view.threads):
        assert images.shape[1:] == (3, SIZE, SIZE)


def reference(root: Path, batch: int) -> Callable[[], None]:
    """The same with torchvision: ``ImageFolder``, ``RandomResizedCrop``, ``RandomHorizontalFlip``, ``ToTensor``."""
    from torch.utils.data import DataLoader
    from torchvision import datasets
    from torchvision import transforms as steps

    crop = [steps.RandomResizedCrop(SIZE, scale=(0.05, 1.0)), steps.RandomHorizontalFlip(), steps.ToTensor()]
    loader = DataLoader(datasets.ImageFolder(str(root / "train"), steps.Compose(crop)), batch, shuffle=True)

    def epoch() -> None:
        for images, _ in loader:
            assert images.shape[1:] == (3, SIZE, SIZE)

    return epoch


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


def measure(folder: Path, images: int, batch: int, threads: list[int], rounds: int) -> dict[str, object]:
    """Time every way on files made below ``folder``."""
    kib = make_files(folder / "photos", images)
    torch.set_num_threads(1)
    with own_cache(folder / "cache"):
        load_dataset("folder:photos", folder, threads=max(threads), cache_bytes=0)  # all files are in memory then
        for stamp in (folder / "cache").rglob("verified/*"):
            stamp.unlink()
        started = time.perf_counter()
        cached = load_dataset("folder:photos", folder, threads=max(threads))
        opening = time.perf_counter() - started
        decoding = load_dataset("folder:photos", folder, cache_bytes=0)
        assert isinstance(cached.train, DecodedSamples) and not isinstance(decoding.train, DecodedSamples)

        def way(dataset: ImageDataset, count: int) -> Callable[[], None]:
            stream = class_incremental(dataset, [CLASSES], transforms.get("pilot"), SIZE, threads=count)
            return functools.partial(epoch, stream.tasks[0].train, batch)

        ways = {(name, n): way(data, n) for n in threads for name, data in (("decoding", decoding), ("cached", cached))}
        decoded = cached.train.images(np.arange(min(images, 48)))
        parts: dict[str, Callable[[], object]] = {"torchvision": reference(folder / "photos", batch)}
        parts["checksums"] = lambda: [checksum(image) for image in decoded]
        parts |= {f"{name} {count}": part for (name, count), part in ways.items()}
        seconds = medians(parts, rounds)
    ways_found = [
        {
            "way": name,
            "threads": count,
            "images_per_second": images / seconds[f"{name} {count}"],
            "times_torchvision": seconds["torchvision"] / seconds[f"{name} {count}"],
        }
        for name, count in ways
    ]
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "images": images,
        "pixels": [HEIGHT, WIDTH],
        "kib_per_file": kib,
        "batch": batch,
        "rounds": rounds,
        "torchvision_images_per_second": images / seconds["torchvision"],
        "first_opening_images_per_second": (images + CLASSES) / opening,
        "checksum_microseconds": 1e6 * seconds["checksums"] / len(decoded),
        "ways": ways_found,
    }


@click.command(help=__doc__)
@click.option("--images", default=480, show_default=True, type=click.IntRange(min=CLASSES))
@click.option("--batch", default=48, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--threads", type=click.IntRange(min=0), multiple=True, help="May be repeated. [default: 0, 1, 2, 4 ... all CPUs]"
)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1))
@click.option("--output", type=click.Path(path_type=Path), help=f"Write the result there too, e.g. {OUTPUT}.")
def main(images: int, batch: int, threads: tuple[int, ...], rounds: int, output: Path | None) -> None:
    cpus = len(os.sched_getaffinity(0))
    counts = sorted(set(threads)) or sorted({0, cpus, *(n for n in (1, 2, 4, 8, 16, 32) if n < cpus)})
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), images, batch, counts, rounds)
    named = "".join(f" --threads {n}" for n in counts)
    facts = {k: v for k, v in provenance(torch.device("cpu"), {"threads": 1}).items() if k != "finished_at"}
    command = f"python benchmarks/data_loading.py --images {images} --batch {batch}{named} --rounds {rounds}"
    result = {"command": command, **facts, **found}
    click.echo(json.dumps(result, indent=1))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
