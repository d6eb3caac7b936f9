"""Training curves of forward-pass optimizers at equal numbers of forward passes, with lr and eps searched for each.

``python benchmarks/training_curves.py``: scikit-learn's digits (8 x 8 pixels), an MLP of two layers (d = 4,810), mini-batches of 128,
lr to zero along a cosine. lr and eps are those with the smallest loss on held-out training digits after the whole budget: for
each eps lr climbs by factors of three as long as it gets better. Then the curve, on test digits, over other seeds.
"""

from __future__ import annotations

import json
import math
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

from zeroflow.optim import NonFiniteLoss, create_optimizer
from zeroflow.trial.result import provenance

CANDIDATES: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("zo-sgd", {}, 1e-2),
    ("zo-sgd", {"queries": 16}, 0.1),
    ("zo-sgd", {"queries": 16, "combine": "span"}, 10.0),
    ("zo-rge", {"queries": 16}, 0.1),
    ("zo-adam", {}, 3e-3),
    ("zo-muon", {}, 0.3),
    ("zo-muon", {"rank": 16}, 0.3),
    ("zo-per-example", {}, 3e-2),
    ("zo-per-example", {"normalize": True}, 0.1),
)
"""Name, options, and the lr that the search starts from."""
EPS = (1e-3, 1e-2, 1e-1)
POINTS = 8
"""Of a curve."""


class Digits:
    """Training, held-out and test digits, and the training of one network on them."""

    def __init__(self, batch: int) -> None:
        pixels, labels = load_digits(return_X_y=True)
        self.batch = batch
        self.x, self.y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))
        self.train, self.held_out, self.test = order[:1100], order[1100:1400], order[1400:]

    def run(
        self, name: str, options: dict[str, Any], *, lr: float, eps: float, passes: int, seed: int, judged: Tensor
    ) -> list[dict[str, float]]:
        """A curve on the digits ``judged``; its last point has an infinite loss where training broke down."""
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        optimizer = create_optimizer(name, model, lr=lr, eps=eps, seed=seed, **options)
        generator, curve = torch.Generator().manual_seed(seed), [self.point(model, 0, judged)]
        reduction = "none" if optimizer.per_example else "mean"
        while optimizer.forwards < passes:
            chosen = self.train[torch.randint(len(self.train), (self.batch,), generator=generator)]
            x, y = self.x[chosen], self.y[chosen]
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * optimizer.forwards / passes)) / 2
            try:
                optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction=reduction))  # type: ignore[misc]
            except NonFiniteLoss:
                return [*curve, {"forwards": optimizer.forwards, "loss": math.inf, "accuracy": 0.0}]
            if optimizer.forwards >= len(curve) * passes / POINTS:
                curve.append(self.point(model, optimizer.forwards, judged))
        return curve

    @torch.no_grad()
    def point(self, model: nn.Module, forwards: int, judged: Tensor) -> dict[str, float]:
        output, labels = model(self.x[judged]), self.y[judged]
        loss = float(F.cross_entropy(output, labels))
        accuracy = 100 * float((output.argmax(1) == labels).float().mean())
        return {"forwards": forwards, "loss": loss if math.isfinite(loss) else math.inf, "accuracy": accuracy}


def climbed(start: float, loss_at: Callable[[float], float], most: int = 4) -> tuple[float, float]:
    """(loss, lr) of the best lr found by factors of three from ``start``, at most so many steps up or down."""
    best = loss_at(start), start
    for factor in (3.0, 1 / 3):
        lr = start
        for _ in range(most):
            lr *= factor
            found = loss_at(lr), lr
            if found >= best:
                break
            best = found
        if best[1] != start:
            break
    return best


@click.command(help=__doc__)
@click.option("--passes", default=2000, show_default=True, help="Forward passes of each training.")
@click.option("--seeds", default=3, show_default=True, help="Of each curve; the search has one of its own.")
@click.option("--batch", default=128, show_default=True)
@click.option("--output", default=Path("results/benchmarks/training_curves.json"), type=click.Path(path_type=Path))
def main(passes: int, seeds: int, batch: int, output: Path) -> None:
    warnings.filterwarnings("ignore", message="the loss has grown")  # which the search goes on to find out
    torch.set_num_threads(1)
    digits, rows = Digits(batch), []
    for name, options, start in CANDIDATES:
        tried: list[dict[str, float]] = []

        def loss_at(lr: float, eps: float) -> float:
            given = {"lr": lr, "eps": eps, "passes": passes, "seed": 100}
            loss = digits.run(name, options, **given, judged=digits.held_out)[-1]["loss"]  # type: ignore[arg-type]  # noqa: B023
            tried.append({"lr": lr, "eps": eps, "loss": loss})  # noqa: B023
            return loss

        _, lr, eps = min((*climbed(start, lambda lr, eps=eps: loss_at(lr, eps)), eps) for eps in EPS)  # type: ignore[misc]
        curves = [
            digits.run(name, options, lr=lr, eps=eps, passes=passes, seed=seed, judged=digits.test)
            for seed in range(seeds)
        ]
        ends = [curve[-1]["accuracy"] for curve in curves]
        rows.append({"optimizer": name, "options": options, "lr": lr, "eps": eps, "tried": tried, "curves": curves})
        text = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
        loss = statistics.fmean(curve[-1]["loss"] for curve in curves)
        click.echo(f"{text:40} lr {lr:<8.3g} eps {eps:<6g} loss {loss:.3f}  accuracy {statistics.fmean(ends):.1f} %")
    facts = {key: value for key, value in provenance(digits.x.device, {"threads": 1}).items() if key != "finished_at"}
    command = f"python benchmarks/training_curves.py --passes {passes} --seeds {seeds} --batch {batch}"
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": command, **facts, "passes": passes, "curves": rows}
    # JSON knows no infinity: null where training broke down.
    output.write_text(json.dumps(json.loads(json.dumps(result), parse_constant=lambda _: None)) + "\n")


if __name__ == "__main__":
    main()
