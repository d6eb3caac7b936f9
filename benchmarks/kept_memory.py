"""What it costs that the C library gives memory back: a plain no-grad forward with and without the settings of a sweep's workers.

``python benchmarks/kept_memory.py``: processes in turn, the embedded backbone, one thread; medians of each, as a ratio, and
page faults of a forward pass. With ``--child`` it is such a process.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time

import click
import torch

from zeroflow.models.factory import create_backbone
from zeroflow.sweep.environment import KEPT_MEMORY


@click.command(help=__doc__)
@click.option("--batch", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Processes of each kind.")
@click.option("--child", is_flag=True, hidden=True)
def main(batch: int, rounds: int, child: bool) -> None:
    if child:
        click.echo(json.dumps(measure(batch)))
        return
    found: dict[str, list[tuple[float, float]]] = {"as it is": [], "kept": []}
    command = [sys.executable, __file__, "--child", f"--batch={batch}"]
    for _ in range(rounds):
        for name, settings in (("as it is", {}), ("kept", KEPT_MEMORY)):
            environment = {key: value for key, value in os.environ.items() if key not in KEPT_MEMORY}
            out = subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=True).stdout
            found[name].append(tuple(json.loads(out)))
    seconds, faults = (
        {name: statistics.median(row[i] for row in rows) for name, rows in found.items()} for i in (0, 1)
    )
    click.echo(
        f"as it is / kept: {seconds['as it is'] / seconds['kept']:.2f}; page faults of a forward pass: "
        f"{faults['as it is']:.0f} and {faults['kept']:.0f} (batch {batch}, {rounds} processes each)"
    )


def measure(batch: int) -> tuple[float, float]:
    """Median seconds and mean page faults of a forward pass."""
    torch.set_num_threads(1)
    backbone, images, seconds = create_backbone(), torch.rand(batch, 3, 28, 28), []
    with torch.no_grad():
        for _ in range(3):
            backbone(images)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            started = time.perf_counter()
            backbone(images)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / len(seconds)


if __name__ == "__main__":
    main()
