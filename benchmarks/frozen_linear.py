"""What oneDNN's kernel brings to the frozen backbone: seconds of a plain no-grad forward with and without, in one run.

``python benchmarks/frozen_linear.py``: medians of alternating runs of the embedded backbone, one thread, as a ratio.
"""

from __future__ import annotations

import statistics
import time

import click
import torch
from torch import nn

from zeroflow.models.factory import create_backbone
from zeroflow.models.linear import FrozenLinear


@click.command(help=__doc__)
@click.option("--batch", default=48, show_default=True)
@click.option("--rounds", default=30, show_default=True)
def main(batch: int, rounds: int) -> None:
    torch.set_num_threads(1)
    ours, plain = create_backbone(), create_backbone()
    for module in plain.modules():
        if type(module) is FrozenLinear:
            module.__class__ = nn.Linear
    images = torch.rand(batch, 3, 28, 28)
    seconds: dict[str, list[float]] = {"oneDNN": [], "ATen": []}
    with torch.no_grad():
        for _ in range(rounds):
            for name, backbone in (("oneDNN", ours), ("ATen", plain)):
                started = time.perf_counter()
                backbone(images)
                seconds[name].append(time.perf_counter() - started)
        difference = (ours(images) - plain(images)).abs().max().item()
    ratio = statistics.median(seconds["ATen"]) / statistics.median(seconds["oneDNN"])
    click.echo(f"ATen / oneDNN: {ratio:.2f}  (batch {batch}, largest difference of a feature {difference:.1e})")


if __name__ == "__main__":
    main()
