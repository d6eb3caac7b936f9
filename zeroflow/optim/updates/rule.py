"""The base class of updates, step 3 of an optimizer step, and the rule that moves the parameters."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from zeroflow.optim.cost import Cost
from zeroflow.optim.directions.direction import Step
from zeroflow.optim.estimators.estimator import Estimator
from zeroflow.optim.flat import FlatParameters


class Rule:
    """Any ``torch.optim`` optimizer, applied to the flat vector of parameters.

    Args:
        inner: has the hyper-parameters and moments; its parameters are ``flat.masters``.
        flat: the parameters.
        mask: ``[d]`` of ones and zeros, components that may move; None: all.
        skip: positions of parameters without a gradient, which a rule leaves alone.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, flat: FlatParameters, mask: Tensor | None, skip: Collection[int] = ()
    ) -> None:
        self.inner, self.flat, self.mask, self.skip = inner, flat, mask, skip

    def apply(self, vector: Tensor) -> None:
        """Move the parameters as if ``vector`` ``[d]`` were their gradient."""
        # Weight decay would move what a mask holds still.
        before = None if self.mask is None else self.flat.vector.clone()
        for number, (master, gradient) in enumerate(zip(self.flat.masters, self.flat.views(vector), strict=True)):
            master.grad = None if number in self.skip else gradient
        try:
            self.inner.step()
        finally:
            for master in self.flat.masters:
                master.grad = None
        if self.mask is not None and before is not None:
            self.flat.vector.copy_(torch.where(self.mask > 0, self.flat.vector, before))

    @contextmanager
    def tried(self, vector: Tensor) -> Iterator[Tensor]:
        """Replace ``vector`` ``[d]`` by the change that ``apply(vector)`` would make, without moving the parameters.

        The rule's state is restored unless ``keep()`` is called meanwhile.
        """
        theta, moments = self.flat.vector.clone(), copy.deepcopy(self.inner.state_dict())
        self.kept = False
        self.apply(vector)
        torch.sub(
            self.flat.vector, theta, out=vector
        )  # in its place: what is held during evaluations is what costs memory
        self.flat.vector.copy_(theta)
        del theta
        try:
            yield vector
        finally:
            if not self.kept:
                self.inner.load_state_dict(moments)

    def keep(self) -> None:
        """Keep the rule's state after the step that is being tried."""
        self.kept = True


class Update(ABC):
    """Moves the parameters along ``-vector``. Its dataclass fields are options."""

    needs: ClassVar[tuple[type[Estimator], ...]] = ()
    """Supported estimators; empty: all."""
    cost: ClassVar[Cost] = Cost()
    """Forward passes of one update."""
    keeps_best: ClassVar[bool] = False
    """Whether the loss on the step's mini-batch never rises."""
    follows_lr: ClassVar[bool] = True
    """Whether nothing moves where the learning rate is 0."""

    @abstractmethod
    def __call__(self, rule: Rule, vector: Tensor, step: Step) -> None:
        """Apply one update to ``rule.flat.vector``; ``vector`` is ``[d]``."""
