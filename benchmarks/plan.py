"""What it costs to plan a grid of many cells, from the start of the process to its end.

``python benchmarks/plan.py`` runs ``zeroflow plan`` on a grid of made-up cells: with an empty store, with a store in which
all of them are done, and with one in which as many others are done, from which it estimates what is missing. Prints the
medians of some rounds as JSON, in seconds and as multiples of a process that imports torch and does nothing: a machine's
speed drops out. Rounds of all parts alternate.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from store import fill, medians

from zeroflow.grid.grid_file import Grid, load_grid
from zeroflow.results import Store

OPTIMIZERS = [
    "zo-sgd", "zo-sgd-sign", "zo-sgd-conserve", "zo-adam", "zo-adam-sign", "zo-adam-conserve", "forward-grad", "fo-sgd",
    "fo-adam", "zo-rge",
]  # fmt: skip
SEEDS = 20


def write_grid(file: Path, cells: int, first_seed: int) -> Grid:
    """A grid file of at least ``cells`` cells: ten optimizers, twenty seeds, and as many learning rates as it takes."""
    rates = [round(1e-3 * (number + 1), 6) for number in range(-(-cells // (len(OPTIMIZERS) * SEEDS)))]
    block = {"optimizer": OPTIMIZERS, "seed": list(range(first_seed, first_seed + SEEDS)), "lr": rates}
    file.write_text(json.dumps({"name": file.stem, "grid": [block]}))
    return load_grid(file)


def measure(root: Path, cells: int, rounds: int) -> dict[str, object]:
    """Fill a store below ``root`` and time the command."""
    grid = write_grid(root / "grid.yaml", cells, 0)
    write_grid(root / "others.yaml", cells, SEEDS)
    store = Store(root / "results")
    fill(store, grid.cells)

    plan = [sys.executable, "-m", "zeroflow.cli", "plan", "--grid"]
    parts = {
        "import torch": [sys.executable, "-c", "import torch"],
        "plan, empty store": [*plan, str(root / "grid.yaml"), "--results", str(root / "none")],
        "plan, all done": [*plan, str(root / "grid.yaml"), "--results", store.root],
        "plan, as many others done": [*plan, str(root / "others.yaml"), "--results", store.root],
    }
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    seconds = medians({name: functools.partial(run, command) for name, command in parts.items()}, rounds)
    return {
        "cells": len(grid.cells),
        "rounds": rounds,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "times importing torch": {name: round(value / seconds["import torch"], 2) for name, value in seconds.items()},
    }


@click.command()
@click.option("--cells", default=10_000, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
def main(cells: int, rounds: int) -> None:
    """Print what it costs to plan a grid of some number of cells."""
    with tempfile.TemporaryDirectory() as folder:
        click.echo(json.dumps(measure(Path(folder), cells, rounds), indent=1))


if __name__ == "__main__":
    main()
