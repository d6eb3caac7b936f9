"""How the evaluations of one step are made: all see the same function, and everything is put back afterwards.

The same function: the same mini-batch (the closure's business), the same dropout masks (the global generators of torch, NumPy
and Python are seeded per step; the caller's numbers go on afterwards) and the same buffers. Nothing that torch has cached of the
parameters outlives an evaluation. Parameters are restored bit for bit, also when a closure raises.

Where evaluations run is an ``Executor``'s business.
"""

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

from zeroflow.optim.buffers import Buffers
from zeroflow.optim.closure import Closure, Part, scalar
from zeroflow.optim.executor import Executor, Numbers, PeerError
from zeroflow.optim.explain import explained
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.precision import AskAgain
from zeroflow.optim.surroundings import Surroundings, forget_copies

GRADIENT = (
    "exact gradient",
    "without shards all processes must look at the same mini-batch; DistributedExecutor(shards=N) adds up N parts of one",
)
"""What processes that share the work without sharing mini-batches must agree in; see ``Executor.agree``."""


class Evaluator:
    """Calls closures on one model in one step.

    Args:
        flat: the model's parameters.
        executor: where evaluations run.
        seed: of dropout masks and whatever else a closure draws.
        buffers: the model's, which evaluations must not move; default: it has none.
        around: what the caller has switched on, for closures.
        ask: calls a closure, ``ask(closure)``; it raises ``AskAgain`` where it has to be asked once more.
    """

    def __init__(
        self,
        flat: FlatParameters,
        executor: Executor,
        seed: int = 0,
        *,
        buffers: Buffers | None = None,
        around: Surroundings | None = None,
        ask: Callable[[Closure], Tensor | float] | None = None,
    ) -> None:
        self.flat, self.executor, self.buffers = flat, executor, buffers or Buffers([])
        self._seed, self._around = seed, around or Surroundings()
        self._ask = ask or (lambda closure: closure())

    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        """Have ``count`` evaluations made by the executor, and everything put back afterwards; see ``Executor.map``."""
        with self.same_function():
            return self.executor.map(count, evaluate, width)

    def call(self, closure: Closure, differentiates: bool = False) -> Tensor | float:
        """The closure's answer at the model's parameters as they are; buffers do not move."""
        while True:
            with (
                suppress(AskAgain),
                _only_thread(),
                explained(),
                self._around.entered(differentiates),
                self.buffers.restored(),
            ):
                self.seed()
                return self._ask(closure)

    def settle(self, part: Part) -> bool:
        """Find out what buffers become when the mini-batch is seen once, as in a first-order step; see ``finish``.

        Of shards' values it is the weighted mean, where they are not integers: those are of the first shard.

        Returns:
            Whether that took a forward pass: not where no evaluation of this step has moved any.
        """
        buffers = self.buffers

        def evaluate(index: int) -> Numbers:
            if not part.share:
                return ()
            if buffers.seen_still and self.executor.shards == 1:
                return buffers.still
            with torch.no_grad(), self._around.entered(), buffers.remembered():
                self.seed()
                part.closure()
            return buffers.numbers(part.share, part.has_first)

        # An evaluation like any other: processes that had none of this step's own learn what moves, and so does a replay.
        (found,) = self.map(1, evaluate, None)
        return buffers.take(found) or len(found) > len(buffers.still)

    def finish(self) -> None:
        """The step is over: let buffers have the values that ``settle`` found; until then all evaluations saw the old ones."""
        with self._around.entered():
            self.buffers.release()

    def gradient(
        self, part: Part, mean: Callable[[Tensor | float], Tensor | float]
    ) -> tuple[float, list[Tensor | None]]:
        """(loss, gradient by parameter, None where it is in no graph) by backpropagation at the parameters as they are.

        Nothing is left in ``param.grad``, and buffers move as in any forward pass.

        Args:
            part: the closure, and what it looks at.
            mean: makes one loss of the closure's answer.
        """
        found = self._shared_gradient(part, mean) if self.executor.shards > 1 else self._own_gradient(part, mean)
        self.buffers.settled = True
        return found

    def _own_gradient(
        self, part: Part, mean: Callable[[Tensor | float], Tensor | float]
    ) -> tuple[float, list[Tensor | None]]:
        with self.same_function(), torch.enable_grad():
            self.seed()
            with self._around.entered(differentiates=True):
                loss = mean(part.closure())
            if not isinstance(loss, Tensor) or loss.grad_fn is None:
                raise TypeError("closure: a first-order optimizer needs a loss tensor that depends on the parameters")
            value = scalar(loss.detach())
            wanted = [p for p in self.flat.parameters if p.requires_grad]
            with explained():
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            found = {p: None if g is None else g.to_dense() for p, g in zip(wanted, gradients, strict=True)}
        if self.executor.groups > 1 and self.executor.shards == 1:
            sums = [value, *(0.0 if g is None else float(g.sum(dtype=torch.float64)) for g in found.values())]
            self.executor.agree(np.array(sums).tobytes(), *GRADIENT)
        return value, [found.get(p) for p in self.flat.parameters]

    def _shared_gradient(
        self, part: Part, mean: Callable[[Tensor | float], Tensor | float]
    ) -> tuple[float, list[Tensor | None]]:
        """The shards' gradients, weighted: one sum of a few numbers, one of the flat gradient."""
        share, flat, buffers = part.share, self.flat, self.buffers
        loss, moved = 0.0, buffers.still
        gradients: list[Tensor | None] = [None] * len(flat.parameters)
        failure: Exception | None = None
        try:
            if share:
                with buffers.remembered():
                    loss, gradients = self._own_gradient(part, mean)
                moved = buffers.numbers(share, part.has_first)
        except Exception as error:
            failure = error  # the others wait for an answer: tell them, then raise
        facts = torch.zeros(2 + len(gradients) + buffers.width, dtype=torch.float64)
        own = (float(failure is not None), share * loss, *(float(one is not None) for one in gradients), *moved)
        facts[: len(own)] = torch.tensor(own, dtype=torch.float64)
        failed, loss, *rest = self.executor.total(facts).tolist()
        if failure is not None:
            raise failure
        if failed:
            raise PeerError("the gradient failed in another process; its own log says how")
        buffers.take(rest[len(gradients) :])
        whole = torch.zeros_like(flat.vector)
        for one, view in zip(gradients, flat.views(whole), strict=True):
            if one is not None:
                view.copy_(one).mul_(share)
        used = rest[: len(gradients)]
        views = flat.views(self.executor.total(whole))
        return loss, [view if graphs else None for view, graphs in zip(views, used, strict=True)]

    def seed(self) -> None:
        """Let the global generators draw what they draw in every evaluation of this step."""
        # Not torch.manual_seed: it also queues work for every CUDA device that was never started.
        device = self.flat.vector.device
        torch.default_generator.manual_seed(self._seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(self._seed)
        random.seed(self._seed)
        np.random.seed(self._seed % 2**32)

    @contextmanager
    def same_function(self) -> Iterator[None]:
        """Put the parameters and the caller's random numbers back after what is evaluated inside."""
        device = self.flat.vector.device
        forget_copies()
        python, numpy = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                yield
            finally:
                random.setstate(python)
                np.random.set_state(numpy)
                self.flat.show()


_inside: list[int] = []
"""Threads that evaluate now."""


@contextmanager
def _only_thread() -> Iterator[None]:
    """Warn where another thread evaluates at the same time: both seed the generators that all threads of a process share."""
    own = threading.get_ident()
    _inside.append(own)
    try:
        if any(other != own for other in _inside):
            warnings.warn(
                "two threads of this process make steps at the same time. If their closures draw random numbers (dropout), evaluations "
                "of a step may see different ones, and slopes are wrong: make one step at a time, or take a process for each optimizer",
                stacklevel=4,
            )
        yield
    finally:
        _inside.remove(own)


os.register_at_fork(after_in_child=_inside.clear)  # threads of the parent do not go on in a child
