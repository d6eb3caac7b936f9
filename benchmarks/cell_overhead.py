"""What a cell costs beyond its own work: seconds per cell of a sweep minus the seconds its trial took inside.

``python benchmarks/cell_overhead.py`` runs sweeps of few and of many cells of the same kind and takes the difference, so
that the start of Ray and of the program, which a sweep pays once, drops out. It is given on a line of its own.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

import zeroflow.results

ROOT = Path(__file__).resolve().parent.parent
GRID = """
base: {{checkpoint: none, method: aper-adapter, optimizer: zo-sgd, epochs: 1, batch_size: 400, image_size: 7}}
grid: [{{class_order_seed: [{seeds}]}}]
placement: {{gpus_per_worker: 0}}
"""


def sweep(cells: int, concurrent: int, workers: int) -> tuple[float, float]:
    """Run a sweep of equal cells; its wall seconds and the median seconds inside a trial."""
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.yaml"
        grid.write_text(GRID.format(seeds=", ".join(map(str, range(cells)))))
        command = [
            sys.executable,
            str(ROOT / "sweeps" / "full_grid.py"),
            "--grid",
            str(grid),
            "--results",
            f"{folder}/out",
            "--max-concurrent",
            str(concurrent),
            "--workers-per-trial",
            str(workers),
            "--no-report",
        ]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, timeout=1200)
        wall = time.perf_counter() - started
        return wall, statistics.median(zeroflow.results.load(f"{folder}/out", "trials")["seconds"].to_pylist())


@click.command(help=__doc__)
@click.option("--few", default=2, show_default=True)
@click.option("--many", default=8, show_default=True)
@click.option("--workers", default=(1, 2), multiple=True, show_default=True, help="Workers per cell. May be repeated.")
def main(few: int, many: int, workers: tuple[int, ...]) -> None:
    click.echo(f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}")
    click.echo("workers per cell  cells at a time  s per cell  inside the trial  beyond it  once per sweep")
    sweep(1, 1, 1)  # the first start reads everything from disk
    for group, concurrent in itertools.product(workers, (1, 2)):
        if group * concurrent > (os.cpu_count() or 1):
            continue
        short, _ = sweep(few, concurrent, group)
        long, inside = sweep(many, concurrent, group)
        slot = (long - short) / (many - few) * concurrent
        once = short - few / concurrent * slot
        click.echo(f"{group:16}  {concurrent:15}  {slot:10.2f}  {inside:16.2f}  {slot - inside:9.2f}  {once:14.2f}")


if __name__ == "__main__":
    main()
