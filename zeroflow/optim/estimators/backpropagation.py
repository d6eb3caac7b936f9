"""The exact gradient, as the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.estimator import Estimate, Estimator
from zeroflow.optim.objective import Objective


@dataclass
class Exact(Estimate):
    """The gradient itself.

    Attributes:
        loss: see ``Estimate``.
        gradient: ``[d]``, zero where there is none.
        unused: positions of the parameters that are in no graph: as in torch, no rule moves them.
    """

    loss: float
    gradient: Tensor
    unused: frozenset[int] = frozenset()

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
    differentiates: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    cost: ClassVar[Cost] = Cost(0, 1, ", and a backward pass")

    checkpoint: bool = False

    @property
    def unbiased(self) -> bool:
        return True

    def equivalents(self, queries: int) -> int:
        return 3 + int(self.checkpoint)

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        loss, parts = objective.gradient()
        flat = objective.flat
        pieces = [
            m.new_zeros(m.numel()) if g is None else g.reshape(-1).to(m)
            for g, m in zip(parts, flat.masters, strict=True)
        ]
        return Exact(loss, torch.cat(pieces), frozenset(i for i, g in enumerate(parts) if g is None))
