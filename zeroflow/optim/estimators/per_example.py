"""One direction per example of the mini-batch, all in the same two forward passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zeroflow.optim.closure import mean_finite
from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.census import Census
from zeroflow.optim.estimators.estimator import Estimate, Estimator
from zeroflow.optim.estimators.example_signs import signs_of
from zeroflow.optim.executor import Numbers
from zeroflow.optim.objective import Objective


@dataclass(frozen=True)
class PerExample(Estimator):
    """Two-sided differences with a separate direction for each of the batch's N examples.

    g_n = (l_n(theta + eps z_n) - l_n(theta - eps z_n)) / 2 eps with l_n the loss of example n;
    estimate = mean over n (and over q repetitions) of g_n z_n.

    The directions of a weight ``[out, in]`` are z_n = Z * (r_n s_n^T), elementwise, with Z, r_n and s_n random signs: any two
    are uncorrelated, and one more matrix product per layer evaluates all of them (Wen et al. 2018, Flipout, Eq. 4). Other
    parameters get a sign for each component and example. N slopes instead of one make the estimate better for the same
    forward passes, by up to sqrt(N) in its cosine to the gradient.

    The closure returns the losses ``[N]`` (``reduction="none"``), and dimension 0 of the model's activations is the example.
    Examples must not interact: no batch statistics. This is verified for every new size of a mini-batch, and once other
    functions of torch are called than before, or in another mode (another loss, batch statistics), or with a Python number that
    was 0: no loss may change while half of the other examples stay at theta, and one must be that of its parameters. Not looked at is
    what tensors hold: a mask or a weight, in a tensor, that lets examples meet later. A closure that returns a
    single number gets plain SPSA along signs, with a warning.

    With ``normalize`` the g_n of a repetition are divided by their standard deviation over n (about their mean, with 1/N), so
    that lr does not depend on the scale of the loss or of eps; a single example keeps only its sign.
    Source: per-example directions of GRZO and EVA-0 (2026); ``normalize``: Tan et al. 2026 (GRZO, arXiv:2606.02857), whose lr
    is 2 eps times the one here. Cost: 2q forward passes, and 5 more to count and verify a mini-batch of a new size (1 more
    where the size has been seen), or of another loss or mode.
    """

    per_example: ClassVar[bool] = True
    cost: ClassVar[Cost] = Cost(2)
    distribution: ClassVar[str] = "rademacher"  # type: ignore[misc]

    normalize: bool = False

    @property
    def unbiased(self) -> bool:
        return not self.normalize

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        census = objective.memory.setdefault("census", Census())

        def evaluate(index: int) -> Numbers:
            extra = objective.forwards
            if not objective.share:
                return ()
            with torch.no_grad():
                losses = census.losses(objective, index // 2, (1.0, -1.0)[index % 2])
            return (objective.share * (objective.forwards - extra), *losses)

        before = objective.forwards
        answers = objective.run(2 * queries, evaluate, width=None)
        # From the answers alone, so that all processes and a replay count alike and know what has been verified.
        objective.forwards = before + 2 * queries + round(max(answer[0] for answer in answers))
        losses = torch.tensor([answer[1:] for answer in answers], dtype=torch.float64)
        census.found(losses.shape[1])
        slopes = (losses[::2] - losses[1::2]) / 2
        return ExampleSlopes(mean_finite(losses.flatten().tolist()), objective, slopes, self.normalize)


@dataclass
class ExampleSlopes(Estimate):
    """Slopes by query and example, and the mean of slope times direction.

    Attributes:
        loss: see ``Estimate``.
        objective: regenerates the directions.
        slopes: multiplied by eps, ``[q, N]``; N = 1 where the closure returns a single number. The mean is over the finite
            ones.
        normalize: whether the slopes of a query are divided by their standard deviation.
    """

    loss: float
    objective: Objective
    slopes: Tensor
    normalize: bool = False

    @property
    def usable(self) -> bool:
        return bool(self.slopes.isfinite().any())

    def differences(self) -> list[float]:
        return list(self.slopes[self.slopes.isfinite()].tolist())

    def vector(self) -> Tensor:
        if self.normalize:
            return self._combine(self.slopes / self._spread())
        return self._combine(self.slopes).div_(self.objective.eps)

    def _spread(self) -> Tensor:
        """Standard deviation of each query's finite slopes ``[q, 1]``; its magnitude for a single one; infinite where zero."""
        kept = self.slopes.isfinite()
        count = kept.sum(1, keepdim=True)
        mean = torch.where(kept, self.slopes, 0.0).sum(1, keepdim=True) / count
        about = torch.where(count > 1, mean, 0.0)
        spread = torch.where(kept, self.slopes - about, 0.0).square().sum(1, keepdim=True).div(count).sqrt()
        return torch.where(spread > 0, spread, math.inf)

    def scalar_sign(self) -> Tensor:
        return self._combine(self.slopes.sign())

    def _combine(self, weights: Tensor) -> Tensor:
        kept = self.slopes.isfinite()
        weights = torch.where(kept, weights, 0.0) / kept.sum()
        examples = weights.shape[1]
        total = torch.zeros_like(self.objective.flat.vector)
        for query, row in enumerate(weights):
            base = self.objective.direction(query)
            if examples == 1:
                total.add_(base, alpha=float(row[0]))
                continue
            on = row.to(base)
            signs = signs_of(self.objective, query, examples)
            for parameter, place in self.objective.flat.slices():
                mean = signs.weighted(parameter, on)
                total[place] += base[place] * mean.reshape(-1)
        return total
