"""Whether the last cell of a long sweep is as cheap as the first: seconds between finished cells, early and late.

``python benchmarks/many_cells.py`` runs a sweep of trivial cells (class means of a data set of eight small images, which an
outside package made for the purpose brings) through the real driver, and compares the median gap between finished cells
after the first ones with that of the last ones.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import click
from written import write

import zeroflow.results
from zeroflow import Placement

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("results/benchmarks/many_cells.json")
WINDOW = 50
"""Cells at the beginning and at the end whose gaps are compared; the first ten, which start processes, are left out."""

PACKAGE = {
    "tiny.py": """
import numpy as np
import torch
from zeroflow.data import ArraySamples, ImageDataset
from zeroflow.data.dataset import register_dataset


@register_dataset("tiny", classes=4, transform="plain", image_size=7, where="made up", description="4 classes")
def load(data_dir=None):
    labels = np.repeat(np.arange(4), 2)
    pixels = torch.randint(0, 256, (8, 3, 7, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    samples = ArraySamples(pixels, labels)
    return ImageDataset("tiny", ("a", "b", "c", "d"), samples, samples)
""",
    "tiny-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n",
    "tiny-1.dist-info/entry_points.txt": "[zeroflow.datasets]\ntiny = tiny\n",
}
GRID = """
base: {{dataset: tiny, checkpoint: none, method: simplecil, image_size: 7, tasks: 2}}
grid: [{{class_order_seed: [{seeds}]}}]
placement: {{gpus_per_worker: 0, max_concurrent: {concurrent}}}
"""


@click.command(help=__doc__)
@click.option("--cells", default=500, show_default=True, type=click.IntRange(min=3 * WINDOW))
@click.option("--concurrent", default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help=f"Write the result there too, e.g. {OUTPUT}.")
def main(cells: int, concurrent: int, output: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in PACKAGE.items():
            (folder / "packages" / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / "packages" / file).write_text(text)
        (folder / "grid.yaml").write_text(GRID.format(seeds=", ".join(map(str, range(cells))), concurrent=concurrent))
        command = [
            sys.executable,
            str(ROOT / "sweeps" / "full_grid.py"),
            "--grid",
            str(folder / "grid.yaml"),
            "--results",
            str(folder / "out"),
            "--no-report",
        ]
        environment = {**os.environ, "PYTHONPATH": str(folder / "packages")}
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        seconds = time.perf_counter() - started
        trials = zeroflow.results.load(folder / "out", "trials")
        inside = statistics.median(trials["seconds"].to_pylist())
        ends = sorted(moment.timestamp() for moment in trials["finished_at"].to_pylist())
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    early, late = statistics.median(gaps[10 : 10 + WINDOW]), statistics.median(gaps[-WINDOW:])
    result = {
        "command": f"python benchmarks/many_cells.py --cells {cells} --concurrent {concurrent}",
        "cells": cells,
        "concurrent": concurrent,
        "seconds": seconds,
        "seconds_inside_a_cell": inside,
        "early_seconds_per_cell": early,
        "late_seconds_per_cell": late,
        "late_to_early": late / early,
    }
    write(result, output, asdict(Placement()))


if __name__ == "__main__":
    main()
