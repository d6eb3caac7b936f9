"""Step 3 of a step: the rule that moves the parameters, and what an update is."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zeroflow.optim.directions.direction import Step
from zeroflow.optim.flat import FlatParameters


class Rule:
    """Any ``torch.optim`` optimizer, working on the flat vector of parameters.

    Args:
        inner: holds hyper-parameters and moments; its parameters are ``flat.masters``.
        flat: the parameters. mask: ``[d]`` of ones and zeros, components that may move; None: all.
    """

    def __init__(self, inner: torch.optim.Optimizer, flat: FlatParameters, mask: Tensor | None) -> None:
        self.inner, self.flat, self.mask = inner, flat, mask

    def apply(self, vector: Tensor) -> None:
        """Move the parameters as if ``vector`` ``[d]`` were their gradient."""
        # Weight decay would move what a mask holds still.
        before = None if self.mask is None else self.flat.vector.clone()
        for master, gradient in zip(self.flat.masters, self.flat.views(vector), strict=True):
            master.grad = gradient
        self.inner.step()
        for master in self.flat.masters:
            master.grad = None
        if self.mask is not None and before is not None:
            self.flat.vector.copy_(torch.where(self.mask > 0, self.flat.vector, before))

    def moments(self) -> Mapping[Any, Any]:
        """A copy of everything the rule remembers."""
        return {parameter: copy.deepcopy(state) for parameter, state in self.inner.state.items()}

    def forget_since(self, moments: Mapping[Any, Any]) -> None:
        """Remember again only what ``moments()`` gave."""
        self.inner.state.clear()
        self.inner.state.update(moments)


class Update(ABC):
    """Moves the parameters along ``-vector``. Its dataclass fields are options."""

    cost: ClassVar[str] = ""
    """Forward passes of one update, as a formula."""

    def forwards(self) -> int:
        """Forward passes of one update."""
        return 0

    @abstractmethod
    def __call__(self, rule: Rule, vector: Tensor, step: Step) -> None:
        """Apply one update to ``rule.flat.vector``; ``vector`` is ``[d]``."""
