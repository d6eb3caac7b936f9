"""Mixing the estimate with the history of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zeroflow.optim.directions.direction import Direction, Step


@dataclass(frozen=True)
class History(Direction):
    """h_t = (1 - a) e_t + a h_{t-1}, where e_t is this step's estimate and h_0 = e_0.

    Unlike momentum it keeps the length of the estimate, and it comes before the sign and the update rule. Source: ZeroFlow,
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
