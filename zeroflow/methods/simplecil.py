"""SimpleCIL: class means of frozen features. No training at all, so it shows whether any training helped.

Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", IJCV 2024, Section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from zeroflow.data.scenario import Batch
from zeroflow.methods.method import Method, register_method
from zeroflow.models.frozen import frozen_features


@register_method("simplecil", "class means of frozen features: no training, the row to beat")
class SimpleCIL(Method):
    """A closed-form classifier on the backbone's features; by default class means, nearest by cosine."""

    trains = False
    own_classifier = "class-means"
    takes_classifiers: ClassVar[tuple[str, ...] | None] = None
    takes = "features"

    @classmethod
    def tunes(cls, options: Any) -> str:
        return "none"

    @property
    def width(self) -> int:
        """Width of the features that the classifier takes."""
        return self.backbone.width

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        self.classes = classes
        self.classifier.begin_task(classes, self.width, generator)

    def freeze(self) -> None:
        self.frozen_spaces = 1

    def end_task(self, batches: Iterable[Batch]) -> None:
        for images, labels in batches:
            self.classifier.add(self.features(images, range(1))[:, 0], labels)
        self.classifier.end_task()

    @torch.no_grad()
    def features(self, images: Tensor, spaces: range) -> Tensor:
        return frozen_features(self.backbone, images)[:, None]

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        return self.classifier.scores(features[:, 0])
