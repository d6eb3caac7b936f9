"""Random directions keyed on (seed, step, query): regenerated whenever needed, never stored.

The scheme is counter-based (Philox 4x64-10, Salmon et al. 2011): the seed is the key and (step, query) is the counter's
upper half, so a direction does not depend on which worker asks, in what order, or how often. On CUDA torch's own Philox
is seeded with a 64-bit hash of the same numbers; the bits of CPU and CUDA differ, as everything between them does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Domains: the uses of one seed must not share a stream.
_DIRECTIONS, _CLOSURE, _MASK, _COORDINATES, _EXAMPLES, _BASES = range(6)


def gaussian_(out: Tensor, seed: int, step: int, query: int) -> Tensor:
    """Fill ``out`` (flat, contiguous) with z ~ N(0, I) of that seed, step and query, in place; returns it."""
    if _numpy_can(out):
        values = out.numpy()
        _numpy(seed, step, query, _DIRECTIONS).standard_normal(dtype=values.dtype.type, out=values)
        return out
    return out.normal_(generator=_torch(out.device, seed, step, query, _DIRECTIONS))


def rademacher_(out: Tensor, seed: int, step: int, query: int) -> Tensor:
    """Fill ``out`` (flat, contiguous) with independent signs, +1 or -1; returns it."""
    return _signs_(out, seed, step, query, _DIRECTIONS)


def sphere_(out: Tensor, seed: int, step: int, query: int) -> Tensor:
    """Fill ``out`` with a direction; ``Directions`` scales it to length 1 once a mask has been applied."""
    return gaussian_(out, seed, step, query)


def example_signs_(out: Tensor, seed: int, step: int, query: int) -> Tensor:
    """Fill ``out`` with signs of a stream of their own: what tells apart the directions of a mini-batch's examples."""
    return _signs_(out, seed, step, query, _EXAMPLES)


def mask(like: Tensor, seed: int, sparsity: float) -> Tensor:
    """Ones and zeros in the shape of ``like``; each is zero with probability ``sparsity``, by the seed alone."""
    if _numpy_can(like):
        uniform = _numpy(seed, 0, 0, _MASK).random(like.numel(), dtype=np.float32)
        return torch.from_numpy(uniform >= sparsity).to(like.dtype).view_as(like)
    generator = _torch(like.device, seed, 0, 0, _MASK)
    drawn = torch.rand(like.shape, generator=generator, device=like.device)
    return (drawn >= sparsity).to(like.dtype)


def coordinates(size: int, count: int, seed: int, step: int) -> list[int]:
    """``min(count, size)`` different numbers below ``size``, in random order; the same on every device."""
    chosen = _numpy(seed, step, 0, _COORDINATES).choice(size, min(count, size), replace=False)
    return [int(number) for number in chosen]


def orthonormal(rows: int, columns: int, seed: int, period: int, number: int) -> Tensor:
    """A matrix ``[rows, columns]`` with orthonormal columns, uniform among such; float64 on the CPU, the same for every device.

    Args:
        rows: of the basis, at least ``columns``.
        columns: of the basis.
        seed: first part of the key.
        period: second part of the key.
        number: third part of the key.
    """
    basis = _numpy(seed, period, number, _BASES).standard_normal((rows, columns)).T.copy()
    for place, column in enumerate(basis):
        # Gram-Schmidt, twice for the rounding. Sums instead of products of matrices, whose last bits depend on BLAS's threads.
        for _ in range(2):
            before = basis[:place]
            column -= ((before * column).sum(1)[:, None] * before).sum(0)
        column /= np.sqrt(np.square(column).sum())
    return torch.from_numpy(basis.T)


def closure_seed(seed: int, step: int, shard: int = 0) -> int:
    """Seed of torch's own generators during every evaluation of one step, so that all see the same dropout masks.

    Other slices of a mini-batch (``shard``) have other examples, so they get other masks.
    """
    return _hash64(seed, step, shard, _CLOSURE)


FILL: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    "gaussian": gaussian_, "rademacher": rademacher_, "sphere": sphere_,
}  # fmt: skip
"""Distributions of dense directions by name."""


@dataclass
class Directions:
    """The directions of an optimizer: which distribution, on which components, from which seed.

    Attributes:
        distribution: ``"gaussian"``, ``"rademacher"`` (signs), ``"sphere"`` (length 1), or ``"coordinate"`` (one component
            is 1, a different one for each query of a step).
        seed: key of all of them.
        mask: ``[d]`` of ones and zeros, components that may move; None: all.
        queries: of one step, the number of coordinates drawn without replacement.
    """

    distribution: str
    seed: int
    mask: Tensor | None = None
    queries: int = 1
    _free: Tensor | None = None
    _drawn: tuple[int, list[int]] | None = None

    def fill_(self, out: Tensor, step: int, query: int) -> Tensor:
        """Put the direction of a step's query into ``out`` ``[d]``."""
        if self.distribution == "coordinate":
            return out.zero_().index_fill_(0, torch.tensor(self._coordinate(out, step, query), device=out.device), 1.0)
        FILL[self.distribution](out, self.seed, step, query)
        if self.mask is not None:
            out.mul_(self.mask)
        return out.div_(torch.linalg.vector_norm(out)) if self.distribution == "sphere" else out

    def dimensions(self, size: int) -> int:
        """Number of components that may move, of ``size``."""
        return size if self.free is None else len(self.free)

    @property
    def free(self) -> Tensor | None:
        """Positions of the components that may move; None: all may."""
        if self._free is None and self.mask is not None:
            self._free = self.mask.nonzero()[:, 0]
        return self._free

    def _coordinate(self, out: Tensor, step: int, query: int) -> int:
        if self._drawn is None or self._drawn[0] != step:
            self._drawn = step, coordinates(self.dimensions(out.numel()), self.queries, self.seed, step)
        number = self._drawn[1][query]
        return number if self.free is None else int(self.free[number])


_SIGNS = {
    kind: 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(number) - 1
    for kind, number in ((torch.float32, np.float32), (torch.float64, np.float64))
}
"""The eight signs of every byte ``[256, 8]``."""


def _signs_(out: Tensor, seed: int, step: int, query: int, domain: int) -> Tensor:
    if _numpy_can(out):
        whole, rest = divmod(out.numel(), 8)
        words = _philox(seed, step, query, domain).random_raw(whole // 8 + 1)
        drawn = words.astype("<u8", copy=False).view(np.uint8)
        values, signs = out.numpy().reshape(-1), _SIGNS[out.dtype]
        np.take(
            signs, drawn[:whole], axis=0, out=values[: 8 * whole].reshape(whole, 8), mode="clip"
        )  # "raise" would copy
        if rest:
            values[8 * whole :] = signs[drawn[whole], :rest]
        return out
    return out.bernoulli_(0.5, generator=_torch(out.device, seed, step, query, domain)).mul_(2).sub_(1)


def _numpy_can(out: Tensor) -> bool:
    return out.device.type == "cpu" and out.dtype in (torch.float32, torch.float64)


def _numpy(seed: int, step: int, query: int, domain: int) -> np.random.Generator:
    return np.random.Generator(_philox(seed, step, query, domain))


def _philox(seed: int, step: int, query: int, domain: int) -> np.random.Philox:
    # As uint64: a plain list with a number above 2^63 would become floats, and seeds would collide.
    key, counter = np.array([seed, domain], np.uint64), np.array([0, 0, query, step], np.uint64)
    return np.random.Philox(key=key, counter=counter)


def _torch(device: torch.device, *words: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(_hash64(*words))


def _hash64(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
