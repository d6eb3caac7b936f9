"""SimpleCIL: class means of frozen features. No training at all, so it shows whether any training helped.

Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", IJCV 2024, Section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zeroflow.data.scenario import Batch
from zeroflow.methods.method import Method, register_method
from zeroflow.methods.prototypes import class_means
from zeroflow.models.backbone import Backbone
from zeroflow.models.frozen import frozen_features
from zeroflow.models.heads import cosine


@register_method("simplecil", "class means of frozen features: no training, the row to beat")
class SimpleCIL(Method):
    """Prototype c = mean feature of class c; prediction = nearest by cosine."""

    trains = False
    takes = "features"
    prototypes: Tensor

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        self.register_buffer("prototypes", torch.empty(0, backbone.width))

    @classmethod
    def tunes(cls, options: Any) -> str:
        return "none"

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        self.classes = classes

    def freeze(self) -> None:
        self.frozen_spaces = 1

    def end_task(self, batches: Iterable[Batch]) -> None:
        means = class_means(lambda images: self.features(images, range(1))[:, 0], batches, self.classes)
        self.prototypes = torch.cat([self.prototypes.to(means)[: self.classes.start], means])

    @torch.no_grad()
    def features(self, images: Tensor, spaces: range) -> Tensor:
        return frozen_features(self.backbone, images)[:, None]

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        return cosine(features[:, 0], self.prototypes)
