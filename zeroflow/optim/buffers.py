"""A model's buffers during the evaluations of a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from zeroflow.optim.executor import Numbers


class Buffers:
    """A model's buffers, such as batch norm's statistics: restored after every evaluation, updated once a step.

    Most never change. Those that did not change in the first step are not copied again.

    Args:
        tensors: all buffers.
        still: identities of those known not to change, the same in all processes; kept by the caller.

    Attributes:
        settled: whether their values after this step are known.
    """

    def __init__(self, tensors: Sequence[Tensor], still: set[int] | None = None) -> None:
        self._still = set() if still is None else still
        self._tensors = [t for t in tensors if id(t) not in self._still]
        self._moving: list[Tensor] | None = None  # in this step's first evaluation
        self._after: list[tuple[Tensor, Tensor]] = []
        self._moved: list[bool] = []
        self.settled = not self._tensors

    @property
    def seen_still(self) -> bool:
        """Whether an evaluation in this process changed none."""
        return self._moving == []

    @property
    def still(self) -> Numbers:
        """The ``numbers`` of buffers that did not move."""
        return (0.0,) * len(self._tensors)

    @property
    def width(self) -> int:
        """How many ``numbers`` there are at most."""
        return len(self._tensors) + sum(len(_real(t)) for t in self._tensors)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore buffers that change inside."""
        before = [(t, t.clone()) for t in (self._tensors if self._moving is None else self._moving)]
        try:
            yield
            if self._moving is None:
                # Version counters do not tell: batch norm moves its statistics behind them.
                self._moving = [tensor for tensor, values in before if not torch.equal(tensor, values)]
        finally:
            for tensor, values in before:
                tensor.detach().copy_(values)

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """Restore buffers that change inside, and record their new values."""
        before = [(tensor, tensor.clone()) for tensor in self._tensors]
        try:
            yield
            self._after = [(tensor, tensor.clone()) for tensor in self._tensors]
            self._moved = [not torch.equal(tensor, values) for tensor, values in before]
        finally:
            for tensor, values in before:
                tensor.detach().copy_(values)

    def numbers(self, share: float, first: bool) -> Numbers:
        """The recorded values, to be summed over shards for ``take``: which ones changed, then all values.

        Args:
            share: this shard's share of the mini-batch.
            first: whether integers are taken from this shard.
        """
        weights = [share if not _integral(tensor) else float(first) for tensor, _ in self._after]
        values = [(_real(after) * weight).tolist() for (_, after), weight in zip(self._after, weights, strict=True)]
        return (*map(float, self._moved), *itertools.chain.from_iterable(values))

    def take(self, numbers: Sequence[float]) -> bool:
        """Record the sum over all shards; returns whether anything changed."""
        moved, values = numbers[: len(self._tensors)], torch.tensor(numbers[len(self._tensors) :], dtype=torch.float64)
        self._after, self.settled, place = [], True, 0
        for tensor, flag in zip(self._tensors, moved, strict=True):
            size = len(_real(tensor))
            if flag:
                after = torch.empty_like(tensor)
                (torch.view_as_real(after) if after.is_complex() else after).view(-1).copy_(
                    values[place : place + size]
                )
                self._after.append((tensor, after))
            else:
                self._still.add(id(tensor))
            place += size
        return bool(self._after)

    def release(self) -> None:
        """Set the buffers to the recorded values."""
        for tensor, values in self._after:
            tensor.detach().copy_(values)


def _integral(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _real(tensor: Tensor) -> Tensor:
    """A tensor's real numbers, float64 ``[n]`` on the CPU."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return real.reshape(-1).to("cpu", torch.float64)
