"""What a trial costs: seconds with the device synchronised, and the peak of live tensor bytes of a training step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


class Stopwatch:
    """Adds up the seconds spent inside ``with stopwatch.running()``; waits for the device at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.seconds += self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass
class Tally:
    """What was measured of a task's steps, by whether they have an exact gradient; an interrupted task goes on with it.

    Attributes:
        peaks: the peak memory of a step, bytes; each is measured in one step, whose seconds mean nothing.
        timed: how many steps were timed, and their seconds.
    """

    peaks: dict[bool, int] = field(default_factory=dict)
    timed: dict[bool, tuple[int, float]] = field(default_factory=dict)

    def add(self, exact: bool, seconds: float) -> None:
        """Count a step that was timed."""
        count, before = self.timed.get(exact, (0, 0.0))
        self.timed[exact] = count + 1, before + seconds

    def seconds(self, kinds: Iterable[bool]) -> float | None:
        """Seconds of steps of these kinds, one that was not timed as the mean of its kind; None where none of a kind was."""
        wanted = Counter(kinds)
        if not wanted.keys() <= self.timed.keys():
            return None
        return sum(number * self.timed[kind][1] / self.timed[kind][0] for kind, number in wanted.items())


def peak_memory(
    work: Callable[[], T], model: nn.Module, device: torch.device, *, held: Iterable[torch.Tensor] = ()
) -> tuple[T, int]:
    """Run ``work`` and give its result with the peak of live tensor bytes meanwhile.

    On CUDA it is the allocator's own peak: every tensor that the process has on the device, in the allocator's blocks,
    without the context and without freed blocks kept for later. On a CPU it is the bytes of the model and of ``held`` plus
    the peak of what ``work`` had at once, from torch's profiler: the size of the process would count libraries and freed
    memory too. So ``held`` names all else that is in use: what an optimizer keeps, and the mini-batch.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return work(), torch.cuda.max_memory_allocated(device)
    storages = {
        storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in [*_tensors(model), *held])
    }
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profiler:
        result = work()
    live = peak = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return result, sum(storages.values()) + peak


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
