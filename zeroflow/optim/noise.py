"""Random directions keyed on (seed, step, query): regenerated whenever needed, never stored.

The scheme is counter-based (Philox 4x64-10, Salmon et al. 2011): the seed is the key and (step, query) is the counter's
upper half, so a direction does not depend on which worker asks, in what order, or how often. On CUDA torch's own Philox
is seeded with a 64-bit hash of the same three numbers; the bits of CPU and CUDA differ, as everything between them does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_DIRECTIONS, _CLOSURE = 0, 1  # domains: the two uses of one seed must not share a stream


def gaussian_(out: Tensor, seed: int, step: int, query: int) -> Tensor:
    """Fill ``out`` (flat, contiguous) with z ~ N(0, I) of that seed, step and query, in place; returns it."""
    if out.device.type == "cpu" and out.dtype in (torch.float32, torch.float64):
        bits = np.random.Philox(key=[seed, _DIRECTIONS], counter=[0, 0, query, step])
        values = out.numpy()
        np.random.Generator(bits).standard_normal(dtype=values.dtype.type, out=values)
        return out
    generator = torch.Generator(out.device).manual_seed(_hash64(seed, step, query, _DIRECTIONS))
    return out.normal_(generator=generator)


def closure_seed(seed: int, step: int) -> int:
    """Seed of torch's own generators during every evaluation of one step, so that all see the same dropout masks."""
    return _hash64(seed, step, 0, _CLOSURE)


def _hash64(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
