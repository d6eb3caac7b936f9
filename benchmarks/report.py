"""What a report of many cells costs: reading, writing the page, its size.

``python benchmarks/report.py`` makes a store of many cells from those of finished ones, with new ids and seeds, and prints the
medians of some rounds as JSON, in seconds and as multiples of reading all tables of the first store: a machine's speed drops out.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from store import medians

from zeroflow.results import SCHEMAS, Store, load
from zeroflow.results.report import read, write_report

TARGETS = {"report": 20.0, "load trials": 1.0}
"""Seconds for 1,000 cells."""
LARGEST = 8_000_000
"""Bytes of a page."""
_BY_CELL = ("stages", "accuracy", "steps", "probes", "trials")  # ``trials`` last: it says that a cell is done


def multiply(source: Store, target: Path, cells: int) -> None:
    """Write ``cells`` cells, those of ``source`` over and over; the n-th time with seeds and numbers of queries of their own."""
    tables = {name: source.load(name) for name in _BY_CELL}
    rows = tables["trials"].to_pylist()
    for number in range(cells):
        old, again = rows[number % len(rows)], number // len(rows)
        new: dict[str, Any] = {"cell_id": f"{number:016x}"}
        # Three seeds of a setting; beyond that another setting.
        new |= {"seed": old["seed"] + 10 * (again % 3)}
        new |= {"lr": None if old["lr"] is None else round(old["lr"] * (1 + again // 3), 8)}
        for name in _BY_CELL:
            table = tables[name].filter(pc.field("cell_id") == old["cell_id"])
            for key in new.keys() & set(table.column_names):
                column = pa.array([new[key]] * len(table), table.schema.field(key).type)
                table = table.set_column(table.column_names.index(key), key, column)
            if len(table):
                (target / name).mkdir(parents=True, exist_ok=True)
                pq.write_table(table.cast(SCHEMAS[name]), target / name / f"{new['cell_id']}.parquet")


def measure(source: Path, folder: Path, cells: int, rounds: int) -> dict[str, object]:
    """Make the store below ``folder`` and time what a reader waits for."""
    first, root, out = Store(source), folder / "results", folder / "report.html"
    multiply(first, root, cells)
    # As a sweep writes them: through the store, which puts the row in front.
    for name in ("trials",):
        for file in sorted((root / name).iterdir()):
            Store(root).write({name: pq.read_table(file).cast(SCHEMAS[name])})
    assert len(load(root, "trials")) == cells
    parts: dict[str, Callable[[], object]] = {
        "one store": lambda: read(first.root),
        "load trials": lambda: load(root, "trials"),
        "read": lambda: read(str(root)),
        "report": lambda: write_report(root, out),
    }
    seconds = medians(parts, rounds)
    return {
        "cells": cells,
        "rounds": rounds,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "times reading the first store": {name: round(v / seconds["one store"], 1) for name, v in seconds.items()},
        "bytes of the page": out.stat().st_size,
        "targets": {**TARGETS, "bytes of the page": LARGEST},
    }


@click.command()
@click.option(
    "--source", type=click.Path(exists=True, path_type=Path), default=Path("results/optimizers"), show_default=True
)
@click.option("--cells", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--keep", type=click.Path(path_type=Path), help="A folder for the store and the page. [default: gone]")
def main(source: Path, cells: int, rounds: int, keep: Path | None) -> None:
    """Print what a report of some number of cells costs."""
    with tempfile.TemporaryDirectory() as folder:
        click.echo(json.dumps(measure(source, keep or Path(folder), cells, rounds), indent=1))


if __name__ == "__main__":
    main()
