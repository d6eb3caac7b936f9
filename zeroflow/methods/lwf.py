"""LwF: distil the previous model's outputs for old classes.

Source: Li & Hoiem, "Learning without Forgetting", ECCV 2016 / TPAMI 2018, Eq. 2-3; temperature T = 2. The factor T^2, which
makes derivatives independent of T, is of Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, Section 2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeroflow.data.scenario import Batch
from zeroflow.methods.finetune import FineTuning
from zeroflow.methods.method import MiniBatch, positive, register_method
from zeroflow.models.backbone import Backbone
from zeroflow.models.heads import CosineHead
from zeroflow.models.tuning import Tuning

M = TypeVar("M", bound=nn.Module)


@register_method("lwf", "as finetune, with the answers of the model before the task as soft targets for old classes")
class LwF(FineTuning):
    """``L = L_cur + alpha T^2 KL(softmax(old / T) || softmax(new / T))`` over the old classes, on the current images."""

    @dataclass(frozen=True)
    class Options(FineTuning.Options):
        """Options of fine-tuning and of distillation.

        Attributes:
            alpha: weight of the distillation loss.
            temperature: T.
        """

        alpha: float = 1.0
        temperature: float = 2.0

        def __post_init__(self) -> None:
            super().__post_init__()
            positive(temperature=self.temperature)
            if self.alpha < 0:
                raise ValueError(f"alpha={self.alpha!r}: expected a number >= 0")

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        self.old_tuning: Tuning | None = None
        self.old_head: CosineHead | None = None

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        if self.tasks:
            self.old_tuning = _frozen(self.tuning, self.backbone)
            self.old_head = _frozen(self.head, self.backbone)
        super().begin_task(classes, generator, batches)

    def train(self, mode: bool = True) -> LwF:
        super().train(mode)
        for old in (self.old_tuning, self.old_head):
            if old is not None:
                old.eval()
        return self

    def prepare(self, batch: MiniBatch) -> Any:
        if self.old_tuning is None or self.old_head is None:
            return *super().prepare(batch), None
        with torch.no_grad():
            prefix = self.old_tuning.prefix(self.backbone, batch.images)
            old = self.old_head(self.old_tuning(self.backbone, prefix))
        return *super().prepare(batch), old

    def passes(self) -> tuple[int, int]:
        return 0 if self.old_tuning is None else 1, 1

    def losses(self, inputs: Any) -> Tensor:
        prefix, labels, old = inputs
        features = self.tuning(self.backbone, prefix)
        losses = self.criterion(self.answers(features), labels)
        if old is None:
            return losses
        heat = self.options.temperature
        logits = self.head(features)[:, : old.shape[1]]
        # In float64: at a large T the distance is a small difference of numbers that T^2 makes large.
        target, answer = ((values.double() / heat).log_softmax(1) for values in (old, logits))
        distance = F.kl_div(answer, target, reduction="none", log_target=True).sum(1)
        return losses + (self.options.alpha * heat**2 * distance).to(losses)


def _frozen(module: M, backbone: Backbone) -> M:
    """A frozen copy; weights of the frozen backbone are shared, not copied."""
    shared = {id(value): value for value in [*backbone.parameters(), *backbone.buffers()]}
    return copy.deepcopy(module, shared).requires_grad_(False).eval()
