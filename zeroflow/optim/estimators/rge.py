"""One-sided random gradient estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.estimator import Estimate, RandomSlopes, Slopes, differences
from zeroflow.optim.objective import HERE, Objective, Shift


@dataclass(frozen=True)
class RGE(RandomSlopes):
    """One-sided random gradient estimate with q queries that share the loss at theta.

    estimate = c/q * sum over i of (L(theta + eps u_i) - L(theta)) / eps * u_i, with c = 1 for Gaussian directions and for
    signs (``"rademacher"``), and c = d, the number of parameters, on the unit sphere (``"sphere"``).
    Source: Nesterov & Spokoiny 2017, Eq. 22; Liu et al. 2018 (ZO-SVRG), Eq. 2. Cost: q + 1 forward passes.
    """

    cost: ClassVar[Cost] = Cost(1, 1)

    distributions: ClassVar[tuple[str, ...]] = ("gaussian", "rademacher", "sphere")

    def factor(self, objective: Objective, slopes: dict[int, float]) -> float:
        """c of the formula, given the finite slopes."""
        return float(objective.dimensions) if self.distribution == "sphere" else 1.0

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        here, *there = objective.losses([HERE, *(Shift(1.0, query) for query in range(queries))])
        slopes = differences(there, [here] * queries)
        loss = here if math.isfinite(here) else math.nan
        return Slopes(loss, objective, slopes, self.factor(objective, slopes), objective.eps, self.combine == "span")
