"""The mini-batches of one task in the order of its steps, made ahead of them in threads."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from zeroflow.data.ahead import prefetched

Positions = npt.NDArray[np.int64]
Order = Callable[[int], Positions]
T = TypeVar("T")


class Loader(Generic[T]):
    """Mini-batches of a task; none is made before the first one is asked for, which need not be the task's first.

    So steps that are replayed from a log, which ask for nothing, cost no images.

    Args:
        order: of the samples in an epoch.
        epochs: of the task.
        batch_size: samples; the last ones of an epoch may be fewer.
        maker: ``maker(epoch, number, positions)`` gives what makes a mini-batch. It is called in the consumer's thread, some
            steps ahead; what it gives is called in any thread, and depends on nothing that changes meanwhile.
        threads: that make mini-batches ahead; 0: each is made when it is asked for.
    """

    def __init__(
        self,
        order: Order,
        epochs: int,
        batch_size: int,
        maker: Callable[[int, int, Positions], Callable[[], T]],
        threads: int,
    ) -> None:
        self.order, self.epochs, self.batch_size, self.maker, self.threads = order, epochs, batch_size, maker, threads
        self._ahead: Generator[T, None, None] | None = None

    def epoch(self, epoch: int) -> Iterator[tuple[int, Positions]]:
        """Numbers and samples of an epoch's mini-batches."""
        positions = self.order(epoch)
        for number, first in enumerate(range(0, len(positions), self.batch_size)):
            yield number, positions[first : first + self.batch_size]

    def due(self, epoch: int, number: int) -> T:
        """A mini-batch, once. After the first one that was asked for, all are asked for in turn."""
        if self._ahead is None:
            self._ahead = prefetched(self._makers(epoch, number), self.threads)
        return next(self._ahead)

    def _makers(self, first: int, begin: int) -> Iterator[Callable[[], T]]:
        for epoch in range(first, self.epochs):
            for number, positions in self.epoch(epoch):
                if epoch > first or number >= begin:
                    yield self.maker(epoch, number, positions)

    def close(self) -> None:
        """End the threads; what they were making is dropped."""
        if self._ahead is not None:
            self._ahead.close()
