"""Gram matrices and linear equations with them, shared by LDA, QDA, ridge and random projection.

A Gram matrix is as large as everything else together (M = 10,000 in float64: 800 MB). So it is summed up in place, in its
lower triangle only, and solving needs one more matrix of its size, which is freed afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular

BLOCK = 512
"""Columns of a Gram matrix that are summed up at once; blocks above the diagonal are skipped."""


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` of rows ``[N, k]`` to ``gram`` ``[k, k]``, of which only the lower triangle is meaningful."""
    for start in range(0, len(gram), BLOCK):
        block = slice(start, start + BLOCK)
        gram[start:, block].addmm_(rows[:, start:].T, rows[:, block])


def factor(matrix: Tensor, ridge: float = 0.0) -> Tensor:
    """Lower Cholesky factor ``[k, k]`` of ``matrix + ridge * I``, with a larger ridge if that matrix is numerically singular.

    The larger ridge is the smallest of ``k * epsilon * the largest diagonal entry`` (by magnitude) times 1, 10, 100 ... for
    which every pivot exceeds the rounding error.

    Args:
        matrix: float64 ``[k, k]``; only its lower triangle is read. Its diagonal is changed meanwhile and restored exactly.
        ridge: added to the diagonal in any case.
    """
    diagonal = matrix.diagonal()
    before = diagonal.clone()
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * (float(before.abs().max()) or 1.0)
    try:
        while True:
            diagonal.copy_(before + ridge)
            found, failed = cholesky_ex(matrix)
            if not failed and float(found.diagonal().min()) ** 2 > rounding / 2:
                return found
            del found  # before the next one is there
            ridge = max(10 * ridge, rounding)
    finally:
        diagonal.copy_(before)


def solve(matrix: Tensor, right: Tensor, ridge: float = 0.0) -> Tensor:
    """``(matrix + ridge * I)^-1 right`` for ``right`` ``[k, c]``; see ``factor``."""
    lower = factor(matrix, ridge)
    return solve_triangular(lower.mT, solve_triangular(lower, right, upper=False), upper=True)
