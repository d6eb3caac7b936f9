"""The function an estimator may ask: loss values at displaced parameters, slopes along directions, or the gradient.

All evaluations of a step see the same function: the same mini-batch (the closure's business), the same dropout masks
(torch's generators are seeded per step) and the same buffers. Parameters are restored bit for bit afterwards, also when a
closure raises.

Where evaluations run is an ``Executor``'s business. It is given the number of evaluations and a function that makes one,
and returns all results in order: one process runs them all, several share them, and a log can replay them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, SupportsFloat

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zeroflow.optim import noise
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.noise import Directions

Closure = Callable[[], Tensor | float]
Numbers = tuple[float, ...]


class Executor(Protocol):
    """Runs the evaluations of a step. Every process that takes part calls it with the same arguments."""

    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        """``[evaluate(0), ..., evaluate(count - 1)]``, in this order.

        Args:
            count: how many. evaluate: makes one. width: how many numbers each gives; None: only evaluating it tells, and
                all give the same.
        """
        ...


class LocalExecutor:
    """Makes every evaluation here, one after the other."""

    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        return [evaluate(index) for index in range(count)]


class NonFiniteLoss(ArithmeticError):
    """Too many steps in a row without one finite loss. The parameters are those of the last good step."""


@dataclass(frozen=True)
class Shift:
    """A place to evaluate at: theta + scale * vector, where the vector is a query's direction or given.

    Attributes:
        scale: multiple of the vector; for a query it multiplies eps * z.
        query: number of the query whose direction is meant, or None where ``vector`` is given.
        vector: a displacement ``[d]`` that every process holds alike.
    """

    scale: float = 0.0
    query: int | None = None
    vector: Tensor | None = None


HERE = Shift()
"""No displacement: the parameters as they are."""


class Objective:
    """One step's function of the parameters, L(theta).

    Args:
        flat: the parameters. closure: returns the loss at the current parameters, without calling backward.
        eps: perturbation size, one number or a vector ``[d]`` where parameter groups differ.
        directions: of the queries. step: number of the step, which keys them.
        executor: where evaluations run. buffers: the model's, which evaluations must not move.
        per_example: whether a closure may give one loss for each example; their mean is then the loss.
        ask: calls a closure, ``ask(closure)``. memory: of the estimator, what only saves it work.
    """

    def __init__(
        self,
        flat: FlatParameters,
        closure: Closure,
        eps: float | Tensor,
        directions: Directions,
        step: int,
        executor: Executor,
        buffers: Buffers | None = None,
        per_example: bool = False,
        ask: Callable[[Closure], Tensor | float] | None = None,
        memory: dict[str, Any] | None = None,
    ) -> None:
        self.flat, self.closure, self.eps, self.step, self.executor = flat, closure, eps, step, executor
        self.directions, self.per_example = directions, per_example
        self.memory: dict[str, Any] = {} if memory is None else memory
        self.forwards = 0
        self.cache: dict[str, Any] = {}  # of the estimator, for this step
        self._ask = ask or (lambda closure: closure())
        self._base = flat.vector
        self._held = _Held(torch.empty_like(flat.vector))
        self._buffers = buffers or Buffers([])

    # What estimators ask.

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
            query: its number. step: of another step than this one.
        """
        key = (self.step if step is None else step, query)
        if self._held.key != key:
            self.directions.fill_(self._held.vector, *key)
            self._held.key = key
        return self._held.vector

    def combine(self, weights: dict[int, float], step: int | None = None) -> Tensor:
        """Sum over queries of weight * z, ``[d]``; directions are regenerated one at a time, in query order."""
        total = torch.zeros_like(self._base)
        for query in sorted(weights):
            total.add_(self.direction(query, step), alpha=weights[query])
        return total

    def losses(self, shifts: Sequence[Shift]) -> list[float]:
        """Loss at each shifted place, non-finite ones included; as many forward passes."""

        def evaluate(index: int) -> Numbers:
            with torch.no_grad():
                self.move(shifts[index])
                return (scalar(self.mean(self.call())),)

        return [loss for (loss,) in self.run(len(shifts), evaluate)]

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
                loss = self.mean(self.call())
                if not isinstance(loss, Tensor):
                    raise TypeError("closure: forward-mode differentiation needs a tensor loss, got a plain number")
                primal, slope = forward_ad.unpack_dual(loss)  # type: ignore[no-untyped-call]
                if slope is None:
                    raise TypeError(
                        "closure: the loss has no derivative with respect to the parameters (detached, .item(), accuracy?); "
                        "forward-mode differentiation needs one, zo-sgd does not"
                    )
                return scalar(primal), float(slope)

        return [(loss, slope) for loss, slope in self.run(queries, evaluate, width=2)]

    def gradient(self) -> tuple[float, list[Tensor | None]]:
        """(loss, gradient by parameter, None where it is not in the graph) by backpropagation.

        Nothing is left in ``param.grad``, and buffers move as in any forward pass.
        """
        with self._same_function(), torch.enable_grad():
            self._seed()
            loss = self.mean(self.closure())
            if not isinstance(loss, Tensor) or loss.grad_fn is None:
                raise TypeError("closure: a first-order optimizer needs a loss tensor that depends on the parameters")
            value = scalar(loss.detach())
            wanted = [p for p in self.flat.parameters if p.requires_grad]
            found = dict(zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True))
        self.forwards += 1
        return value, [found.get(p) for p in self.flat.parameters]

    def at(self, theta: Tensor) -> Objective:
        """The same function around another point ``[d]``; its forward passes are counted by its own ``forwards``."""
        other = object.__new__(Objective)
        other.__dict__.update(self.__dict__)
        other._base, other.forwards = theta, 0
        return other

    def of(self, closure: Closure) -> Objective:
        """Another function around the same point, with the same directions."""
        other = self.at(self._base)
        other.closure = closure
        return other

    # What estimators with evaluations of their own kind are made of.

    def run(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        """Have ``count`` evaluations made by the executor, and everything put back afterwards; see ``Executor.map``."""
        with self._same_function():
            results = self.executor.map(count, evaluate, width)
        self.forwards += count
        return results

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

    def call(self) -> Tensor | float:
        """The closure's own answer at the model's parameters, under this step's dropout masks; buffers do not move."""
        self._seed()
        with self._buffers.held():
            return self._ask(self.closure)

    def mean(self, answer: Tensor | float) -> Tensor | float:
        """A closure's answer with losses of single examples reduced to their mean."""
        several = self.per_example and isinstance(answer, Tensor) and answer.ndim == 1
        return answer.mean() if several and isinstance(answer, Tensor) else answer

    def settle(self) -> None:
        """Find out what buffers become when the mini-batch is seen once, at theta, as in a first-order step.

        They take those values with ``finish()``: until then all evaluations of the step see the same ones.
        """
        if self._buffers.moving:
            with self._same_function(), torch.no_grad(), self._buffers.remembered():
                self._seed()
                self.closure()
            self.forwards += 1

    def finish(self) -> None:
        """The step is over: let buffers have the values that ``settle()`` found."""
        self._buffers.release()

    def _seed(self) -> None:
        # Not torch.manual_seed: it also queues work for every CUDA device that was never started.
        seed, device = noise.closure_seed(self.directions.seed, self.step), self._base.device
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)

    @contextmanager
    def _same_function(self) -> Iterator[None]:
        devices = [self._base.device] if self._base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                self.flat.show()


