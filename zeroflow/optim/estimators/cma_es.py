"""CMA-ES: a population drawn from a normal distribution that adapts its size and shape to the loss."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from zeroflow.errors import ConfigError
from zeroflow.optim.closure import mean_finite
from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.estimator import Estimate, Estimator
from zeroflow.optim.objective import Objective, Shift

Vector = np.ndarray[Any, np.dtype[np.float64]]

MOST_COMPONENTS = 2_560
"""Limit for a full covariance matrix. The package adds one matrix per query: 1.4 GB at this size with 27 queries."""


@dataclass(frozen=True)
class CMAES(Estimator):
    """Covariance matrix adaptation evolution strategy: q samples around theta, of which only the ranking of losses matters.

    x_i = theta + eps sigma C^(1/2) z_i with z_i ~ N(0, I);  estimate = theta - sum over the best q/2 of w_i x_i. Then sigma (1 at
    first, so that eps is sigma_0) and C (I at first) adapt to the order, along paths of the last steps. lr is the mean's
    learning rate c_m: 1 is the published step, and a smaller one shortens the mean's move alone, so a schedule does no harm.
    Losses that are not finite count as the worst.

    With ``separable`` C is diagonal: memory and time are linear in d instead of quadratic and cubic, and it learns faster
    where components hardly depend on each other. The distribution stays on the CPU in float64. Bits do not depend on who
    evaluates, as long as the processes that share a step run on the same kind of CPU.
    Source: Hansen 2016 (tutorial, arXiv:1604.00772), Appendix A; Ros & Hansen 2008 (separable); made by the Python package
    ``cmaes``. Cost: q forward passes; published q = 4 + floor(3 ln d).
    """

    scales_itself: ClassVar[bool] = True
    cost: ClassVar[Cost] = Cost(1)
    population: ClassVar[bool] = True
    least_queries: ClassVar[int] = 2

    separable: bool = False

    @property
    def kept(self) -> int | None:
        # A diagonal and two paths, in float64.
        return 3 * 2 if self.separable else None

    def usual_queries(self, size: int) -> int:
        return 4 + math.floor(3 * math.log(size))

    def check(self, size: int) -> None:
        for name in ("cmaes", "threadpoolctl"):
            _package(name)
        if size > MOST_COMPONENTS and not self.separable:
            raise ConfigError(
                f"es-cma: {size:,} trained components need a covariance matrix of {8 * size**2 / 2**20:,.0f} MiB; expected at "
                f"most {MOST_COMPONENTS:,}. Give separable=True for a diagonal one, or train fewer parameters (a prompt, a "
                "subspace, sparsity=...)"
            )

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        distribution = Distribution.of(objective, self.separable)
        normal = [distribution.taken(objective.direction(query)) for query in range(queries)]
        vectors = [distribution.spread(move, objective) for move in distribution.moves(normal)]
        losses = objective.losses([Shift(1.0, vector=vector) for vector in vectors])
        return Population(mean_finite(losses), objective, losses, vectors, distribution)


@dataclass
class Population(Estimate):
    """Samples with their losses, and the distribution that they were drawn from.

    Attributes:
        loss: mean over the finite losses.
        objective: evaluated the losses.
        losses: by query.
        vectors: displacements from theta, ``[d]`` each.
        distribution: before the step.
    """

    loss: float
    objective: Objective
    losses: list[float]
    vectors: list[Tensor]
    distribution: Distribution

    def differences(self) -> list[float]:
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        return [loss - finite[0] for loss in finite]

    def vector(self) -> Tensor:
        """Minus the mean's move, ``[d]``. The optimizer keeps the distribution as it has adapted, from here on."""
        before, eps = self.distribution, self.objective.eps
        move, after = before.told([before.taken(vector / eps) for vector in self.vectors], self.losses)
        self.objective.state.clear()
        self.objective.state.update(after.state())
        return before.spread(move, self.objective).neg_()


