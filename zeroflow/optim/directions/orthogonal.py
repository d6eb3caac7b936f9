"""Orthogonalise the estimate: make all singular values of each matrix nearly equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zeroflow.optim.directions.direction import Direction, Step
from zeroflow.optim.flat import matrix_shape

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Orthogonal(Direction):
    """msign(M) = U V^T for each matrix M = U S V^T, about: singular values from .7 to 1.2, where M's are not tiny.

    Five Newton-Schulz iterations X <- a X + (b A + c A^2) X with A = X X^T, from X = M / ||M||. Of a matrix P G whose P has
    orthonormal columns it is P msign(G), so an estimate in a subspace stays there. lr is then a spectral norm, whatever the
    scale of the loss. A parameter with fewer than two dimensions is a matrix of one row, so its step has the length lr, about
    (ours: Muon and the public code of ZO-Muon hand these to another rule).
    Source: Jordan et al. 2024 (Muon); Lang et al. 2026 (ZO-Muon, arXiv:2602.17155). Cost: no forward pass.
    """

    keeps_mean: ClassVar[bool] = False
    keeps_span: ClassVar[bool] = False

    def __call__(self, vector: Tensor, step: Step) -> Tensor:
        for parameter, place in step.objective.flat.slices():
            if not parameter.numel():
                continue
            part = vector[place].view(matrix_shape(parameter))
            part.copy_(msign(part))
        return vector


def msign(matrix: Tensor) -> Tensor:
    """Approximately U V^T of a matrix ``[m, n]``; zero for zero."""
    a, b, c = COEFFICIENTS
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if rows > columns else x
