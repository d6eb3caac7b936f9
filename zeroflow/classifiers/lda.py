"""Linear discriminant analysis: Gaussian classes that share one covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from zeroflow.classifiers.class_means import ClassMeans
from zeroflow.classifiers.classifier import register_classifier
from zeroflow.classifiers.normal_equations import solve


@register_classifier("lda", "linear discriminant: class means and one covariance within classes, shrunk")
class LDA(ClassMeans):
    """Score c = x^T S^-1 mu_c - mu_c^T S^-1 mu_c / 2, for equally likely classes, with x and mu_c relative to the mean sample.

    Centring changes all scores of a sample equally, and avoids the rounding of large, equal terms.

    S is the maximum-likelihood covariance within classes, shrunk towards its mean variance times I. Sources: Hayes and
    Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR-W 2020 (with a fixed amount, 1e-4,
    towards I); OAS: Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE Transactions on Signal Processing 2010, Eq. 23
    without its terms in 2 / width, as scikit-learn has it.

    Attributes:
        total: sums of features, float64 ``[classes, width]``.
        count: samples, float64 ``[classes]``.
        moment: sum of x x^T over all samples, float64 ``[width, width]``.
        weight: S^-1 mu_c, float64 ``[classes, width]``.
        offset: constant part of the scores, float64 ``[classes]``.
        center: the mean sample, float64 ``[width]``.
    """

    moment: Tensor
    weight: Tensor
    offset: Tensor
    center: Tensor

    @dataclass(frozen=True)
    class Options:
        """Options of the linear discriminant.

        Ledoit-Wolf shrinkage is missing: it needs fourth powers of distances to class means, which do not add up over
        mini-batches without a second moment for every class.

        Attributes:
            shrinkage: ``oas`` (chosen from the covariance and the number of samples) or ``fixed``.
            amount: with ``fixed``, the weight of the mean variance in S, in [0, 1].
        """

        shrinkage: str = "oas"
        amount: float = 0.0

        def __post_init__(self) -> None:
            if self.shrinkage not in ("oas", "fixed"):
                raise ValueError(f"shrinkage={self.shrinkage!r}: expected oas or fixed")
            if not 0 <= self.amount <= 1:
                raise ValueError(f"amount={self.amount!r}: expected a share in [0, 1]")
            if self.amount and self.shrinkage != "fixed":
                raise ValueError(f"amount={self.amount!r}: expected together with shrinkage=fixed")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        for name in ("moment", "weight"):
            self.register_buffer(name, torch.zeros(0, 0, dtype=torch.float64))
        for name in ("offset", "center"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))

    def begin_task(self, classes: range, width: int, generator: torch.Generator) -> None:
        super().begin_task(classes, width, generator)
        if not classes.start:
            self.moment = self.total.new_zeros(width, width)

    def add(self, features: Tensor, labels: Tensor) -> None:
        super().add(features, labels)
        x = features.detach().to(self.total)
        self.moment.addmm_(x.T, x)

    def merge(self, other: Self) -> None:
        super().merge(other)
        self.moment += other.moment

    def covariance(self) -> Tensor:
        """S, float64 ``[width, width]``; zero where all that varies is rounding, as with a single sample of every class."""
        n, width = float(self.count.sum()), len(self.moment)
        covariance = torch.addmm(self.moment, self.means.T, self.total, alpha=-1).div_(n)
        rounding = 2 * torch.finfo(covariance.dtype).eps * self.moment.diagonal()  # of a sum of n squares, divided by n
        varies = (covariance.diagonal() > rounding).to(covariance)
        covariance.mul_(varies[:, None]).mul_(varies)
        variance = float(covariance.trace()) / width
        amount = self.options.amount
        if self.options.shrinkage == "oas":
            square = float(covariance.square().mean())
            spread = (n + 1) * (square - variance**2 / width)
            amount = min((square + variance**2) / spread, 1.0) if spread > 0 else 1.0
        covariance.mul_(1 - amount).diagonal().add_(amount * variance)
        return covariance

    def end_task(self) -> None:
        self.fit(self.means)

    def fit(self, means: Tensor) -> None:
        """Solve for the weights of classes with these means, float64 ``[classes, width]``."""
        self.center = self.total.sum(0) / self.count.sum()
        self.weight = solve(self.covariance(), (means - self.center).T).T.contiguous()
        self.offset = (self.weight * (means - self.center)).sum(1) / 2

    def scores(self, features: Tensor) -> Tensor:
        return self._exact_scores(features).to(features)

    def log_posteriors(self, features: Tensor) -> Tensor:
        """Log probabilities of the classes, float64 ``[N, classes]``; also one next to 0 is told from other images' as near.

        Of the likeliest class -log(1 + sum of exp(gaps to the others)), which does not round to 0 until a gap is beyond 700.
        """
        scores = self._exact_scores(features)
        best = scores.argmax(dim=1, keepdim=True)
        gaps = scores - scores.gather(1, best)
        others = gaps.exp().scatter(1, best, 0.0).sum(1, keepdim=True)
        return gaps - torch.log1p(others)

    def _exact_scores(self, features: Tensor) -> Tensor:
        return (features.to(self.weight) - self.center) @ self.weight.T - self.offset
