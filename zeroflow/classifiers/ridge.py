"""Ridge regression on one-hot labels: task by task, with the same solution as on all tasks at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow.classifiers.classifier import Classifier, register_classifier
from zeroflow.classifiers.normal_equations import add_gram, solve
from zeroflow.classifiers.ridge_choice import choose_ridge

CHUNK = 1024
"""Samples whose expanded features exist at once."""


@register_classifier(
    "ridge", "ridge regression on one-hot labels: recursive least squares, for one lambda exactly the joint solution"
)
class Ridge(Classifier):
    """Score = (G + lambda I)^-1 Q applied to the feature, with G = X^T X and Q = X^T Y over all samples so far.

    The published recursion updates (G + lambda I)^-1 task by task and has the same result; sums also allow lambda to change.
    As published, there is no intercept. Source: Zhuang et al., "ACIL: Analytic Class-Incremental Learning with Absolute
    Memorization and Privacy Protection", NeurIPS 2022.

    Where lambda is chosen automatically, a task's features are kept until it ends.

    Attributes:
        gram: G, float64 ``[k, k]``, its lower triangle.
        product: Q, float64 ``[k, classes]``.
        ridge: lambda, float64 ``[]``.
        weight: the solution, float64 ``[k, classes]``.
    """

    gram: Tensor
    product: Tensor
    ridge: Tensor
    weight: Tensor

    @dataclass(frozen=True)
    class Options:
        """Options of ridge regression.

        Attributes:
            ridge: lambda, in units of a squared feature summed over samples; 0: chosen for each task, see ``choose_ridge``. A
                task none of whose classes has five samples keeps the previous one, or 1 if it is the first.
        """

        ridge: float = 0.0

        def __post_init__(self) -> None:
            if self.ridge < 0:
                raise ValueError(f"ridge={self.ridge!r}: expected a number > 0, or 0 to have it chosen")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        for name in ("gram", "product", "weight"):
            self.register_buffer(name, torch.zeros(0, 0, dtype=torch.float64))
        self.register_buffer("ridge", torch.tensor(self.options.ridge or 1.0, dtype=torch.float64))
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def begin_task(self, classes: range, width: int, generator: torch.Generator) -> None:
        self._waiting.clear()
        if not classes.start:
            size = self.expanded_width(width, generator)
            self.gram = self.gram.new_zeros(size, size)
            self.product = self.gram.new_zeros(size, 0)
        old = self.product[:, : classes.start]
        self.product = torch.cat([old, old.new_zeros(len(old), len(classes))], dim=1)

    def expanded_width(self, width: int, generator: torch.Generator) -> int:
        """Width of what ``expand`` returns; called at the first task, so that it can draw random numbers."""
        return width

    def expand(self, features: Tensor) -> Tensor:
        """Inputs of the regression: ``[N, width]`` to float64 ``[N, k]``."""
        return features.to(self.gram)

    def add(self, features: Tensor, labels: Tensor) -> None:
        features = self.finite(features)
        if self.options.ridge:
            self._sum_up(features, labels)
        else:  # some are held out to choose lambda; known at the task's end
            self._waiting.append((features, labels))

    def _sum_up(self, features: Tensor, labels: Tensor) -> None:
        for x, y in zip(torch.split(features, CHUNK), torch.split(labels, CHUNK), strict=True):
            rows = self.expand(x)
            add_gram(self.gram, rows)
            self.product.addmm_(rows.T, F.one_hot(y, self.product.shape[1]).to(rows))

    def merge(self, other: Self) -> None:
        self.gram += other.gram
        self.product += other.product
        self._waiting += other._waiting

    def end_task(self) -> None:
        if self._waiting:
            features, labels = (torch.cat(part) for part in zip(*self._waiting, strict=True))
            self._waiting.clear()
            self._sum_up(features, labels)
            chosen = choose_ridge(features, labels, self.expand, len(self.gram), CHUNK)
            if chosen:
                self.ridge.fill_(chosen)
        self.weight = solve(self.gram, self.product, float(self.ridge))

    def scores(self, features: Tensor) -> Tensor:
        return (self.expand(features) @ self.weight).to(features)
