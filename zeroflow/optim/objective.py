"""The function an estimator may ask: loss values at displaced parameters, slopes along directions, or the gradient.

All evaluations of a step see the same function: the same mini-batch (the closure's business) and the same dropout masks
(torch's generators are seeded per step). Parameters are restored bit for bit afterwards, also when a closure raises.

Where evaluations run is an ``Executor``'s business. It is given the number of evaluations and a function that makes one,
and returns all results in order: one process runs them all, several share them, and a log can replay them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zeroflow.optim import noise
from zeroflow.optim.flat import FlatParameters

Closure = Callable[[], Tensor | float]
Numbers = tuple[float, ...]


class Executor(Protocol):
    """Runs the evaluations of a step. Every process that takes part calls it with the same arguments."""

    def map(self, count: int, width: int, evaluate: Callable[[int], Numbers]) -> list[Numbers]:
        """``[evaluate(0), ..., evaluate(count - 1)]``, each of ``width`` numbers, in this order."""
        ...


class LocalExecutor:
    """Makes every evaluation here, one after the other."""

    def map(self, count: int, width: int, evaluate: Callable[[int], Numbers]) -> list[Numbers]:
        return [evaluate(index) for index in range(count)]


class NonFiniteLoss(ArithmeticError):
    """A closure returned NaN or infinity. The parameters have been restored."""


@dataclass(frozen=True)
class Shift:
    """A place to evaluate at: theta + scale * vector, where the vector is a query's direction or given.

    Attributes:
        scale: multiple of the vector; for a query it multiplies eps * z.
        query: number of the query whose direction is meant, or None where ``vector`` is given.
        vector: a displacement ``[d]`` that every process holds alike.
    """

    scale: float
    query: int | None = None
    vector: Tensor | None = None


class Objective:
    """One step's function of the parameters, L(theta).

    Args:
        flat: the parameters. closure: returns the loss at the current parameters, without calling backward.
        eps: perturbation size, one number or a vector ``[d]`` where parameter groups differ.
        seed, step: key of all randomness of this step. executor: where evaluations run.
    """

    def __init__(
        self, flat: FlatParameters, closure: Closure, eps: float | Tensor, seed: int, step: int, executor: Executor
    ) -> None:
        self.flat, self.closure, self.eps, self.seed, self.step, self.executor = (
            flat,
            closure,
            eps,
            seed,
            step,
            executor,
        )
        self.forwards = 0
        self._theta = flat.live.clone()
        self._scratch = torch.empty_like(flat.live)
        self._held: int | None = None

    def direction(self, query: int) -> Tensor:
        """z ``[d]`` of a query. The buffer is shared: it is valid until another query's direction is asked for."""
        if self._held != query:
            noise.gaussian_(self._scratch, self.seed, self.step, query)
            self._held = query
        return self._scratch

    def losses(self, shifts: Sequence[Shift]) -> list[float]:
        """Loss at each shifted place; as many forward passes."""

        def evaluate(index: int) -> Numbers:
            with torch.no_grad():
                self._move(shifts[index])
                return (self._scalar(self.closure()),)

        with self._same_function():
            results = self.executor.map(len(shifts), 1, evaluate)
        self.forwards += len(shifts)
        return [self._finite(loss) for (loss,) in results]

    def slopes(self, queries: int) -> list[tuple[float, float]]:
        """(loss, directional derivative along z) for each query by forward-mode differentiation; no graph is built."""

        def evaluate(query: int) -> Numbers:
            tangents = self.flat.views(self.direction(query))
            self._seed()
            # Fused attention has no forward-mode rule; the plain formula has.
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                for parameter, tangent in zip(self.flat.parameters, tangents, strict=True):
                    # In place on purpose: a closure sees the module's own parameters, whatever module that is.
                    parameter.copy_(forward_ad.make_dual(parameter.detach().clone(), tangent))  # type: ignore[no-untyped-call]
                loss = self.closure()
                if not isinstance(loss, Tensor):
                    raise TypeError("closure: forward-mode differentiation needs a tensor loss, got a plain number")
                primal, slope = forward_ad.unpack_dual(loss)  # type: ignore[no-untyped-call]
                return self._scalar(primal), 0.0 if slope is None else float(slope)

        with self._same_function():
            results = self.executor.map(queries, 2, evaluate)
        self.forwards += queries
        return [(self._finite(loss), self._finite(slope)) for loss, slope in results]

    def gradient(self) -> tuple[float, Tensor]:
        """(loss, gradient ``[d]``) by backpropagation. Nothing is left in ``param.grad``."""
        with self._same_function(), torch.enable_grad():
            self._seed()
            loss = self.closure()
            if not isinstance(loss, Tensor) or loss.grad_fn is None:
                raise TypeError("closure: a first-order optimizer needs a loss tensor that depends on the parameters")
            value = self._finite(self._scalar(loss.detach()))
            parts = torch.autograd.grad(loss, self.flat.parameters, allow_unused=True)
        pieces = [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for g, p in zip(parts, self.flat.parameters, strict=True)
        ]
        self.forwards += 1
        return value, torch.cat(pieces)

    def _move(self, shift: Shift) -> None:
        self._seed()
        if shift.query is None:
            vector = self._theta if shift.vector is None else shift.vector
            scale = 0.0 if shift.vector is None else shift.scale
            torch.add(self._theta, vector, alpha=scale, out=self.flat.live)
        elif isinstance(self.eps, Tensor):
            torch.addcmul(self._theta, self.direction(shift.query), self.eps, value=shift.scale, out=self.flat.live)
        else:
            torch.add(self._theta, self.direction(shift.query), alpha=shift.scale * self.eps, out=self.flat.live)

    def _seed(self) -> None:
        # Not torch.manual_seed: it also queues work for every CUDA device that was never started.
        seed, device = noise.closure_seed(self.seed, self.step), self.flat.live.device
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)

    @contextmanager
    def _same_function(self) -> Iterator[None]:
        devices = [self.flat.live.device] if self.flat.live.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                with torch.no_grad():
                    self.flat.live.copy_(self._theta)

    @staticmethod
    def _scalar(loss: Tensor | float) -> float:
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise TypeError(f"closure: expected a scalar loss, got shape {tuple(loss.shape)}")
            if loss.requires_grad:
                raise TypeError("closure: the loss carries an autograd graph, which forward-only optimizers never need")
        return float(loss)

    @staticmethod
    def _finite(value: float) -> float:
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the closure returned {value}; lower lr or eps, or check the data")
        return value
