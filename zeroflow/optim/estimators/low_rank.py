"""One-sided estimate along directions of low rank, in a subspace that is drawn anew now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zeroflow.optim import noise
from zeroflow.optim.estimators.rge import RGE
from zeroflow.optim.flat import FlatParameters, matrix_shape


@dataclass
class Products(noise.Directions):
    """Directions whose part of each matrix is P Psi; see ``LowRank``.

    Attributes:
        shapes: of the matrices, in the order of the flat vector.
        rank: see ``LowRank``.
        resample_every: see ``LowRank``.
    """

    shapes: Sequence[tuple[int, int]] = ()
    rank: int = 64
    resample_every: int = 100
    _bases: tuple[int, list[Tensor]] | None = None

    def fill_(self, out: Tensor, step: int, query: int) -> Tensor:
        bases = self._of(step // self.resample_every, out)
        sizes = [basis.shape[1] * columns for basis, (_, columns) in zip(bases, self.shapes, strict=True)]
        drawn = torch.split(noise.gaussian_(out.new_empty(sum(sizes)), self.seed, step, query), sizes)
        places = torch.split(out, [rows * columns for rows, columns in self.shapes])
        for basis, part, place, shape in zip(bases, drawn, places, self.shapes, strict=True):
            torch.mm(basis, part.view(basis.shape[1], shape[1]), out=place.view(shape))
        return out if self.mask is None else out.mul_(self.mask)

    def _of(self, period: int, like: Tensor) -> list[Tensor]:
        """P of each matrix in a period of ``resample_every`` steps."""
        if self._bases is None or self._bases[0] != period:
            found = [
                noise.orthonormal(rows, min(self.rank, rows), self.seed, period, number).to(like)
                for number, (rows, _) in enumerate(self.shapes)
            ]
            self._bases = period, found
        return self._bases[1]


@dataclass(frozen=True)
class LowRank(RGE):
    """One-sided differences along directions P Psi of each matrix ``[m, n]``.

    estimate = mean over i of (L(theta + eps P Psi_i) - L(theta)) / eps * P Psi_i, with Psi_i ``[r, n]`` ~ N(0, I), r = min(rank, m).
    P ``[m, r]`` has orthonormal columns, uniform among such (the Q of a Gaussian matrix, with the signs that make R's diagonal
    positive); every ``resample_every`` steps there is another one. A convolution's weight is the matrix ``[m, the rest]``.
    A parameter with fewer than two dimensions is a matrix of one row here, so its directions are Gaussian.

    P is regenerated from (seed, step // resample_every) in every step and is in no state; a step holds m r numbers a matrix.
    Source: Lang et al. 2026 (ZO-Muon, arXiv:2602.17155); published q = 16, rank 64 and a new P every 100 steps. Matrices of one
    row are ours. Cost: q + 1 forward passes.
    """

    distributions: ClassVar[tuple[str, ...]] = ("low-rank",)
    distribution: ClassVar[str] = "low-rank"  # type: ignore[misc]

    rank: int = 64
    resample_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "resample_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer >= 1")

    @property
    def unbiased(self) -> bool:
        return False  # the mean is r / m times the gradient, and within one subspace its projection

    def directions(self, flat: FlatParameters, seed: int, mask: Tensor | None, queries: int) -> noise.Directions:
        shapes = [matrix_shape(parameter) for parameter in flat.parameters]
        kind = type(self).distribution
        return Products(kind, seed, mask, queries, shapes=shapes, rank=self.rank, resample_every=self.resample_every)
