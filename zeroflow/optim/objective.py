"""The function an estimator may ask: loss values at displaced parameters, slopes along directions, or the gradient.

How evaluations are made is an ``Evaluator``'s business, where they run an ``Executor``'s.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zeroflow.optim.closure import Closure, Part, scalar
from zeroflow.optim.evaluator import Evaluator
from zeroflow.optim.executor import Executor, Numbers
from zeroflow.optim.noise import Directions


class Elsewhere(ABC):
    """Stands for a closure where losses are made elsewhere, and told."""

    @abstractmethod
    def losses(self, objective: Objective, shifts: Sequence[Shift]) -> list[float]:
        """Loss at each shifted place."""

    def __call__(self) -> Tensor | float:
        raise TypeError(
            "ask: this optimizer wants more than losses of whole places, such as derivatives; use step(closure)"
        )


class NonFiniteLoss(ArithmeticError):
    """Too many steps in a row without one finite loss. The parameters are those of the last good step."""


@dataclass(frozen=True)
class Shift:
    """A place to evaluate at: theta + scale * vector, where the vector is a query's direction or any other.

    Attributes:
        scale: multiple of the vector; for a query it multiplies eps * z.
        query: number of the query whose direction is meant, or None where ``vector`` says it.
        vector: a displacement ``[d]`` that every process holds alike.
    """

    scale: float = 0.0
    query: int | None = None
    vector: Tensor | None = None


HERE = Shift()
"""No displacement: the parameters as they are."""


@dataclass(frozen=True)
class Perturbation:
    """How far, and along which directions, the queries of a step are displaced.

    Attributes:
        eps: the size, one number or a vector ``[d]`` where parameter groups differ.
        directions: of the queries.
        step: number of the step, which keys them.
    """

    eps: float | Tensor
    directions: Directions
    step: int


@dataclass(frozen=True)
class Memory:
    """What an estimator keeps from step to step.

    Attributes:
        transient: only saves it work.
        state: part of the optimizer's state; plain numbers and tensors.
    """

    transient: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


class Objective:
    """One step's function of the parameters, L(theta).

    Where processes share the mini-batch, the closure is a ``Slice`` and counts by its share of the examples; any other
    closure counts as one of equally large slices. Forward passes are counted in whole mini-batches.

    Args:
        closure: returns the loss at the current parameters, without calling backward.
        evaluator: calls it.
        perturbation: of the queries.
        memory: of the estimator; default: it remembers nothing.
        per_example: whether a closure may give one loss for each example; their mean is then the loss.

    Attributes:
        forwards: passes made so far.
        cache: of the estimator, for this step.
    """

    def __init__(
        self,
        closure: Closure,
        evaluator: Evaluator,
        perturbation: Perturbation,
        memory: Memory | None = None,
        *,
        per_example: bool = False,
    ) -> None:
        self.closure, self.evaluator, self.flat, self.per_example = closure, evaluator, evaluator.flat, per_example
        self.eps, self.directions, self.step = perturbation.eps, perturbation.directions, perturbation.step
        memory = memory or Memory()
        self.memory, self.state = memory.transient, memory.state
        self.forwards = 0
        self.cache: dict[str, Any] = {}
        self._base = self.flat.vector
        self._latest = _Direction(torch.empty_like(self._base))

    # What estimators ask.

    @property
    def executor(self) -> Executor:
        """Where evaluations run."""
        return self.evaluator.executor

    @property
    def share(self) -> float:
        """Part of the mini-batch that the closure looks at, 0 to 1; the shards' shares add up to 1."""
        return self._part.share

    @property
    def samples(self) -> int | None:
        """Examples of the mini-batch, where the closure says how many it has."""
        return self._part.samples

    def own(self, samples: int) -> slice:
        """Which examples of a mini-batch of so many the closure looks at."""
        return self._part.own(samples)

    def whole(self, examples: int) -> int:
        """How many examples the mini-batch has of which the closure looks at so many."""
        return self._part.whole(examples)

    @property
    def theta(self) -> Tensor:
        """The point ``[d]`` that evaluations are displaced from; not to be changed."""
        return self._base

    @property
    def dimensions(self) -> int:
        """Number of components that may move: d, or what a sparsity mask leaves of it."""
        return self.directions.dimensions(self.flat.size)

    def direction(self, query: int, step: int | None = None) -> Tensor:
        """z ``[d]`` of a query. The buffer is shared: it is valid until another direction is asked for.

        Args:
            query: its number.
            step: of another step than this one.
        """
        key = (self.step if step is None else step, query)
        if self._latest.key != key:
            self.directions.fill_(self._latest.vector, *key)
            self._latest.key = key
        return self._latest.vector

    def combine(self, weights: dict[int, float], step: int | None = None) -> Tensor:
        """Sum over queries of weight * z, ``[d]``; directions are regenerated one at a time, in query order."""
        total = torch.zeros_like(self._base)
        for query in sorted(weights):
            total.add_(self.direction(query, step), alpha=weights[query])
        return total

    def losses(self, shifts: Sequence[Shift]) -> list[float]:
        """Loss at each shifted place, non-finite ones included; as many forward passes."""
        if isinstance(self.closure, Elsewhere):
            losses = self.closure.losses(self, shifts)
            self.forwards += len(shifts)
            return losses

        def evaluate(index: int) -> Numbers:
            with torch.no_grad():
                self.move(shifts[index])
                return (scalar(self.mean(self.call())),)

        return [loss for (loss,) in self.run(len(shifts), self._weighted(evaluate))]

    def slopes(self, queries: int) -> list[tuple[float, float]]:
        """(loss, directional derivative along z) for each query by forward-mode differentiation; no graph is built."""

        def evaluate(query: int) -> Numbers:
            self.flat.show(self._base)
            tangents = self.flat.views(self.direction(query))
            # Fused attention has no forward-mode rule; the plain formula has.
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                for parameter, tangent in zip(self.flat.parameters, tangents, strict=True):
                    # In place on purpose: a closure sees the module's own parameters, whatever module that is.
                    dual = forward_ad.make_dual(parameter.detach().clone(), tangent.to(parameter.dtype))  # type: ignore[no-untyped-call]
                    parameter.copy_(dual)
                loss = self.mean(self.call(differentiates=True))
                if not isinstance(loss, Tensor):
                    raise TypeError("closure: forward-mode differentiation needs a tensor loss, got a plain number")
                primal, slope = forward_ad.unpack_dual(loss)  # type: ignore[no-untyped-call]
                if slope is None:
                    raise TypeError(
                        "closure: the loss has no derivative with respect to the parameters (detached, .item(), accuracy?); "
                        "forward-mode differentiation needs one, zo-sgd does not"
                    )
                return scalar(primal), float(slope)

        return [(loss, slope) for loss, slope in self.run(queries, self._weighted(evaluate, width=2), width=2)]

    def gradient(self) -> tuple[float, list[Tensor | None]]:
        """(loss, gradient by parameter, None where it is in no graph) by backpropagation; see ``Evaluator.gradient``."""
        found = self.evaluator.gradient(self._part, self.mean)
        self.forwards += 1
        return found

    def at(self, theta: Tensor) -> Objective:
        """The same function around another point ``[d]``; its forward passes are counted by its own ``forwards``."""
        other = copy.copy(self)
        other._base, other.forwards = theta, 0
        return other

    def of(self, closure: Closure) -> Objective:
        """Another function around the same point, with the same directions."""
        other = self.at(self._base)
        other.closure = closure
        return other

    # What estimators with evaluations of their own kind are made of.

    def run(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        """Have ``count`` evaluations made, and everything put back afterwards; see ``Executor.map``.

        What shards give is added up, so an evaluation weighs its numbers by ``share`` where they are means.
        """
        results = self.evaluator.map(count, evaluate, width)
        self.forwards += count
        return results

    @contextmanager
    def shown(self, shift: Shift) -> Iterator[None]:
        """The model's parameters are those at ``shift`` inside, and dropout draws what it draws in every evaluation."""
        with self.evaluator.same_function(), self.evaluator.buffers.restored():
            with torch.no_grad():
                self.move(shift)
            self.evaluator.seed()
            yield

    def move(self, shift: Shift) -> None:
        """Let the model's parameters be those at ``shift``."""
        base = self._base
        if shift.query is None:
            moved = base if shift.vector is None else torch.add(base, shift.vector, alpha=shift.scale)
        elif isinstance(self.eps, Tensor):
            moved = torch.addcmul(base, self.direction(shift.query), self.eps, value=shift.scale)
        else:
            moved = torch.add(base, self.direction(shift.query), alpha=shift.scale * self.eps)
        self.flat.show(moved)

    def call(self, differentiates: bool = False, within: AbstractContextManager[Any] | None = None) -> Tensor | float:
        """The closure's own answer at the model's parameters, under this step's dropout masks; buffers do not move.

        Args:
            differentiates: whether it is differentiated along a direction.
            within: is entered around the closure alone.
        """
        if within is None:
            return self.evaluator.call(self.closure, differentiates)

        def inside() -> Tensor | float:
            with within:
                return self.closure()

        return self.evaluator.call(inside, differentiates)

    def mean(self, answer: Tensor | float) -> Tensor | float:
        """A closure's answer with losses of single examples reduced to their mean."""
        several = self.per_example and isinstance(answer, Tensor) and answer.ndim == 1
        return answer.mean() if several and isinstance(answer, Tensor) else answer

    def settle(self) -> None:
        """Find out what buffers become in this step, at theta; see ``Evaluator.settle``. They do with ``finish``."""
        self.evaluator.buffers.check_written()
        if not self.evaluator.buffers.settled and not isinstance(self.closure, Elsewhere):
            self.forwards += self.evaluator.settle(self._part)

    def finish(self) -> None:
        """The step is over; see ``Evaluator.finish``."""
        self.evaluator.finish()

    @property
    def _part(self) -> Part:
        return Part(self.closure, self.executor)

    def _weighted(self, evaluate: Callable[[int], Numbers], width: int = 1) -> Callable[[int], Numbers]:
        """``evaluate`` with its numbers multiplied by the share; without examples there is no forward pass."""
        share = self.share
        if share == 1:
            return evaluate
        return lambda index: tuple(share * number for number in evaluate(index)) if share else (0.0,) * width


@dataclass
class _Direction:
    """The one direction in memory, shared by an objective and its siblings, and whose it is: (step, query)."""

    vector: Tensor
    key: tuple[int, int] | None = None
