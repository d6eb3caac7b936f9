"""What a caller gives to a step: a closure, or its part of a mini-batch that processes share, and how answers become numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from torch import Tensor

from zeroflow.optim.executor import Executor

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


def several(full: Sequence[Closure]) -> Sequence[Closure]:
    """Closures that can be gone through at every snapshot.

    Raises:
        TypeError: they are an iterator, which would be empty the second time, or no closures.
    """
    if not isinstance(full, Sequence) or not all(map(callable, full)):
        raise TypeError(f"step: full={type(full).__name__}: expected a list of closures, one for each mini-batch")
    return full


@dataclass(frozen=True)
class Part:
    """Which part of a mini-batch a closure looks at in this process.

    A ``Slice`` says it; any other closure looks at one of equally large parts, one for each shard.

    Attributes:
        closure: what looks.
        executor: into how many shards mini-batches are cut.
    """

    closure: Closure
    executor: Executor

    @property
    def share(self) -> float:
        """How much of the mini-batch it is, 0 to 1; the shards' shares add up to 1."""
        if self.executor.shards == 1:
            return 1.0
        return self.closure.share if isinstance(self.closure, Slice) else 1 / self.executor.shards

    def own(self, samples: int) -> slice:
        """Which examples of a mini-batch of so many it is."""
        if self.executor.shards > 1 and isinstance(self.closure, Slice):
            return slice(self.closure.start, self.closure.stop)
        each = samples // self.executor.shards
        return slice(each * self.executor.shard, each * (self.executor.shard + 1))

    def whole(self, examples: int) -> int:
        """How many examples the mini-batch has of which this part has so many."""
        if self.executor.shards > 1 and isinstance(self.closure, Slice):
            return self.closure.samples
        return examples * self.executor.shards

    @property
    def samples(self) -> int | None:
        """How many examples the mini-batch has, where the closure says it."""
        return self.closure.samples if isinstance(self.closure, Slice) else None

    @property
    def has_first(self) -> bool:
        """Whether the mini-batch's first example is in it."""
        return self.own(self.executor.shards).start == 0


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
