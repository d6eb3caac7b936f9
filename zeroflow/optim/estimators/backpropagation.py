"""The exact gradient, as the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zeroflow.optim.estimators.estimator import Estimate, Estimator
from zeroflow.optim.objective import Objective


@dataclass
class Exact(Estimate):
    """The gradient itself, ``[d]``."""

    loss: float
    gradient: Tensor

    @property
    def usable(self) -> bool:
        return math.isfinite(self.loss) and bool(self.gradient.isfinite().all())

    def vector(self) -> Tensor:
        return self.gradient


@dataclass(frozen=True)
class Backpropagation(Estimator):
    """The exact gradient, as the reference that forward-pass methods are measured against.

    With ``checkpoint`` activations inside the model's blocks are not stored but computed again on the way back (Chen et al.
    2016), which is the honest memory baseline: the model is asked to, by timm's ``set_grad_checkpointing`` or Hugging
    Face's ``gradient_checkpointing_enable``, where parameters are given as a module that has either; the same gradient.
    Cost: one forward and one backward pass (about two forwards), a second forward with ``checkpoint``.
    """

    uses_queries: ClassVar[bool] = False
    uses_eps: ClassVar[bool] = False
    cost: ClassVar[str] = "1, and a backward pass"

    checkpoint: bool = False

    def forwards(self, queries: int) -> int:
        return 1

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        return Exact(*objective.gradient())
