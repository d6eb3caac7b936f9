"""What a store of many cells costs to read: loading, asking what is done, planning.

``python benchmarks/store.py`` writes made-up results through the real store into a temporary folder and prints the
medians of some rounds as JSON, in seconds and as multiples of reading the rows of ``trials`` from one Parquet file: a
machine's speed drops out. Rounds of all parts alternate. Writing is measured once, without waiting for the disk.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq

from zeroflow.grid.grid_file import Grid, parse_grid
from zeroflow.grid.plan import make_plan
from zeroflow.results import Store
from zeroflow.results.rows import tables
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import Step, TrialResult

TASKS, CLASSES, STEPS = 10, 100, 60


def grid_of(cells: int) -> Grid:
    """A grid with at least ``cells`` different cells: methods, optimizers, queries, and as many seeds as it takes."""
    axes = {
        "method": ["ease", "aper-adapter"],
        "optimizer": ["zo-sgd", "zo-sgd-sign", "zo-adam", "zo-sgd-conserve"],
        "queries": [1, 4, 8, 16, 32],
        "seed": list(range(-(-cells // 40))),
    }
    return parse_grid({"grid": [axes]})


def result_of(config: TrialConfig, number: int) -> TrialResult:
    """A made-up result of ten tasks with sixty recorded steps."""
    random = np.random.default_rng(number)
    accuracy = np.where(np.tri(TASKS, dtype=bool), random.uniform(20, 90, (TASKS, TASKS)), np.nan)
    steps = [
        Step(step * TASKS // STEPS, 0, step, float(loss), 0.01, 0.02) for step, loss in enumerate(random.random(STEPS))
    ]
    return TrialResult(
        config=config,
        accuracy_matrix=accuracy,
        task_incremental=accuracy,
        domain_incremental=accuracy,
        test_samples=np.full(TASKS, 200),
        task_classes=np.full(TASKS, CLASSES // TASKS),
        class_order=random.permutation(CLASSES),
        class_names=[f"class number {label}" for label in range(CLASSES)],
        steps=steps,
        probes=[],
        costs={
            "forward_passes": 12_000,
            "peak_memory_bytes": 3 * 2**20,
            "trainable_parameters": 70_000,
            "seconds": float(random.uniform(5, 50)),
            "training_seconds": 4.0,
            "seconds_per_epoch": 0.4,
        },
        provenance={
            "zeroflow_version": "0.1.0",
            "torch_version": "2.9.0",
            "timm_version": "1.0.22",
            "python_version": "3.11.9",
            "git_commit": 40 * "0",
            "git_dirty": False,
            "device": "cpu (x86_64)",
            "threads": 1,
            "finished_at": datetime.now(UTC),
        },
    )


def fill(store: Store, cells: Sequence[TrialConfig]) -> None:
    """Write made-up results of cells, without waiting for the disk."""
    fsync = os.fsync
    setattr(os, "fsync", lambda _: None)  # noqa: B010 (a type checker refuses another function in its place)
    for number, config in enumerate(cells):
        store.write(tables(result_of(config, number)))
    setattr(os, "fsync", fsync)  # noqa: B010


def medians(parts: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each part; the rounds of all alternate."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(root: Path, cells: int, rounds: int) -> dict[str, object]:
    """Fill a store below ``root`` with ``cells`` cells and time what reads it."""
    grid = grid_of(cells)
    store = Store(root / "results")
    started = time.perf_counter()
    fill(store, grid.cells[:cells])
    writing = (time.perf_counter() - started) / cells
    one = root / "one.parquet"
    pq.write_table(store.load("trials"), one)
    assert len(store.done()) == len(store.load("trials")) == cells

    parts: dict[str, Callable[[], object]] = {
        "one file": lambda: pq.read_table(one),
        "load trials": lambda: Store(store.root).load("trials"),
        "load stages": lambda: Store(store.root).load("stages"),
        "load accuracy": lambda: Store(store.root).load("accuracy"),
        "load steps": lambda: Store(store.root).load("steps"),
        "done": lambda: Store(store.root).done(),
        "grid": lambda: grid_of(cells),
        "plan": lambda: make_plan(grid, Store(store.root), None),
    }
    seconds = medians(parts, rounds)
    size = sum(file.stat().st_size for file in Path(store.root).rglob("*.parquet"))
    return {
        "cells": cells,
        "rounds": rounds,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "times reading one file": {name: round(value / seconds["one file"], 2) for name, value in seconds.items()},
        "milliseconds to write a cell": round(1e3 * writing, 2),
        "KiB a cell": round(size / cells / 1024, 1),
    }


@click.command()
@click.option("--cells", default=10_000, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
def main(cells: int, rounds: int) -> None:
    """Print what it costs to read a store of some number of cells."""
    with tempfile.TemporaryDirectory() as folder:
        click.echo(json.dumps(measure(Path(folder), cells, rounds), indent=1))


if __name__ == "__main__":
    main()
