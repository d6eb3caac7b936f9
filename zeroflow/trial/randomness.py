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
    return np.random.Generator(np.random.Philox(key(seed, BATCH_ORDER, task, epoch))).permutation(samples)
