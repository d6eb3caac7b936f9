"""The function an estimator may ask: loss values at displaced parameters, slopes along directions, or the gradient.

All evaluations of a step see the same function: the same mini-batch (the closure's business), the same dropout masks
(the global generators of torch, NumPy and Python are seeded per step; the caller's numbers go on afterwards) and the same
buffers. Nothing that torch has cached of the parameters outlives one. Parameters are restored bit for bit afterwards, also when a
closure raises.

Where evaluations run is an ``Executor``'s business.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zeroflow.optim import noise
from zeroflow.optim.buffers import Buffers
from zeroflow.optim.executor import Executor, Numbers, PeerError
from zeroflow.optim.explain import explained
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.noise import Directions
from zeroflow.optim.surroundings import Surroundings, forget_copies

Closure = Callable[[], Tensor | float]


@dataclass(frozen=True)
class Slice:
    """A closure that looks at examples ``start`` to ``stop`` (exclusive) of a mini-batch of ``samples``.

    The ``closure`` gives their mean loss (or their losses, where the optimizer is ``per_example``). The other examples are
    other processes' (``Executor.slice``): together they have each example once. A closure without examples is never called.

    Raises:
        ValueError: there is no such slice.
    """

    closure: Closure
    start: int
    stop: int
    samples: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.samples or not self.samples:
            raise ValueError(
                f"Slice: expected 0 <= start <= stop <= samples, got {self.start}, {self.stop}, {self.samples}"
            )

    def __call__(self) -> Tensor | float:
        return self.closure()

    @property
    def share(self) -> float:
        """Its part of the mini-batch, 0 to 1."""
        return (self.stop - self.start) / self.samples


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

    Where processes share the mini-batch, the closure is a ``Slice`` and counts by its share of the examples; any other
    closure counts as one of equally large slices. Forward passes are counted in whole mini-batches.

    Args:
        flat: the parameters. closure: returns the loss at the current parameters, without calling backward.
        eps: perturbation size, one number or a vector ``[d]`` where parameter groups differ.
        directions: of the queries. step: number of the step, which keys them.
        executor: where evaluations run. buffers: the model's, which evaluations must not move.
        per_example: whether a closure may give one loss for each example; their mean is then the loss.
        ask: calls a closure, ``ask(closure)``. memory: of the estimator, what only saves it work.
        state: of the estimator, kept from step to step and part of the optimizer's state; plain numbers and tensors.
        around: what the caller has switched on, for the closure.
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
        state: dict[str, Any] | None = None,
        around: Surroundings | None = None,
    ) -> None:
        self.flat, self.closure, self.eps, self.step, self.executor = flat, closure, eps, step, executor
        self.directions, self.per_example = directions, per_example
        self.memory: dict[str, Any] = {} if memory is None else memory
        self.state: dict[str, Any] = {} if state is None else state
        self.forwards = 0
        self.cache: dict[str, Any] = {}  # of the estimator, for this step
        self._around = around or Surroundings()
        self._ask = ask or (lambda closure: closure())
        self._base = flat.vector
        self._held = _Held(torch.empty_like(flat.vector))
        self._buffers = buffers or Buffers([])

    # What estimators ask.

    @property
    def share(self) -> float:
        """Part of the mini-batch that the closure looks at, 0 to 1; the shards' shares add up to 1."""
        if self.executor.shards == 1:
            return 1.0
        return self.closure.share if isinstance(self.closure, Slice) else 1 / self.executor.shards

    def own(self, samples: int) -> slice:
        """Which examples of a mini-batch of so many the closure looks at."""
        if self.executor.shards > 1 and isinstance(self.closure, Slice):
            return slice(self.closure.start, self.closure.stop)
        each = samples // self.executor.shards
        return slice(each * self.executor.shard, each * (self.executor.shard + 1))

    def whole(self, examples: int) -> int:
        """How many examples the mini-batch has of which the closure looks at so many."""
        if self.executor.shards > 1 and isinstance(self.closure, Slice):
            return self.closure.samples
        return examples * self.executor.shards

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
        """(loss, gradient by parameter, None where it is in no graph) by backpropagation.

        Nothing is left in ``param.grad``, and buffers move as in any forward pass.
        """
        found = self._shared_gradient() if self.executor.shards > 1 else self._own_gradient()
        self._buffers.settled = True
        self.forwards += 1
        return found

    def _own_gradient(self) -> tuple[float, list[Tensor | None]]:
        with self._same_function(), torch.enable_grad():
            self._seed()
            with self._around.entered(differentiates=True):
                loss = self.mean(self.closure())
            if not isinstance(loss, Tensor) or loss.grad_fn is None:
                raise TypeError("closure: a first-order optimizer needs a loss tensor that depends on the parameters")
            value = scalar(loss.detach())
            wanted = [p for p in self.flat.parameters if p.requires_grad]
            with explained():
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            found = {p: None if g is None else g.to_dense() for p, g in zip(wanted, gradients, strict=True)}
        return value, [found.get(p) for p in self.flat.parameters]

    def _shared_gradient(self) -> tuple[float, list[Tensor | None]]:
        """The shards' gradients, weighted: one sum of a few numbers, one of the flat gradient."""
        share, flat, buffers = self.share, self.flat, self._buffers
        loss, moved = 0.0, buffers.still
        parts: list[Tensor | None] = [None] * len(flat.parameters)
        failure: Exception | None = None
        try:
            if share:
                with buffers.remembered():
                    loss, parts = self._own_gradient()
                moved = buffers.numbers(share, self._has_first)
        except Exception as error:
            failure = error  # the others wait for an answer: tell them, then raise
        facts = torch.zeros(2 + len(parts) + buffers.width, dtype=torch.float64)
        own = (float(failure is not None), share * loss, *(float(part is not None) for part in parts), *moved)
        facts[: len(own)] = torch.tensor(own, dtype=torch.float64)
        failed, loss, *rest = self.executor.total(facts).tolist()
        if failure is not None:
            raise failure
        if failed:
            raise PeerError("the gradient failed in another process; its own log says how")
        buffers.take(rest[len(parts) :])
        whole = torch.zeros_like(flat.vector)
        for part, view in zip(parts, flat.views(whole), strict=True):
            if part is not None:
                view.copy_(part).mul_(share)
        used = rest[: len(parts)]
        return loss, [
            view if graphs else None for view, graphs in zip(flat.views(self.executor.total(whole)), used, strict=True)
        ]

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
        """Have ``count`` evaluations made by the executor, and everything put back afterwards; see ``Executor.map``.

        What shards give is added up, so an evaluation weighs its numbers by ``share`` where they are means.
        """
        with self._same_function():
            results = self.executor.map(count, evaluate, width)
        self.forwards += count
        return results

    @contextmanager
    def shown(self, shift: Shift) -> Iterator[None]:
        """The model's parameters are those at ``shift`` inside, and dropout draws what it draws in every evaluation."""
        with self._same_function(), self._buffers.held():
            with torch.no_grad():
                self.move(shift)
            self._seed()
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

    def call(self, differentiates: bool = False) -> Tensor | float:
        """The closure's own answer at the model's parameters, under this step's dropout masks; buffers do not move."""
        self._seed()
        with explained(), self._around.entered(differentiates), self._buffers.held():
            return self._ask(self.closure)

    def mean(self, answer: Tensor | float) -> Tensor | float:
        """A closure's answer with losses of single examples reduced to their mean."""
        several = self.per_example and isinstance(answer, Tensor) and answer.ndim == 1
        return answer.mean() if several and isinstance(answer, Tensor) else answer

    def settle(self) -> None:
        """Find out what buffers become when the mini-batch is seen once, at theta, as in a first-order step.

        They take those values with ``finish()``: until then all evaluations of the step see the same ones. Of shards'
        values it is the weighted mean, where they are not integers: those are of the first shard.
        """
        buffers = self._buffers
        if buffers.settled or isinstance(self.closure, Elsewhere):
            return

        def evaluate(index: int) -> Numbers:
            if not self.share:
                return ()
            if buffers.seen_still and self.executor.shards == 1:
                return buffers.still
            with torch.no_grad(), self._around.entered(), buffers.remembered():
                self._seed()
                self.closure()
            return buffers.numbers(self.share, self._has_first)

        # An evaluation like any other: processes that had none of this step's own learn what moves, and so does a replay.
        with self._same_function():
            (found,) = self.executor.map(1, evaluate, None)
        self.forwards += buffers.take(found)

    def finish(self) -> None:
        """The step is over: let buffers have the values that ``settle()`` found."""
        with self._around.entered():
            self._buffers.release()

    def _weighted(self, evaluate: Callable[[int], Numbers], width: int = 1) -> Callable[[int], Numbers]:
        """``evaluate`` with its numbers multiplied by the share; without examples there is no forward pass."""
        share = self.share
        if share == 1:
            return evaluate
        return lambda index: tuple(share * number for number in evaluate(index)) if share else (0.0,) * width

    @property
    def _has_first(self) -> bool:
        """Whether the closure looks at the mini-batch's first example."""
        return self.own(self.executor.shards).start == 0

    def _seed(self) -> None:
        # Not torch.manual_seed: it also queues work for every CUDA device that was never started.
        seed, device = noise.closure_seed(self.directions.seed, self.step, self.executor.shard), self._base.device
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    @contextmanager
    def _same_function(self) -> Iterator[None]:
        devices = [self._base.device] if self._base.device.type == "cuda" else []
        forget_copies()
        drawn = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                random.setstate(drawn[0])
                np.random.set_state(drawn[1])
                self.flat.show()


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
