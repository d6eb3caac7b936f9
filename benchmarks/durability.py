"""What it costs that unfinished and finished cells survive a power cut, beside a step of training.

``python benchmarks/durability.py``: appends to a log with and without a sync, and whole files written so that they stay, on the
disk of ``--folder``; medians, as shares of a step (zo-sgd, one query, the embedded backbone with adapters, 16 images, one
thread).
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from written import write

from zeroflow.durable import write_atomically
from zeroflow.methods import MiniBatch, methods
from zeroflow.models.factory import create_backbone
from zeroflow.optim import create_optimizer
from zeroflow.optim.journal import SYNC_SECONDS

FILE = bytes(16 * 1024)


def median(act: Callable[[], object], rounds: int) -> float:
    """Median seconds of one call."""
    found = []
    for _ in range(rounds):
        before = time.perf_counter()
        act()
        found.append(time.perf_counter() - before)
    return statistics.median(found)


def step() -> Callable[[], object]:
    """A step of training."""
    torch.set_num_threads(1)
    info = methods.get("aper-adapter")
    method = info.build(create_backbone(), info.parse({}))
    method.begin_task(range(10), torch.Generator().manual_seed(0))
    images = torch.rand(16, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 10
    optimizer = create_optimizer("zo-sgd", list(method.trainable().items()), lr=1e-3)
    inputs = method.prepare(MiniBatch(images, labels))
    return lambda: optimizer.step(lambda: method.loss(inputs))


@click.command(help=__doc__)
@click.option("--rounds", default=200, show_default=True, help="Calls of each.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=None,
    help="On the disk to measure; default: of temporary files.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Write the result there, as JSON.")
def main(rounds: int, folder: Path | None, output: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        log = (Path(name) / "log").open("ab", buffering=0)

        def synced() -> None:
            log.write(bytes(32))
            os.fsync(log.fileno())

        appended = median(lambda: log.write(bytes(32)), rounds)
        sync = median(synced, rounds)
        whole = median(lambda: write_atomically(Path(name) / "file", FILE), rounds)
        plain = median(lambda: (Path(name) / "other").write_bytes(FILE), rounds)
        log.close()
    seconds = median(step(), max(rounds // 4, 8))
    result = {
        "command": f"python benchmarks/durability.py --rounds {rounds}",
        "append_in_steps": appended / seconds,
        "sync_in_steps": sync / seconds,
        "sync_share_of_time": sync / SYNC_SECONDS,
        "durable_file_in_steps": whole / seconds,
        "plain_file_in_steps": plain / seconds,
    }
    write(result, output, {"threads": 1})


if __name__ == "__main__":
    main()
