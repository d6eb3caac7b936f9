"""Coordinate-wise gradient estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zeroflow.optim.estimators.estimator import Estimate
from zeroflow.optim.estimators.rge import RGE
from zeroflow.optim.objective import Objective


@dataclass(frozen=True)
class CGE(RGE):
    """One-sided finite differences along q coordinates a step, drawn without replacement.

    estimate_j = (L(theta + eps e_j) - L(theta)) / eps for the step's coordinates j, zero for all others; with q >= d, or
    q at least the number of components a sparsity mask leaves, the whole gradient by finite differences.
    Source: Lian et al. 2016; Chen et al. 2024 (DeepZero), Eq. 2. Cost: q + 1 forward passes.
    """

    distributions: ClassVar[tuple[str, ...]] = ("coordinate",)
    distribution: ClassVar[str] = "coordinate"  # type: ignore[misc]
    combine: ClassVar[str] = "mean"  # type: ignore[misc]  # coordinates are at right angles

    @property
    def unbiased(self) -> bool:
        return False  # only with all coordinates

    def factor(self, objective: Objective, slopes: dict[int, float]) -> float:
        return float(len(slopes))  # the formula has a sum where the others have a mean

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        return super().estimate(objective, min(queries, objective.dimensions))
