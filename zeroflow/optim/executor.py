"""Executors run the evaluations of a step.

An ``Executor`` takes the number of evaluations and a function for a single one, and returns all results in order: one process
runs them all, several share them, or a log replays them. Processes may also share the mini-batch: each evaluates the loss on
its own slice, and the executor sums the results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

Numbers = tuple[float, ...]


Together = Callable[[Sequence[int], Callable[[int], Numbers]], list[Numbers]]


class PeerError(RuntimeError):
    """Another process that shares the work has failed or exited; its own error says why."""


class Executor(ABC):
    """Runs the evaluations of a step. Every process that takes part calls its methods in the same order, with the same counts.

    Attributes:
        rank: number of this process; process 0 writes files.
        shards: number of slices of a mini-batch.
        shard: index of this process's slice.
        groups: number of process groups that divide the evaluations, each with all slices.
    """

    rank: int = 0
    shards: int = 1
    shard: int = 0
    groups: int = 1

    together: Together | None = None
    """What makes this process's own evaluations of a step, where they are to share something; default: one after the other."""

    def make(self, indices: Sequence[int], evaluate: Callable[[int], Numbers]) -> list[Numbers]:
        """``[evaluate(i) for i in indices]``, made in this process."""
        return [evaluate(index) for index in indices] if self.together is None else self.together(indices, evaluate)

    @abstractmethod
    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        """``[evaluate(0), ..., evaluate(count - 1)]``, in this order, each summed over the shards.

        Args:
            count: number of evaluations.
            evaluate: makes one evaluation.
            width: how many numbers an evaluation returns; None: unknown before the first, the same for all, or none where a
                shard has nothing to add.
        """

    def broadcast(self, content: bytes) -> bytes:
        """Broadcast the value of process 0 to all processes."""
        return content

    def agree(self, content: bytes, what: str, hint: str) -> None:
        """Check that all processes have the same content.

        Args:
            content: to be compared.
            what: it is.
            hint: how processes come to agree.

        Raises:
            ValueError: this process has another one than process 0.
        """
        if self.broadcast(content) != content:
            raise ValueError(f"process {self.rank} differs from process 0 in its {what}; {hint}")

    def total(self, vector: Tensor) -> Tensor:
        """Sum over the shards of ``vector`` ``[n]``, which may be modified in place; the same bits in all processes."""
        return vector

    def slice(self, samples: int) -> slice:
        """This process's slice of a mini-batch of so many samples. The first shard has at least one."""
        first, last = (-(-samples * shard // self.shards) for shard in (self.shard, self.shard + 1))
        return slice(first, last)


class LocalExecutor(Executor):
    """Makes every evaluation here, one after the other."""

    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        return self.make(range(count), evaluate)
