"""Forward-mode differentiation along random directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from zeroflow.optim.closure import mean_finite
from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.estimator import Estimate, RandomSlopes, Slopes
from zeroflow.optim.objective import Objective


@dataclass(frozen=True)
class ForwardGradient(RandomSlopes):
    """Forward gradient: the exact directional derivative along random directions, by forward-mode differentiation.

    g_i = dL(theta)/d z_i;  estimate = mean over i of g_i z_i. No eps. Source: Baydin et al. 2022, Eq. 1; Ren et al. 2023.
    Cost: q forward passes that carry a tangent (each twice the work of a plain one, and about three times the time), no graph.
    """

    uses_eps: ClassVar[bool] = False
    differentiates: ClassVar[bool] = True
    cost: ClassVar[Cost] = Cost(1)

    def equivalents(self, queries: int) -> int:
        return 2 * queries

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        answers = objective.slopes(queries)
        slopes = {i: slope for i, (loss, slope) in enumerate(answers) if math.isfinite(loss + slope)}
        return Slopes(mean_finite([loss for loss, _ in answers]), objective, slopes, span=self.combine == "span")
