"""Two-sided simultaneous perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zeroflow.optim.closure import mean_finite
from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.estimator import Estimate, RandomSlopes, Slopes, differences
from zeroflow.optim.objective import Objective, Shift


@dataclass(frozen=True)
class SPSA(RandomSlopes):
    """Two-sided simultaneous perturbation with q queries.

    g_i = (L(theta + eps z_i) - L(theta - eps z_i)) / 2 eps;  estimate = mean over i of g_i z_i.
    z_i ~ N(0, I), or signs where ``distribution="rademacher"``; ``combine="span"`` projects instead of averaging.
    Source: Spall 1992; MeZO (Malladi et al. 2023), definition 1; ZeroFlow, Eq. 1 (which divides by z_i: the same for signs, and
    without a mean for Gaussian z_i). Cost: 2q forward passes.
    """

    cost: ClassVar[Cost] = Cost(2)

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        losses = objective.losses([Shift(sign, query) for query in range(queries) for sign in (1.0, -1.0)])
        slopes = {query: both / 2 for query, both in differences(losses[::2], losses[1::2]).items()}
        return Slopes(mean_finite(losses), objective, slopes, eps=objective.eps, span=self.combine == "span")
