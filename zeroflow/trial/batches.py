"""The mini-batches of one task: which samples, what of earlier tasks joins them, and the random numbers of both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from zeroflow.data.scenario import View
from zeroflow.methods import Method, MiniBatch
from zeroflow.trial import randomness
from zeroflow.trial.loading import Order, Positions

Make = Callable[[], list[Tensor]]
"""Makes the tensors of a ``MiniBatch`` on the CPU, in any thread."""


@dataclass(frozen=True, eq=False)
class TaskBatches:
    """The mini-batches of one task, whole ones: no image depends on how many processes share them.

    Attributes:
        method: says what of earlier tasks joins a mini-batch.
        samples: to train on.
        order: of the samples in an epoch.
        batch_size: samples of a mini-batch; the last ones of an epoch may be fewer.
        task: its number.
        seed: of all randomness.
        stream: all training samples so far, for methods that replay some of them by their position.
    """

    method: Method
    samples: View
    order: Order
    batch_size: int
    task: int
    seed: int
    stream: View | None = None

    def make_training(self, epoch: int, number: int, positions: Positions) -> Make:
        """Say how to make a mini-batch of an epoch, under the training transform."""
        return self._make(positions, randomness.AUGMENTATION, self.task, epoch, number)

    def snapshot(self) -> Iterator[tuple[int, Callable[[], list[Tensor]]]]:
        """Go through the whole task once: the samples of each mini-batch, and what makes it, anew at every call.

        In the samples' own order, class by class; where the loss compares them with each other, in that of the first epoch.
        """
        headless, count = self.method.criterion.headless, len(self.samples)
        everything = self.order(0) if headless else np.arange(count)
        for first in range(0, count, self.batch_size):
            positions = everything[first : first + self.batch_size]
            yield len(positions), functools.partial(self._make_snapshot, positions, first)

    def _make_snapshot(self, positions: Positions, first: int) -> list[Tensor]:
        return self._make(positions, randomness.SNAPSHOT, self.task, first)()

    def _make(self, positions: Positions, *words: int) -> Make:
        """What makes a mini-batch; ``seed`` and ``words`` key its random draws.

        What is replayed is drawn at once: a method is never asked in another thread.
        """
        generator = randomness.generator(self.seed, randomness.REPLAY, *words)
        replayed = self.method.replay(len(positions), generator)
        drawn = [part.cpu() for part in replayed or () if part is not None]

        def make() -> list[Tensor]:
            parts = [*self.samples.training_batch(positions, randomness.generator(self.seed, *words))]
            if len(drawn) == 1:  # positions
                assert self.stream is not None, "a method replays positions in a stream that is not known"
                return [*parts, *self.stream.training_batch(drawn[0].numpy(), generator)]
            return parts + drawn

        return make


class LazyBatch:
    """A mini-batch on the device, made when it is first asked for, which a step answered from a journal never does.

    Args:
        method: prepares it.
        make: gives this process's part.
    """

    def __init__(self, method: Method, make: Callable[[], MiniBatch]) -> None:
        self._method, self._make = method, make

    @functools.cached_property
    def tensors(self) -> MiniBatch:
        """Images and labels."""
        return self._make()

    @functools.cached_property
    def inputs(self) -> Any:
        """What ``method.prepare`` makes of them, once for all evaluations of a step."""
        return self._method.prepare(self.tensors)
