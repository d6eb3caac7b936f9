"""Throughput of a backbone behind an endpoint (``zeroflow serve``) beside the same one in this process, in turns."""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from written import write

from zeroflow.models.endpoint import TOKEN, open_black_box
from zeroflow.models.factory import create_backbone
from zeroflow.sweep import serve

TARGET = 0.8


@click.command(help=__doc__)
@click.option("--batch", default=32, show_default=True, help="Images of a request.")
@click.option("--rounds", default=30, show_default=True, help="How often each has its turn.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="A JSON file, such as results/benchmarks/served_backbone.json."
)
def main(batch: int, rounds: int, output: Path | None) -> None:
    torch.set_num_threads(1)
    os.environ[TOKEN] = secrets.token_urlsafe()
    local = create_backbone()
    images = torch.rand(batch, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with serve.serving(serve.Served("quickdraw_vit")) as url, torch.no_grad():
        box = open_black_box("quickdraw_vit", endpoint=url)
        difference = float((local(images) - box(images)).abs().max())

        def seconds(work: Callable[[], Any]) -> float:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started

        turns = [(seconds(lambda: local(images)), seconds(lambda: box(images))) for _ in range(rounds + 3)][3:]
    own, served = (statistics.median(part) for part in zip(*turns, strict=True))
    ratio = statistics.median(one / other for one, other in turns)
    found = {
        "command": f"python benchmarks/served_backbone.py --batch {batch} --rounds {rounds}",
        "batch": batch,
        "rounds": rounds,
        "local_images_per_second": batch / own,
        "served_images_per_second": batch / served,
        "ratio": ratio,
        "target": TARGET,
        "largest_difference": difference,
        "load_average": os.getloadavg()[0],
    }
    write(found, output, {"threads": 1})


if __name__ == "__main__":
    main()