@dataclass
class Distribution:
    """N(0, sigma^2 C) over the n components that may move, in units of eps.

    Attributes:
        sigma: step size.
        C: ``[n, n]``, or ``[n]`` where it is diagonal.
        p_sigma: evolution path of the step size, ``[n]``.
        p_c: evolution path of the covariance, ``[n]``.
        free: positions of the n components among all; None: all of them.
        generation: number of steps so far.
    """

    sigma: float
    C: Vector
    p_sigma: Vector
    p_c: Vector
    free: Tensor | None = None
    generation: int = 0

    @classmethod
    def of(cls, objective: Objective, separable: bool) -> Distribution:
        """The distribution in an optimizer's state; a new one if there is none, or if other components are frozen now."""
        state, size, free = objective.state, objective.dimensions, objective.directions.free
        if state and len(state["C"]) == size and _equal(state["free"], free):
            C, p_sigma, p_c = (state[key].numpy(force=True) for key in ("C", "p_sigma", "p_c"))
            return cls(state["sigma"], C, p_sigma, p_c, free, state["generation"])
        diagonal = separable and size > 1
        return cls(1.0, np.ones(size) if diagonal else np.eye(size), np.zeros(size), np.zeros(size), free)

    def state(self) -> dict[str, Any]:
        """The state as numbers and tensors."""
        arrays = {"C": self.C, "p_sigma": self.p_sigma, "p_c": self.p_c}
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return {**tensors, "sigma": self.sigma, "free": self.free, "generation": self.generation}

    def taken(self, vector: Tensor) -> Vector:
        """The free components ``[n]`` of a vector ``[d]``."""
        chosen = vector if self.free is None else vector[self.free]
        return chosen.to("cpu", torch.float64).numpy(force=True).copy()

    def spread(self, move: Vector, objective: Objective) -> Tensor:
        """eps times a move ``[n]``, as a displacement ``[d]`` of the parameters."""
        values = torch.from_numpy(move).to(objective.theta)
        if self.free is not None:
            values = torch.zeros_like(objective.theta).index_copy_(0, self.free, values)
        return values.mul_(objective.eps)

    def moves(self, normal: Sequence[Vector]) -> list[Vector]:
        """sigma C^(1/2) z for each z ``[n]``."""
        if self.C.ndim == 1:
            return [self.sigma * np.sqrt(self.C) * z for z in normal]
        # The symmetric root: any other one turns with the arbitrary eigenvectors of equal eigenvalues.
        with _one_thread():
            values, vectors = np.linalg.eigh(self.C)
            scales = np.sqrt(np.maximum(values, 0.0))
            return [self.sigma * (vectors @ (scales * (vectors.T @ z))) for z in normal]

    def told(self, moves: Sequence[Vector], losses: Sequence[float]) -> tuple[Vector, Distribution]:
        """The mean's move ``[n]`` and the adapted distribution, given the loss at each move."""
        strategy = self._strategy(len(moves))
        worst = [loss if math.isfinite(loss) else math.inf for loss in losses]
        with _one_thread():
            strategy.tell(list(zip(moves, worst, strict=True)))
        after = Distribution(
            float(strategy._sigma), strategy._C, strategy._p_sigma, strategy._pc, self.free, strategy.generation
        )
        return strategy.mean, after

    def _strategy(self, queries: int) -> Any:
        """The package's optimizer in this state, around zero."""
        cmaes, size = _package("cmaes"), len(self.C)
        given = {"mean": np.zeros(size), "sigma": self.sigma, "population_size": queries}
        with np.errstate(divide="ignore"):  # two or three queries: the better half is one, and has no spread
            strategy = cmaes.SepCMA(**given) if self.C.ndim == 1 else cmaes.CMA(**given, cov=self.C)
        # No constructor takes these; the package's own pickles carry them under the same names.
        strategy._C, strategy._p_sigma, strategy._pc, strategy._g = self.C, self.p_sigma, self.p_c, self.generation
        return strategy


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.to(other.device), other)


def _one_thread() -> Any:
    """Use one BLAS thread, since the number of threads changes the order of summation and so the last bits."""
    return _controller().limit(limits=1, user_api="blas")


@functools.cache
def _controller() -> Any:
    return _package("threadpoolctl").ThreadpoolController()


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"es-cma needs the Python package {name}: pip install cmaes threadpoolctl") from None
