"""All randomness of a trial is keyed on (seed, purpose, task, epoch, batch): nothing depends on what was drawn before."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

INITIAL_VALUES, AUGMENTATION, BATCH_ORDER, OPTIMIZER, SNAPSHOT, REPLAY = range(6)


def key(seed: int, *words: int) -> int:
    """A 63-bit number from a seed and what it is for."""
    return int(np.random.SeedSequence((seed, *words)).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, *words: int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(key(seed, *words) & 0xFFFFFFFF)


def batch_order(seed: int, task: int, epoch: int, samples: int) -> npt.NDArray[np.int64]:
    """The order in which one epoch visits a task's samples."""
    return _drawn(seed, task, epoch).permutation(samples)


def balanced_order(seed: int, task: int, epoch: int, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The same, with every class spread evenly over the epoch; ``labels`` ``[samples]``.

    Where all classes have equally many samples they take turns, so that in any mini-batch the numbers of two classes differ by
    at most one; otherwise each has its share of every mini-batch, rounded up or down.
    """
    shuffled = _drawn(seed, task, epoch).permutation(len(labels))
    classes, own, counts = np.unique(labels[shuffled], return_inverse=True, return_counts=True)
    sorted_, firsts = np.argsort(own, kind="stable"), np.cumsum(counts) - counts
    rank = np.empty(len(labels))
    rank[sorted_] = np.arange(len(labels)) - np.repeat(firsts, counts)
    turn = np.argsort(_drawn(seed, task, epoch, 1).random(len(classes)))  # of classes at the same place
    return shuffled[np.lexsort((turn[own], (rank + 0.5) / counts[own]))]


def _drawn(*words: int) -> np.random.Generator:
    seed, *rest = words
    return np.random.Generator(np.random.Philox(key(seed, BATCH_ORDER, *rest)))
