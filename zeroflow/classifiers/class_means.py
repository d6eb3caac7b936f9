"""Class means: the classifier of SimpleCIL and APER."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow.classifiers.classifier import Classifier, register_classifier
from zeroflow.models.heads import cosine


@register_classifier("class-means", "cosine to the mean feature of each class")
class ClassMeans(Classifier):
    """Score c = cosine of the feature and the mean unnormalised feature of class c.

    Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", IJCV 2024, Eq. 5.

    Attributes:
        total: sums of features, float64 ``[classes, width]``.
        count: samples, float64 ``[classes]``.
    """

    total: Tensor
    count: Tensor

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.register_buffer("total", torch.zeros(0, 0, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(0, dtype=torch.float64))

    @property
    def means(self) -> Tensor:
        """Mean feature of each class, float64 ``[classes, width]``."""
        return self.total / self.count.clamp(min=1)[:, None]

    def begin_task(self, classes: range, width: int, generator: torch.Generator) -> None:
        old = self.total.reshape(-1, width)[: classes.start]
        self.total = torch.cat([old, old.new_zeros(len(classes), width)])
        self.count = torch.cat([self.count[: classes.start], self.count.new_zeros(len(classes))])

    def add(self, features: Tensor, labels: Tensor) -> None:
        # A product, because scattered addition on a GPU has no fixed order.
        member = F.one_hot(labels, len(self.count)).to(self.total)
        self.total += member.T @ self.finite(features).to(self.total)
        self.count += member.sum(0)

    def merge(self, other: Self) -> None:
        self.total += other.total
        self.count += other.count

    def end_task(self) -> None:
        """Nothing to solve."""

    def scores(self, features: Tensor) -> Tensor:
        return cosine(features, self.means.to(features))
