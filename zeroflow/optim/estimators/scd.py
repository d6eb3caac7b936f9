"""Zeroth-order stochastic coordinate descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zeroflow.optim.estimators.estimator import Estimate, Slopes
from zeroflow.optim.estimators.spsa import SPSA
from zeroflow.optim.objective import Objective


@dataclass(frozen=True)
class SCD(SPSA):
    """Two-sided differences along q coordinates a step, drawn without replacement, scaled to be unbiased.

    estimate = d/q * sum over the step's coordinates j of (L(theta + eps e_j) - L(theta - eps e_j)) / 2 eps * e_j.
    Source: Lian et al. 2016 (ZO-SCD), Eq. 3. Cost: 2q forward passes.
    """

    distributions: ClassVar[tuple[str, ...]] = ("coordinate",)
    distribution: ClassVar[str] = "coordinate"  # type: ignore[misc]
    combine: ClassVar[str] = "mean"  # type: ignore[misc]

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        estimate = super().estimate(objective, min(queries, objective.dimensions))
        assert isinstance(estimate, Slopes)
        estimate.factor = float(objective.dimensions)
        return estimate
