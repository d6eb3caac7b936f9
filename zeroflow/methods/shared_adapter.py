"""One adapter for all tasks: the fixed architecture among the extension-based methods (ZeroFlow, Section 3.2).

Each task continues to train the same adapter. A class is represented by its mean feature at the time it was learned, so old
classes suffer from what later tasks change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.data.scenario import Batch
from zeroflow.methods.method import MiniBatch, register_method, whole_example
from zeroflow.methods.options import AdapterOptions, TuningOptions
from zeroflow.methods.simplecil import SimpleCIL
from zeroflow.models.backbone import Backbone
from zeroflow.models.tuning import Tuning, create_tuning
from zeroflow.optim import OptimizerInfo


@register_method("shared-adapter", "one adapter that every task goes on training; class means of its features")
class SharedAdapter(SimpleCIL):
    """SimpleCIL on changing features: task t trains the adapter with a throw-away cosine head on its own classes."""

    trains = True
    any_loss = True
    needs_head = ""
    tuning: Tuning

    @dataclass(frozen=True)
    class Options(AdapterOptions, TuningOptions):
        """Options of the adapter and of its tuning."""

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        self.head: nn.Module | None = None

    @classmethod
    def tunes(cls, options: Any) -> str:
        return "adapter"

    @classmethod
    def refusal(cls, optimizer: OptimizerInfo, options: Any) -> str | None:
        return whole_example(optimizer, "adapter", options.subspace)

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        if classes.start == 0:
            self.tuning = create_tuning("adapter", self.backbone, generator, vars(self.options))
        self.head = self.new_head(len(classes), generator)
        super().begin_task(classes, generator)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def prepare(self, batch: MiniBatch) -> Any:
        return self.tuning.prefix(self.backbone, batch.images), batch.labels

    def losses(self, inputs: Any) -> Tensor:
        assert self.head is not None, "no task has begun"
        prefix, labels = inputs
        logits = self.head(self.tuning(self.backbone, prefix))
        return self.criterion(logits, labels - self.classes.start)

    def freeze(self) -> None:
        self.head = None  # and no feature space is frozen

    @torch.no_grad()
    def features(self, images: Tensor, spaces: range) -> Tensor:
        return self.tuning(self.backbone, self.tuning.prefix(self.backbone, images))[:, None]
