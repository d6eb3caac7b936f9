"""The sign of the estimate, in its two forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zeroflow.optim.directions.direction import Direction, Step


@dataclass(frozen=True)
class Sign(Direction):
    """The sign of the estimate.

    ``sign="elementwise"``: sign(mean over i of g_i z_i), every component +-1. Source: Liu et al. 2019 (ZO-signSGD),
    Algorithm 1; the paper's form (ZeroFlow, Section 3.1).
    ``sign="scalar"``: mean over i of sign(g_i) z_i, which keeps the lengths of z; there is no ``combine="span"`` of signs. Cost: no
    forward pass.
    """

    keeps_mean: ClassVar[bool] = False

    sign: str = "elementwise"

    def __post_init__(self) -> None:
        if self.sign not in ("elementwise", "scalar"):
            raise ValueError(f"sign={self.sign!r}: expected 'elementwise' or 'scalar'")

    @property
    def before_history(self) -> bool:  # type: ignore[override]
        """The scalar form needs the slopes as measured."""
        return self.sign == "scalar"

    @property
    def keeps_span(self) -> bool:  # type: ignore[override]
        return self.sign == "scalar"

    def __call__(self, vector: Tensor, step: Step) -> Tensor:
        return vector.sign_() if self.sign == "elementwise" else step.estimate.scalar_sign()
