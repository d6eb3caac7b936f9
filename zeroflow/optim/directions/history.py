"""Mixing the estimate with the history of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zeroflow.optim.directions.direction import Direction, Step
from zeroflow.optim.estimators.estimator import Estimator, Slopes
from zeroflow.optim.estimators.forward_gradient import ForwardGradient
from zeroflow.optim.estimators.fzoo import FZOO
from zeroflow.optim.estimators.rge import RGE
from zeroflow.optim.estimators.spsa import SPSA


@dataclass(frozen=True)
class History(Direction):
    """h_t = (1 - a) e_t + a h_{t-1}, where e_t is this step's estimate and h_0 = e_0.

    Unlike momentum it preserves the scale of the estimate, and it precedes the sign and the update rule. Source: ZeroFlow,
    Section 6, "historical information" (a = 0 to .8). Memory: one vector ``[d]``. Cost: no forward pass.
    """

    kept: ClassVar[int] = 1

    a: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.a < 1:
            raise ValueError(f"history={self.a!r}: expected a share in [0, 1)")

    def __call__(self, vector: Tensor, step: Step) -> Tensor:
        before = step.memory.get("history")
        if before is None:
            step.memory["history"] = vector.clone()
            return vector
        before.mul_(self.a).add_(vector, alpha=1 - self.a)
        return vector.copy_(before)


@dataclass(frozen=True)
class DirectionHistory(Direction):
    """mean over i of g_i h_i, where h_i = (1 - a) z_i + a h_{i-1} goes on from query to query and from step to step.

    The slopes are those along z_i, but the step follows the history h_i of directions; the first h is the first z. Most of
    a step then lies along directions that g_i does not measure: for a > 0 it does not estimate the gradient, and exists to
    run the settings of the authors' package. A query without a finite loss is ignored.

    Source: class ``ZeroFlow`` of the Python package ``infty`` 0.1.2 (``use_history_grad``, ``alpha``). Memory: one vector
    ``[d]``. Cost: no forward pass.

    Attributes:
        a: share of the history.
        signs: sign(g_i) instead of g_i, as ``sign="scalar"``.
    """

    needs: ClassVar[tuple[type[Estimator], ...]] = (SPSA, RGE, FZOO, ForwardGradient)
    kept: ClassVar[int] = 1
    keeps_mean: ClassVar[bool] = False
    keeps_span: ClassVar[bool] = False

    a: float = 0.0
    signs: bool = False

    def __call__(self, vector: Tensor, step: Step) -> Tensor:
        estimate, memory = step.estimate, step.memory
        assert isinstance(estimate, Slopes)
        slopes, total = estimate.slopes, vector.zero_()
        weights = (
            {i: ((g > 0) - (g < 0)) / len(slopes) for i, g in slopes.items()}
            if self.signs
            else estimate.weights(slopes)
        )
        for query in sorted(weights):
            z = step.objective.direction(query)
            if "history" in memory:
                memory["history"].mul_(self.a).add_(z, alpha=1 - self.a)
            else:
                memory["history"] = z.clone()
            total.add_(memory["history"], alpha=weights[query])
        return total if self.signs else total.div_(estimate.eps)
