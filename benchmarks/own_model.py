"""Somebody else's model: scikit-learn's digits, a network of one hidden layer, 8,000 forward passes for every optimizer.

Each gets lr and eps from ``zeroflow.optim.tune``, and nothing else; what that spends counts. ``python benchmarks/own_model.py
--output results/benchmarks/own_model.json``.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from written import write

from zeroflow.optim import create_optimizer, list_optimizers, tune

OUTPUT = Path("results/benchmarks/own_model.json")
TRAIN, BATCH, HIDDEN = 1400, 100, 32
OPTIONS: dict[str, dict[str, Any]] = {"es-cma": {"separable": True}}
"""Of those that refuse this many parameters as they are."""


def run(name: str, seed: int, passes: int) -> dict[str, Any]:
    """Accuracy on what was not trained on, and what was chosen."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.data / 16.0, dtype=torch.float32)[order]
    labels = torch.tensor(digits.target)[order]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10))
    reduction = "none" if name == "zo-per-example" else "mean"

    def of(first: int) -> Callable[[], Tensor]:
        part = slice(first, first + BATCH)
        return lambda: F.cross_entropy(model(images[part]), labels[part], reduction=reduction)

    closures = [of(first) for first in range(0, TRAIN, BATCH)]
    found = tune(closures, model, name, seed=seed, **OPTIONS.get(name, {}))
    optimizer = create_optimizer(name, model, **found.arguments)
    step = 0
    while found.forwards + optimizer.equivalents < passes:
        optimizer.step(closures[step % len(closures)])
        step += 1
    with torch.no_grad():
        accuracy = float((model(images[TRAIN:]).argmax(1) == labels[TRAIN:]).double().mean())
    return {
        "accuracy": accuracy,
        "lr": found.lr,
        "eps": found.eps,
        "queries": optimizer.queries,
        "tuning": found.forwards,
    }


@click.command(help=__doc__)
@click.option("--passes", default=8000, show_default=True, help="Forward passes, an exact gradient counting three.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--output", type=click.Path(path_type=Path), help=f"Write the result there too, e.g. {OUTPUT}.")
def main(passes: int, seeds: int, output: Path | None) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in list_optimizers():
        runs = [run(name, seed, passes) for seed in range(seeds)]
        accuracy = statistics.fmean(one["accuracy"] for one in runs)
        rows.append({"optimizer": name, "accuracy": accuracy, "runs": runs})
        click.echo(f"{name:20s} {accuracy:.3f}  lr {[one['lr'] for one in runs]}  eps {[one['eps'] for one in runs]}")
    result: dict[str, Any] = {
        "command": f"python benchmarks/own_model.py --passes {passes} --seeds {seeds}",
        "passes": passes,
        "seeds": seeds,
        "rows": rows,
    }
    write(result, output, {"threads": 1}, shown=False)


if __name__ == "__main__":
    main()
