"""The base classes of estimators and their estimates, step 1 of an optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from zeroflow.optim.cost import Cost
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.noise import Directions
from zeroflow.optim.objective import Objective


class Estimate(ABC):
    """A gradient estimate.

    Attributes:
        loss: the loss near theta, NaN where no evaluation was finite.
        unused: positions of parameters that the loss is known not to depend on; no rule moves them.
    """

    loss: float
    unused: frozenset[int] = frozenset()

    @property
    def usable(self) -> bool:
        """Whether anything finite was measured."""
        return math.isfinite(self.loss)

    @abstractmethod
    def vector(self) -> Tensor:
        """The estimate itself, ``[d]``, a new tensor."""

    def differences(self) -> Collection[float] | None:
        """The finite loss differences (or slopes) that it is computed from; None: it is computed from something else."""
        return None

    def scalar_sign(self) -> Tensor:
        """The estimate with each slope replaced by its sign, ``[d]``: mean over queries of sign(g_i) z_i.

        Raises:
            TypeError: there are no slopes, as in backpropagation.
        """
        raise TypeError(f"{type(self).__name__} has no slopes along random directions whose sign could be taken")


@dataclass
class Slopes(Estimate):
    """An estimate from slopes along random directions: factor / eps * mean over queries i of slopes[i] * z_i.

    Attributes:
        loss: see ``Estimate``.
        objective: regenerates the directions.
        slopes: finite ones by query, multiplied by eps, as (L(theta + eps z) - L(theta - eps z)) / 2. Where a query's
            loss was not finite, the mean is over the others.
        factor: of the distribution; see ``zeroflow.optim.estimators``.
        eps: factor that the slopes still contain, one number or ``[d]``.
        span: whether to project onto the span of the directions instead of averaging; the factor is then 1.
    """

    loss: float
    objective: Objective
    slopes: dict[int, float]
    factor: float = 1.0
    eps: float | Tensor = 1.0
    span: bool = False

    @property
    def usable(self) -> bool:
        return bool(self.slopes)

    def differences(self) -> Collection[float]:
        return self.slopes.values()

    def vector(self) -> Tensor:
        return self.of(self.slopes)

    def of(self, queries: Collection[int], step: int | None = None) -> Tensor:
        """The estimate from some of the queries, ``[d]``; ``step``: where its directions are another step's."""
        if not queries:
            return torch.zeros_like(self.objective.flat.vector)
        return self.objective.combine(self.weights(queries, step), step).div_(self.eps)

    def weights(self, queries: Collection[int], step: int | None = None) -> dict[int, float]:
        """eps times the estimate from some of the queries, as multiples of their directions."""
        if self.span:
            return self._projected(sorted(queries), step)
        return {query: self.factor * self.slopes[query] / len(queries) for query in queries}

    def _projected(self, queries: list[int], step: int | None) -> dict[int, float]:
        """Weights w of directions V ``[q, d]`` with V V^T w = slopes; the smallest ones where q > d. Two directions at a time."""
        products = np.empty((len(queries), len(queries)))
        for row, query in enumerate(queries):
            one = self.objective.direction(query, step).to(torch.float64, copy=True)  # its buffer is shared
            for column in range(row, len(queries)):
                other = self.objective.direction(queries[column], step).double()
                products[row, column] = products[column, row] = float((one * other).sum())
        slopes = np.array([self.slopes[query] for query in queries])
        weights = np.linalg.lstsq(products, slopes, rcond=1e-10)[0]
        return dict(zip(queries, weights.tolist(), strict=True))

    def scalar_sign(self) -> Tensor:
        signs = {query: float((g > 0) - (g < 0)) for query, g in self.slopes.items()}
        return self.objective.combine(signs).div_(len(signs))


