"""Take a step only if it reduces the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zeroflow.optim.cost import Cost
from zeroflow.optim.directions.direction import Step
from zeroflow.optim.estimators.cars import CARS, Line
from zeroflow.optim.estimators.estimator import Estimator
from zeroflow.optim.objective import HERE, Shift
from zeroflow.optim.updates.rule import Rule, Update


@dataclass(frozen=True)
class Conserve(Update):
    """The best of theta, theta - step and theta + step on the same mini-batch, where step is what the rule would do.

    Unless theta - step wins, the rule's moments are restored, so a rejected step leaves no trace. theta wins a tie; a
    candidate without a finite loss never wins.
    Source: ZeroFlow, Section 3.1; Kim et al. 2021 (CARS). Cost: 3 forward passes.
    """

    cost: ClassVar[Cost] = Cost(0, 3)
    keeps_best: ClassVar[bool] = True

    def __call__(self, rule: Rule, vector: Tensor, step: Step) -> None:
        theta = rule.flat.vector
        with rule.tried(vector) as change:
            losses = step.objective.losses([HERE, Shift(1.0, vector=change), Shift(-1.0, vector=change)])
            best = best_of(losses)
            if best == 1:
                rule.keep()
        if best:
            theta.add_(change, alpha=1.0 if best == 1 else -1.0)


@dataclass(frozen=True)
class KeepBest(Update):
    """The best of the rule's step and of the places that CARS has visited: theta and theta +- r u.

    Source: Kim et al. 2021 (CARS), Algorithm 1. Cost: 1 forward pass.
    """

    needs: ClassVar[tuple[type[Estimator], ...]] = (CARS,)
    cost: ClassVar[Cost] = Cost(0, 1)
    keeps_best: ClassVar[bool] = True
    follows_lr: ClassVar[bool] = False  # a place that was visited may be the best

    def __call__(self, rule: Rule, vector: Tensor, step: Step) -> None:
        line, objective = step.estimate, step.objective
        assert isinstance(line, Line)
        theta = rule.flat.vector
        with rule.tried(vector) as change:
            (candidate,) = objective.losses([Shift(1.0, vector=change)])
            best = best_of([*(loss for _, loss in line.visited), candidate])
            if best == len(line.visited):
                rule.keep()
        if best == len(line.visited):
            theta.add_(change)
        elif (query := line.visited[best][0].query) is not None:
            theta.add_(objective.direction(query).mul(objective.eps), alpha=line.visited[best][0].scale)


def best_of(losses: list[float]) -> int:
    """Index of the smallest finite loss, the first of equal ones; 0 if none is finite."""
    return min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
