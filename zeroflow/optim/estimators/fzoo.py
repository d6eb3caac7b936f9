"""One-sided estimate in units of the losses' own spread."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import ClassVar

from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.estimator import Estimate, Estimator, Slopes, differences
from zeroflow.optim.objective import HERE, Objective, Shift


@dataclass(frozen=True)
class FZOO(Estimator):
    """One-sided estimate along q signs whose step length is set by the standard deviation of the losses found.

    estimate = 1/(q sigma) * sum over i of (L(theta + eps u_i) - L(theta)) u_i, with u_i = +-1 and sigma the sample standard
    deviation of the q displaced losses (of both losses where q = 1, which leaves the slope's sign alone). Free of the scale
    of the loss and of eps: lr is the length of a step per component. Zero where sigma is.
    Source: Dang et al. 2025 (FZOO), Algorithm 1. Cost: q + 1 forward passes; published q = 8, eps = 1e-4.
    """

    cost: ClassVar[Cost] = Cost(1, 1)
    distribution: ClassVar[str] = "rademacher"  # type: ignore[misc]

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        here, *there = objective.losses([HERE, *(Shift(1.0, query) for query in range(queries))])
        slopes = differences(there, [here] * queries)
        spread = [loss for loss in there if math.isfinite(loss)]
        if len(spread) == 1:
            spread.append(here)
        sigma = statistics.stdev(spread) if slopes else 0.0
        loss = here if math.isfinite(here) else math.nan
        return Slopes(loss, objective, slopes, factor=1.0 if sigma else 0.0, eps=sigma or 1.0)