class Estimator(ABC):
    """Computes an ``Estimate`` from evaluations of an ``Objective``. Its dataclass fields are options for users."""

    uses_queries: ClassVar[bool] = True
    """Whether the number of queries matters."""
    uses_eps: ClassVar[bool] = True
    """Whether the perturbation size matters."""
    per_example: ClassVar[bool] = False
    """Whether a closure may return one loss for every example of its mini-batch."""
    least_queries: ClassVar[int] = 1
    """Minimum number of queries."""
    scales_itself: ClassVar[bool] = False
    """Whether an estimate is already a step whose length is proportional to eps; lr then only damps it."""
    differentiates: ClassVar[bool] = False
    """Whether it needs derivatives, in reverse or forward mode, instead of values of the loss."""
    exact: ClassVar[bool] = False
    """Whether it computes the gradient itself, by backpropagation."""
    population: ClassVar[bool] = False
    """Whether a step stores the parameters of all its queries at once."""
    cost: ClassVar[Cost]
    """Forward passes of one step."""

    checkpoint: bool = False
    """Whether the model should recompute activations in the backward pass."""

    distributions: ClassVar[tuple[str, ...]] = ()
    """Distributions that a user may choose from; empty: there is no choice."""

    distribution: str = "gaussian"
    """Distribution of the directions; see ``zeroflow.optim.noise.Directions``."""

    combine: str = "mean"
    """How the slopes of several queries become one estimate: ``"mean"``, or ``"span"`` where it is an option.

    ``"span"`` is the projection of the gradient on the span of the directions, V^T (V V^T)^-1 (slopes) with V ``[q, d]``, instead
    of the mean of slope times direction. Its cosine to the gradient is better where q is not small against d (1.14 times at
    d = 50, q = 16; the same from q < d / 100 on), and it is never longer than the gradient: about sqrt(q / d) of its length instead
    of sqrt(d / q), so lr is larger by about d / q. Source: multi-tangent forward gradients (2410.17764). Cost: q (q + 1) / 2
    directions generated again.
    """

    def __post_init__(self) -> None:
        if self.combine not in ("mean", "span"):
            raise ValueError(f"combine={self.combine!r}: expected 'mean' or 'span'")
        if self.distributions and self.distribution not in self.distributions:
            *others, last = map(repr, self.distributions)
            expected = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"distribution={self.distribution!r}: expected {expected}")

    @property
    def unbiased(self) -> bool:
        """Whether the mean of its estimates over directions is the gradient (of finite differences), for any q."""
        return False

    @property
    def kept(self) -> int | None:
        """Number of float32 vectors ``[d]`` that it keeps from step to step; None: as much as a matrix."""
        return 0

    def equivalents(self, queries: int) -> int:
        """Work of one step in units of forward passes, by number of operations.

        A forward pass counts 1, a backward pass 2 (products with the weights and with the activations), a forward pass that
        carries a tangent 2, recomputed activations 1.
        """
        return self.cost(queries)

    def usual_queries(self, size: int) -> int | None:
        """Default number of queries for ``size`` parameters; None: it does not depend on them."""
        return None

    def check(self, size: int) -> None:
        """Refuse, before the first step, a number of trained components that it cannot handle.

        Raises:
            ConfigError: there are too many.
            ImportError: a package is missing.
        """
        return None

    def directions(self, flat: FlatParameters, seed: int, mask: Tensor | None, queries: int) -> Directions:
        """The directions of its queries on these parameters; see ``zeroflow.optim.noise.Directions``."""
        return Directions(self.distribution, seed, mask, queries)

    @abstractmethod
    def estimate(self, objective: Objective, queries: int) -> Estimate:
        """Evaluate ``objective`` and return the estimate."""


@dataclass(frozen=True)
class RandomSlopes(Estimator):
    """Base of estimators that use slopes along random directions with independent components."""

    distributions: ClassVar[tuple[str, ...]] = ("gaussian", "rademacher")

    distribution: str = "gaussian"
    combine: str = "mean"

    @property
    def unbiased(self) -> bool:
        return self.combine == "mean"


def differences(first: Sequence[float], second: Sequence[float]) -> dict[int, float]:
    """``first[i] - second[i]`` by position, where that is finite."""
    found = {i: a - b for i, (a, b) in enumerate(zip(first, second, strict=True))}
    return {i: difference for i, difference in found.items() if math.isfinite(difference)}
