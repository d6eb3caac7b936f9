"""Curvature-aware random search: a Newton step along one random line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.estimator import Estimate, Estimator
from zeroflow.optim.objective import HERE, Objective, Shift


@dataclass
class Line(Estimate):
    """What CARS found on its line: the Newton direction, and the places visited with their losses.

    Attributes:
        loss: at theta.
        objective: regenerates the line.
        newton: d/h in units of the displacement.
        visited: (multiple of the displacement, loss) of theta and both sides.
    """

    loss: float
    objective: Objective
    newton: float
    visited: tuple[tuple[Shift, float], ...]

    def differences(self) -> list[float]:
        return [loss - self.loss for _, loss in self.visited if math.isfinite(loss)]

    def vector(self) -> Tensor:
        vector = self.objective.combine({0: self.newton})
        return vector.mul_(self.objective.eps)


@dataclass(frozen=True)
class CARS(Estimator):
    """First and second difference along a random unit direction u: the Newton step of the loss on that line.

    d = (L(theta + r u) - L(theta - r u)) / 2r;  h = (L(theta + r u) + L(theta - r u) - 2 L(theta)) / r^2;
    estimate = (d/h) u, and lr is the damping a, with r = eps / sqrt(k + 1) at step k. The update ``KeepBest`` then takes the
    best of theta, theta +- r u and theta - a (d/h) u.
    Source: Kim et al. 2021 (CARS), Algorithm 1. Cost: 3 forward passes, and one more of the update; published a = .5 and
    eps = .5, where r must be as long as the curvature is constant.
    """

    scales_itself: ClassVar[bool] = True
    uses_queries: ClassVar[bool] = False
    cost: ClassVar[Cost] = Cost(0, 3)
    distribution: ClassVar[str] = "sphere"  # type: ignore[misc]

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        objective.eps = objective.eps / math.sqrt(objective.step + 1)
        places = (HERE, Shift(1.0, 0), Shift(-1.0, 0))
        here, plus, minus = losses = objective.losses(places)
        slope, curvature = (plus - minus) / 2, plus + minus - 2 * here
        newton = slope / curvature if curvature else 0.0
        loss = here if math.isfinite(here) else math.nan
        visited = tuple(zip(places, losses, strict=True))
        return Line(loss, objective, newton if math.isfinite(newton) else 0.0, visited)
