"""What the way through a backbone costs: features of a timm model, and of a copy with adapters, in units of the model called directly.

``python benchmarks/backbones.py`` builds each architecture with random weights and lets both take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import timm
import torch
from written import write

from zeroflow.models.adapters import AdapterStack
from zeroflow.models.factory import EMBEDDED, create_backbone, embedded_architecture

MODELS = {
    EMBEDDED: 64, "vit_tiny_patch16_224": 4, "eva02_tiny_patch14_224": 4, "convnext_atto": 4, "resnet18": 4,
    "swin_tiny_patch4_window7_224": 2, "tf_efficientnet_lite0": 4,
}  # fmt: skip
"""And how many images a pass has."""

BOTTLENECK = 16


def ratios(candidates: dict[str, Callable[[], object]], first: str, rounds: int) -> dict[str, float]:
    """Median seconds of each by those of ``first``, all having had their turn in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    base = seconds[first]
    return {
        name: round(statistics.median(own / one for own, one in zip(found, base, strict=True)), 3)
        for name, found in seconds.items()
        if name != first
    }


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice([*MODELS]), help="May be repeated; default: all.")
@click.option("--rounds", default=20, show_default=True, help="Turns of each.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write the results there.")
def main(models: tuple[str, ...], rounds: int, threads: int, output: Path | None) -> None:
    torch.set_num_threads(threads)
    command = f"python benchmarks/backbones.py --rounds {rounds} --threads {threads}"
    rows = []
    for name in models or MODELS:
        count, backbone = MODELS[name], create_backbone(name, checkpoint="none")
        architecture, arguments = embedded_architecture() if name == EMBEDDED else (name, {})
        model = timm.create_model(architecture, num_classes=0, **arguments).eval()
        images = torch.randn(count, 3, backbone.image_size, backbone.image_size)
        candidates: dict[str, Callable[[], object]] = {
            "timm": lambda model=model, images=images: model(images),  # type: ignore[misc]
            "features": lambda backbone=backbone, images=images: backbone(images),  # type: ignore[misc]
        }
        if not backbone.lacks("blocks"):
            stack = AdapterStack(backbone.widths, BOTTLENECK, dropout=0.0).eval()
            candidates["adapted"] = lambda backbone=backbone, images=images, stack=stack: backbone(images, stack)  # type: ignore[misc]
        with torch.no_grad():
            found = ratios(candidates, "timm", rounds)
        rows.append({"backbone": name, "images": count, **found})
        click.echo(f"{name:32} features {found['features']:.3f}  adapted {found.get('adapted', float('nan')):.3f}")
    write(
        {"command": command, "rounds": rounds, "bottleneck": BOTTLENECK, "rows": rows},
        output,
        {"threads": threads},
        shown=False,
    )


if __name__ == "__main__":
    main()
