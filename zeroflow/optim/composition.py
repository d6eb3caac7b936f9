"""The three steps of an optimizer: an estimator, directions, and an update."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
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
        directions: step 2, applied in order.
        inner: ``inner(param_groups) -> torch.optim.Optimizer``, the rule of step 3.
        update: how the rule is applied.
        sparsity: share of the components that are frozen by a random mask (ZeroFlow, Section 6): they are zero in both
            perturbation and update, and the same in every step.
        first_order_steps: number of initial steps that use the exact gradient instead (ZeroFlow, Section 6, "hybrid").
        first_order_lr: multiple of the learning rate during those; moments are reset after them.
        max_skipped: number of consecutive steps that may lack a finite loss; one more raises ``NonFiniteLoss``.
        check_precision: refuse an eps that is below the rounding of half-precision parameters or losses, and
            tell of parameters so large that theirs swallows it.

    Raises:
        TypeError: the parts cannot be combined.
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

    def is_exact(self, step: int) -> bool:
        """Whether a step, numbered from 0, uses the exact gradient."""
        return self.estimator.exact or step < self.first_order_steps

    def lr_factor(self, step: int) -> float:
        """What a group's learning rate is multiplied by in a step, numbered from 0."""
        return self.first_order_lr if step < self.first_order_steps else 1.0

    def check_maximize(self, groups: Sequence[Mapping[str, Any]], *, known: bool) -> None:
        """Refuse groups that are to be maximised where that would not be done.

        Args:
            groups: of parameters.
            known: whether the rule of step 3 knows ``maximize``.

        Raises:
            ValueError: a group has it, and the rule does not know it, or steps are kept by their losses.
        """
        by_loss = self.update.keeps_best or self.estimator.scales_itself
        if any(group.get("maximize") for group in groups) and (by_loss or not known):
            why = "this optimizer keeps what lowers the loss" if by_loss else "this rule does not know it"
            raise ValueError(f"params: maximize=True of a group: {why}; negate the loss instead")

    @property
    def kind(self) -> str:
        """The pieces by name, with what a saved state depends on; not the numbers that a parameter group holds."""
        rule = getattr(self.inner, "func", self.inner)
        pieces = [_named(piece) for piece in (self.estimator, *self.directions, self.update)]
        return " ".join([*pieces, getattr(rule, "__name__", type(rule).__name__), f"sparsity={self.sparsity:g}"])

    def __post_init__(self) -> None:
        pieces: list[Direction | Update] = [*self.directions, self.update]
        for piece in pieces:
            if piece.needs and not isinstance(self.estimator, piece.needs):
                raise TypeError(
                    f"{type(piece).__name__} needs the estimator {' or '.join(n.__name__ for n in piece.needs)}, "
                    f"got {type(self.estimator).__name__}"
                )


def _named(piece: object) -> str:
    """A piece's type, with its settings where it declares them as fields."""
    if not dataclasses.is_dataclass(piece):
        return type(piece).__name__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(piece))  # where an object is in memory tells nothing
