"""What an optimizer is made of: an estimator, directions, and an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zeroflow.optim.directions import Direction
from zeroflow.optim.estimators import Estimator
from zeroflow.optim.updates import Plain, Update


@dataclass(frozen=True)
class Composition:
    """A method: how it estimates, which direction it takes, and how it updates.

    Attributes:
        estimator: step 1.
        directions: step 2, one after the other.
        inner: ``inner(param_groups) -> torch.optim.Optimizer``, the rule of step 3.
        update: how the rule is applied.
        sparsity: share of the components that a seed-made mask holds still (ZeroFlow, Section 6): they are zero in the
            perturbation and in the update alike. The same ones in every step.
        first_order_steps: how many steps at the beginning take the exact gradient instead (ZeroFlow, Section 6,
            "hybrid").
        first_order_lr: multiple of the learning rate during those; moments start anew after them.
        max_skipped: how many steps in a row may be without any finite loss; one more raises ``NonFiniteLoss``.
        check_precision: refuse an eps that the half precision of parameters or of the loss would swallow.

    Raises:
        TypeError: pieces that do not go together.
    """

    estimator: Estimator
    directions: Sequence[Direction]
    inner: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    update: Update = field(default_factory=Plain)
    sparsity: float = 0.0
    first_order_steps: int = 0
    first_order_lr: float = 1.0
    max_skipped: int = 10
    check_precision: bool = True

    def __post_init__(self) -> None:
        pieces: list[Direction | Update] = [*self.directions, self.update]
        for piece in pieces:
            if piece.needs and not isinstance(self.estimator, piece.needs):
                raise TypeError(
                    f"{type(piece).__name__} needs the estimator {' or '.join(n.__name__ for n in piece.needs)}, "
                    f"got {type(self.estimator).__name__}"
                )
