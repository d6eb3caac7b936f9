"""Step 2: from gradient estimates to the vector handed to the update."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Direction(Protocol):
    """``direction(estimate)`` gives the vector ``[d]`` that the update treats as the gradient; may work in place."""

    def __call__(self, estimate: Tensor) -> Tensor: ...


def identity(estimate: Tensor) -> Tensor:
    """The estimate itself (ZO-SGD, ZO-Adam)."""
    return estimate


def sign(estimate: Tensor) -> Tensor:
    """The elementwise sign of the estimate. Source: signSGD via zeroth-order oracle (Liu et al. 2019), Algorithm 1."""
    return estimate.sign_()
