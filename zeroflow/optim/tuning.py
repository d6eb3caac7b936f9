"""Choose lr and eps for a model within a few hundred forward passes.

eps: slopes along a few random directions are measured at several eps. Too small an eps drowns in rounding (or in the steps of a
loss that is piecewise constant), too large a one leaves the linear range; the best is where slopes depend least on eps.
lr: short runs from the same parameters, with the same directions and mini-batches, find an lr that is better than ten times more
and ten times less, then try values in between, and take the next smaller one.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zeroflow.errors import ConfigError
from zeroflow.optim.buffers import Buffers, restore
from zeroflow.optim.closure import Closure
from zeroflow.optim.factory import OptimizerInfo, create_optimizer, optimizers
from zeroflow.optim.groups import Parameters, parameter_groups
from zeroflow.optim.optimizer import ThreeStepOptimizer

EPS = tuple(10 ** (power / 2) for power in range(-8, 1))
"""Perturbation sizes to try: 1e-4 to 1, two per power of ten."""
DIRECTIONS = 4
STRAIGHT = 0.1
"""Slopes at neighbouring eps that differ by less, relatively, count as equal."""
RUNS = 8
"""Number of short runs that the budget is split into."""
JUDGES = 4
"""Maximum number of mini-batches that a short run is evaluated on."""


@dataclass(frozen=True)
class Tuned:
    """The result of ``tune``; ``print(tuned)`` shows all runs.

    Attributes:
        name: of the optimizer.
        arguments: for ``create_optimizer(name, params, **arguments)``.
        lr: the chosen learning rate.
        eps: the chosen perturbation size; the default where it does not matter.
        loss: (before, after the best short run), mean over the evaluated mini-batches.
        forwards: forward passes spent, an exact gradient counting three.
        slopes: (eps, how much slopes differ from those at the next eps, 0 to 1), where eps was chosen.
        runs: (the varied option, ``"lr"`` or ``"eps"``; its value; the loss afterwards), in order.
    """

    name: str
    arguments: Mapping[str, Any]
    lr: float
    eps: float
    loss: tuple[float, float]
    forwards: int
    slopes: Sequence[tuple[float, float]]
    runs: Sequence[tuple[str, float, float]]

    @property
    def learns(self) -> bool:
        """Whether the best short run reduced the loss."""
        return self.loss[1] < self.loss[0]

    def __str__(self) -> str:
        rows = [(f"eps {eps:.3g}", f"slopes differ by {share:.0%}", eps == self.eps) for eps, share in self.slopes]
        rows += [
            (f"{key} {value:.3g}", f"loss {loss:.4g}", value == getattr(self, key)) for key, value, loss in self.runs
        ]
        lines = [f"  {left:14s} {right:24s}{'<' if best else ''}".rstrip() for left, right, best in rows]
        end = (
            f"loss {self.loss[0]:.4g} -> {self.loss[1]:.4g}"
            if self.learns
            else f"no run lowers the loss, {self.loss[0]:.4g}"
        )
        return "\n".join(
            [f"{self.name}: lr={self.lr:.3g} eps={self.eps:.3g}; {end}; {self.forwards:,} forward passes", *lines]
        )


def tune(
    closure: Closure | Sequence[Closure],
    params: Parameters,
    name: str,
    *,
    budget: int = 600,
    queries: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Tuned:
    """Choose lr and eps of a named optimizer for a model and a loss; parameters, a module's buffers and random state are restored.

    Args:
        closure: as in ``step``, or several, one per mini-batch: steps use them in turn, and their mean is evaluated. With more
            of them the result generalises better to others.
        params: as in ``create_optimizer``; groups with their own lr keep it. Buffers are known, and restored, only of a module.
        name: as in ``create_optimizer``.
        queries: as in ``create_optimizer``.
        budget: maximum number of forward passes; an exact gradient counts as three.
        seed: as in ``create_optimizer``.
        **options: as in ``create_optimizer``.

    Returns:
        The chosen values, with all runs.

    Raises:
        ConfigError: a name or option is unknown, the budget is too small for one run, or the loss is to be maximised.
        ValueError: no loss was finite.
    """
    info = optimizers.get(name)
    closures = list(closure) if isinstance(closure, Sequence) else [closure]
    if not closures or not all(map(callable, closures)):
        raise ConfigError(f"closure={closure!r}: expected a closure, or several, one for each mini-batch")
    params = params if isinstance(params, nn.Module) else parameter_groups(params)
    first = create_optimizer(name, params, lr=1.0, queries=queries, seed=seed, **options)
    if any(group.get("maximize") for group in first.param_groups):
        raise ConfigError(
            "maximize=True: tune looks for the smallest loss; expected a closure that returns the negated loss"
        )
    settings = {"queries": first.queries, "seed": seed, **options}
    search = _Search(info, closures, params, settings, first)
    probe = search.judges + (2 * DIRECTIONS * len(EPS) if search.chooses_eps else 0)
    passes = (budget - probe) // RUNS - search.judges
    each = info.equivalents(first.queries) + bool(search.buffers)  # these may move once a step
    search.steps = passes // each
    if search.steps < 1:
        least = probe + RUNS * (search.judges + each)
        raise ConfigError(
            f"budget={budget!r} for {name!r} with {first.queries} queries: expected at least {least} forward passes"
        )
    with _kept(search):
        return search.result()


class _Search:
    """One call of ``tune``."""

    def __init__(
        self,
        info: OptimizerInfo,
        closures: list[Closure],
        params: Any,
        settings: dict[str, Any],
        first: ThreeStepOptimizer,
    ) -> None:
        self.info, self.closures, self.params, self.settings, self.flat = info, closures, params, settings, first.flat
        self.start = first.flat.vector.clone()
        modules = params.modules() if isinstance(params, nn.Module) else ()
        self.buffers = [
            ((m, name), tensor, tensor.clone())
            for m in modules
            for name, tensor in m._buffers.items()
            if tensor is not None
        ]
        self.judges, self.steps, self.forwards = min(JUDGES, len(closures)), 1, 0
        self.slopes: list[tuple[float, float]] = []
        self.runs: list[tuple[str, float, float]] = []
        # Where the estimate is a step already, lr only damps it, and eps is its scale.
        self.scales_itself = info.estimator.scales_itself
        self.chooses_eps = info.estimator.uses_eps and not self.scales_itself

    def result(self) -> Tuned:
        before = self.judged()
        lr, eps = self.info.default_lr, self.info.default_eps
        if self.chooses_eps:
            eps, trace = self.straight()
            if self.info.rule is torch.optim.SGD and self.info.estimator.unbiased and trace > 0:
                lr = (
                    self.settings["queries"] / trace
                )  # the longest step that helps on a bowl, for the mean of so many directions
        vary = "eps" if self.scales_itself else "lr"
        best, after = self.bracketed(vary, {"lr": lr, "eps": eps}, before)
        if not math.isfinite(min(before, after)):
            raise ValueError(f"tune {self.info.name}: no finite loss, neither before nor after any run")
        chosen = {"lr": lr, "eps": eps, vary: best}
        return Tuned(
            self.info.name,
            {**self.settings, **chosen},
            chosen["lr"],
            chosen["eps"],
            (before, after),
            self.forwards,
            self.slopes,
            self.runs,
        )

    def _asked(self, name: str, eps: float, queries: int) -> list[float]:
        """The first closure's losses of the candidates of an optimizer's first step."""
        seed = self.settings["seed"]
        optimizer = create_optimizer(
            name, self.params, lr=0.0, eps=eps, queries=queries, seed=seed, check_precision=False
        )
        losses = []
        for candidate in optimizer.ask():
            with candidate.shown(), torch.no_grad():
                losses.append(_mean(self.closures[0]()))
        self.forwards += len(losses)
        return losses

    def straight(self) -> tuple[float, float]:
        """(the largest eps at which slopes are those of a smaller one, the Hessian's trace there)."""
        slopes, curvatures = [], []
        (here, _) = self._asked("zo-rge", EPS[0], 1)  # at theta, of the same closure under the same dropout masks
        for eps in EPS:
            losses = self._asked("zo-sgd", eps, DIRECTIONS)
            pairs = list(zip(losses[::2], losses[1::2], strict=True))
            slopes.append([(plus - minus) / (2 * eps) for plus, minus in pairs])
            curvatures.append(statistics.fmean((plus + minus - 2 * here) / eps**2 for plus, minus in pairs))
        apart = [statistics.median(map(_apart, one, other)) for one, other in itertools.pairwise(slopes)]
        self.slopes = list(zip(EPS, apart, strict=False))
        allowed = max(STRAIGHT, min(apart))
        chosen = max(number for number, share in enumerate(apart) if share <= allowed)
        return EPS[chosen], curvatures[chosen]

    def bracketed(self, vary: str, values: dict[str, float], before: float) -> tuple[float, float]:
        """(chosen value, the loss after its short run): the best of powers of ten, then of half powers, then lr a half less."""
        found: dict[int, float] = {}  # by half powers of ten from the start

        def at(place: int) -> float:
            if place not in found and len(self.runs) < RUNS:
                value = values[vary] * 10 ** (place / 2)
                found[place] = self.run(**{**values, vary: value})
                self.runs.append((vary, value, found[place]))
            return found.get(place, math.inf)

        best = min((2, 0, -2), key=at)
        best = -2 if at(best) == math.inf else best
        step = int(math.copysign(2, best))
        # Where nothing moves, or everything diverges, the way on is clear.
        while best and len(self.runs) < RUNS and (at(best + step) < at(best) or at(best) in (before, math.inf)):
            best += step
        best = min((best, best - 1, best + 1), key=at)
        if vary == "lr" and at(best - 1) < before:
            best -= 1  # short runs favour steps that are too long for long ones (short-horizon bias, 1803.02021)
        return values[vary] * 10 ** (best / 2), at(best)

    def run(self, lr: float, eps: float) -> float:
        """The loss after a short run from the original parameters."""
        self.restore()
        settings = {"max_skipped": self.steps, **self.settings}
        optimizer = create_optimizer(self.info.name, self.params, lr=lr, eps=eps, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a run diverges is an answer
            for step in range(self.steps):
                optimizer.step(self.closures[step % len(self.closures)])
        self.forwards += optimizer.equivalents
        return self.judged()

    def judged(self) -> float:
        """Mean loss of the evaluated mini-batches; infinite where it is NaN."""
        every = len(self.closures) / self.judges
        torch.manual_seed(self.settings["seed"])  # the same dropout masks every time
        buffers, losses = Buffers([place for place, *_ in self.buffers]), []
        for number in range(self.judges):
            with torch.no_grad(), buffers.restored():
                losses.append(_mean(self.closures[int(number * every)]()))
        self.forwards += len(losses)
        mean = statistics.fmean(losses)
        return mean if math.isfinite(mean) else math.inf

    def restore(self) -> None:
        """Restore parameters and buffers."""
        self.flat.show(self.start)
        restore(self.buffers)


@contextmanager
def _kept(search: _Search) -> Iterator[None]:
    drawn = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])
            search.restore()


def _mean(answer: Tensor | float) -> float:
    return float(answer.mean()) if isinstance(answer, Tensor) else float(answer)


def _apart(one: float, other: float) -> float:
    """Relative difference of two slopes, 0 to 1; undefined for two zeros."""
    largest = max(abs(one), abs(other))
    return min(1.0, abs(one - other) / largest) if 0 < largest < math.inf else 1.0
