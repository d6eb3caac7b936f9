"""Methods that penalise changes of trained values: the base of EWC and L2-SP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroflow.data.scenario import Batch
from zeroflow.methods.finetune import FineTuning


class Penalised(FineTuning):
    """``L = L_cur + alpha L_reg`` (ZeroFlow, Eq. 3). The penalty is part of the loss: nothing is added to a gradient.

    ``L_reg`` compares trained values with their anchors, the values at the end of the previous task; rows of the head that a
    task adds have none.
    """

    @dataclass(frozen=True)
    class Options(FineTuning.Options):
        """Options of fine-tuning and of the penalty.

        Attributes:
            alpha: weight of the penalty.
        """

        alpha: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.alpha < 0:
                raise ValueError(f"alpha={self.alpha!r}: expected a number >= 0")

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        anchors = {name: value.detach().clone() for name, value in self.named_parameters() if value.requires_grad}
        super().begin_task(classes, generator, batches)
        self.anchors = anchors or self._start()

    def _start(self) -> dict[str, Tensor]:
        """Anchors of the first task."""
        return {}

    @abstractmethod
    def penalty(self) -> Tensor:
        """L_reg, 0-dimensional."""

    def losses(self, inputs: Any) -> Tensor:
        losses = super().losses(inputs)
        return losses + self.options.alpha * self.penalty() if self.anchors else losses

    def moved(self) -> Iterable[tuple[str, Tensor]]:
        """Anchored values by name, as differences from their anchors."""
        values = dict(self.named_parameters())
        for name, anchor in self.anchors.items():
            yield name, values[name][: len(anchor)] - anchor
