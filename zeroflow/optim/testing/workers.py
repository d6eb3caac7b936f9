"""Executors for tests: evaluations in another order, more than once, or shared by workers that take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from zeroflow.optim.executor import Executor, Numbers

T = TypeVar("T")


class Backwards(Executor):
    """Runs the evaluations in reverse order."""

    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        return [evaluate(index) for index in reversed(range(count))][::-1]


class Twice(Executor):
    """Runs all evaluations twice, and returns the second results."""

    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        for index in range(count):
            evaluate(index)
        return [evaluate(index) for index in range(count)]


class Worker(Executor):
    """One of ``size`` workers that share every step's evaluations, each with its own model and optimizer.

    Args:
        rank: of this worker.
        size: number of workers.
        together: collects their results.
    """

    def __init__(self, rank: int, size: int, together: _Meeting) -> None:
        self.rank, self.size, self._together, self._round = rank, size, together, 0

    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        # Every second step in strides instead of blocks: results must not depend on who evaluates what.
        if self._round % 2:
            share = range(self.rank, count, self.size)
        else:
            share = range(count * self.rank // self.size, count * (self.rank + 1) // self.size)
        results = self._together.exchange(self._round, {index: evaluate(index) for index in share})
        self._round += 1
        return [results[index] for index in range(count)]


class _Meeting:
    """Collects the results of the workers in a round. Only one of them runs at a time: they share torch's generators."""

    def __init__(self, size: int) -> None:
        self.turn, self._all_here = threading.Lock(), threading.Barrier(size)
        self._rounds: dict[int, dict[int, Numbers]] = {}

    def exchange(self, number: int, found: dict[int, Numbers]) -> dict[int, Numbers]:
        self._rounds.setdefault(number, {}).update(found)
        self.turn.release()
        try:
            self._all_here.wait(timeout=10)
        finally:
            self.turn.acquire()
        return self._rounds[number]

    def leave(self) -> None:
        """Release all workers that wait for one that has failed."""
        self._all_here.abort()


def share(size: int, job: Callable[[Worker], T]) -> list[T]:
    """``job(worker)`` of each of ``size`` workers, at the same time; what each returns.

    Raises:
        Exception: of the first job that failed.
    """
    together = _Meeting(size)
    results: dict[int, T] = {}
    errors: list[Exception] = []

    def run(rank: int) -> None:
        with together.turn:
            try:
                results[rank] = job(Worker(rank, size, together))
            except Exception as error:
                errors.append(error)
                together.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [results[rank] for rank in range(size)]
