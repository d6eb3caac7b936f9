"""Steps that are taken only where they help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zeroflow.optim.directions.direction import Step
from zeroflow.optim.estimators.cars import Line
from zeroflow.optim.objective import HERE, Shift
from zeroflow.optim.updates.rule import Rule, Update


@dataclass(frozen=True)
class Conserve(Update):
    """The best of theta, theta - step and theta + step on the same mini-batch, where step is what the rule would do.

    Unless theta - step is kept, the rule's moments return to what they were, so a rejected step leaves no trace. Staying
    wins a tie; a place whose loss is not finite never wins.
    Source: ZeroFlow, Section 3.1; Kim et al. 2021 (CARS). Cost: 3 forward passes.
    """

    cost: ClassVar[str] = "3"

    def forwards(self) -> int:
        return 3

    def __call__(self, rule: Rule, vector: Tensor, step: Step) -> None:
        theta, moments = rule.flat.vector.clone(), rule.moments()
        rule.apply(vector)
        change = theta - rule.flat.vector
        rule.flat.vector.copy_(theta)
        losses = step.objective.losses([HERE, Shift(-1.0, vector=change), Shift(1.0, vector=change)])
        best = best_of(losses)
        rule.flat.vector.copy_((theta, theta - change, theta + change)[best])
        if best != 1:
            rule.forget_since(moments)


@dataclass(frozen=True)
class KeepBest(Update):
    """The best of the rule's step and of the places that CARS has visited: theta and theta +- r u.

    Source: Kim et al. 2021 (CARS), Algorithm 1. Cost: 1 forward pass.
    """

    cost: ClassVar[str] = "1"

    def forwards(self) -> int:
        return 1

    def __call__(self, rule: Rule, vector: Tensor, step: Step) -> None:
        line, objective = step.estimate, step.objective
        assert isinstance(line, Line), "goes with the CARS estimator"
        theta, moments = rule.flat.vector.clone(), rule.moments()
        rule.apply(vector)
        change = rule.flat.vector - theta
        rule.flat.vector.copy_(theta)
        (candidate,) = objective.losses([Shift(1.0, vector=change)])
        best = best_of([*(loss for _, loss in line.visited), candidate])
        if best == len(line.visited):
            rule.flat.vector.add_(change)
            return
        rule.forget_since(moments)
        shift, _ = line.visited[best]
        if shift.query is not None:
            rule.flat.vector.add_(objective.direction(shift.query).mul(objective.eps), alpha=shift.scale)


def best_of(losses: list[float]) -> int:
    """Position of the smallest finite loss, the first of equal ones; 0 where none is finite."""
    return min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