class Buffers:
    """A model's buffers, such as batch norm's statistics: put back after every evaluation.

    Most never move. Those that did not in the first evaluation are not copied again.

    Args:
        tensors: all of them. still: identities of those known not to move, kept by the caller.
    """

    def __init__(self, tensors: Sequence[Tensor], still: set[int] | None = None) -> None:
        self._still = set() if still is None else still
        self._tensors = [t for t in tensors if id(t) not in self._still]
        self._settled: list[tuple[Tensor, Tensor]] = []
        self.moving = False

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """Put back what changes inside, and remember what it became."""
        before = [(tensor, tensor.clone()) for tensor in self._tensors]
        try:
            yield
            self._settled = [(tensor, tensor.clone()) for tensor in self._tensors]
        finally:
            for tensor, values in before:
                tensor.detach().copy_(values)

    def release(self) -> None:
        """Let the tensors have the remembered values."""
        for tensor, values in self._settled:
            tensor.detach().copy_(values)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put back what changes inside."""
        before = [(tensor, tensor.clone()) for tensor in self._tensors]
        try:
            yield
        finally:
            for tensor, values in before:
                # Version counters do not tell: batch norm moves its statistics behind them.
                if torch.equal(tensor, values):
                    self._still.add(id(tensor))
                else:
                    self.moving = True
                    tensor.detach().copy_(values)
            self._tensors = [t for t in self._tensors if id(t) not in self._still]


@dataclass
class _Held:
    """The one direction in memory, shared by an objective and its siblings, and whose it is: (step, query)."""

    vector: Tensor
    key: tuple[int, int] | None = None


def scalar(loss: Any) -> float:
    """A closure's answer as a number.

    Raises:
        TypeError: it is not one real number, or it carries an autograd graph.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise TypeError(f"closure: expected a scalar loss, got shape {tuple(loss.shape)}")
        if loss.requires_grad:
            raise TypeError("closure: the loss carries an autograd graph, which forward-only optimizers never need")
    elif getattr(loss, "size", 1) != 1:
        raise TypeError(f"closure: expected a scalar loss, got shape {getattr(loss, 'shape', '?')}")
    if isinstance(loss, str | bytes) or not (isinstance(loss, SupportsFloat) or hasattr(loss, "item")):
        raise TypeError(f"closure: expected a scalar loss, got {type(loss).__name__}")
    try:
        return float(loss.item() if hasattr(loss, "item") else loss)
    except OverflowError:
        return math.inf
    except TypeError:
        raise TypeError(f"closure: expected a real scalar loss, got {loss!r}") from None


def mean_finite(losses: Sequence[float]) -> float:
    """Mean of the finite ones; NaN where there is none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan
