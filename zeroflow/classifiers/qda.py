"""Quadratic discriminant: a covariance for every class, the classifier of FeCAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn import functional as F

from zeroflow.classifiers.classifier import Classifier, register_classifier
from zeroflow.classifiers.normal_equations import factor


@register_classifier("qda", "Mahalanobis distance with a shrunk correlation matrix for every class: FeCAM's classifier")
class QDA(Classifier):
    """Score c = -(f - mu_c)^T R_c^-1 (f - mu_c), with f = x / |x| and R_c the correlations of S_c + g1 v I + g2 w (1 - I).

    S_c is the covariance of the class's f, v its mean variance, w its mean covariance of two features. Source: Goswami et
    al., "FeCAM: Exploiting the Heterogeneity of Class Distributions in Exemplar-Free Continual Learning", NeurIPS 2023,
    Section 4. Its Tukey transform is for non-negative features, as of a CNN, and is omitted, as the authors do for ViTs, of
    whose code are g1 and g2 (for CNNs g2 = 1).
    A class without variance, such as one with a single image, has R_c = I, the limit of ever stronger shrinkage.

    One matrix per class is stored (100 classes of width 768: 472 MB), and no second one: the solution is in the upper triangles.

    Attributes:
        total: sums of f, float64 ``[classes, width]``.
        count: samples, float64 ``[classes]``.
        moment: float64 ``[classes, width, width]``: on and below the diagonal sums of f f^T, above it U in
            R_c = U^T D U, whose diagonal is 1.
        pivots: D, float64 ``[classes, width]``.
        solved: samples that U and D are based on, float64 ``[classes]``.
    """

    total: Tensor
    count: Tensor
    moment: Tensor
    pivots: Tensor
    solved: Tensor

    @dataclass(frozen=True)
    class Options:
        """Options of the quadratic discriminant.

        Attributes:
            shrinkage: g1, added to every variance, in units of the mean variance.
            off_diagonal: g2, added to the covariance of every two features, in units of the mean covariance; at most
                ``shrinkage``, up to which R_c always has an inverse.
        """

        shrinkage: float = 1.0
        off_diagonal: float = 0.0

        def __post_init__(self) -> None:
            for name in ("shrinkage", "off_diagonal"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name}={getattr(self, name)!r}: expected a number >= 0")
            if self.off_diagonal > self.shrinkage:
                raise ValueError(
                    f"off_diagonal={self.off_diagonal!r}: expected a number <= shrinkage ({self.shrinkage!r}), "
                    "beyond which correlations may have no inverse"
                )

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        for name, axes in (("total", 2), ("count", 1), ("moment", 3), ("pivots", 2), ("solved", 1)):
            self.register_buffer(name, torch.zeros([0] * axes, dtype=torch.float64))

    def begin_task(self, classes: range, width: int, generator: torch.Generator) -> None:
        for name, shape in (
            ("total", [width]),
            ("count", []),
            ("moment", [width, width]),
            ("pivots", [width]),
            ("solved", []),
        ):
            old = self.get_buffer(name).reshape(-1, *shape)[: classes.start]
            setattr(self, name, torch.cat([old, old.new_zeros(len(classes), *shape)]))

    def add(self, features: Tensor, labels: Tensor) -> None:
        f = F.normalize(self.finite(features).to(self.total), dim=-1)
        member = F.one_hot(labels, len(self.count)).to(f)
        self.total += member.T @ f
        self.count += member.sum(0)
        for c in member.any(0).nonzero()[:, 0].tolist():
            of_class = f[labels == c]
            self.moment[c].addmm_(of_class.T, of_class)  # above the diagonal too, until the class is solved again

    def merge(self, other: Self) -> None:
        self.total += other.total
        self.count += other.count
        self.moment += other.moment

    def end_task(self) -> None:
        for c in (self.count != self.solved).nonzero()[:, 0].tolist():
            lower = factor(self.correlation(c))
            diagonal = lower.diagonal()
            self.moment[c].tril_().add_((lower / diagonal).T.triu(1))
            self.pivots[c] = diagonal.square()
            self.solved[c] = self.count[c]

    def correlation(self, c: int) -> Tensor:
        """R_c, float64 ``[width, width]``."""
        n, below = float(self.count[c]), self.moment[c].tril()
        rounding = 2 * n * torch.finfo(below.dtype).eps * float(below.diagonal().max())
        scatter = below + below.tril(-1).T  # n - 1 times the covariance, which is all the same for correlations
        scatter.addr_(self.total[c], self.total[c] / n, alpha=-1)
        variances = scatter.diagonal()
        varies = (variances > rounding).to(scatter)
        scatter.mul_(varies[:, None]).mul_(varies)
        variance, pairs = float(variances.mean()), max(variances.numel() * (variances.numel() - 1), 1)
        between = self.options.off_diagonal * float(scatter.sum() - variances.sum()) / pairs
        scatter += between
        variances += self.options.shrinkage * variance - between
        deviations = variances.sqrt()
        deviations[deviations == 0] = 1
        scatter.div_(deviations[:, None]).div_(deviations)
        variances.fill_(1)
        return scatter

    def scores(self, features: Tensor) -> Tensor:
        f = F.normalize(features.to(self.total), dim=-1)
        means = self.total / self.count.clamp(min=1)[:, None]
        distances = [
            solve_triangular(u, f - mean, upper=True, left=False, unitriangular=True).square() @ (1 / pivots)
            for u, mean, pivots in zip(self.moment, means, self.pivots, strict=True)
        ]
        return torch.stack(distances, dim=1).neg().to(features)
