"""The choice of lambda in ridge regression, on held-out samples of one task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import eigh
from torch.nn import functional as F

from zeroflow.classifiers.normal_equations import add_gram

RIDGES = tuple(10.0**power for power in range(-8, 9))
"""RanPAC's candidates. Absolute, so they are wide enough for any backbone's scale of features."""


def held_out(targets: Tensor) -> Tensor:
    """Which samples are held out: of each class every fifth in the order they came, ``[N]`` of bool.

    Args:
        targets: one-hot labels ``[N, classes]``.
    """
    rank = (targets.cumsum(0) * targets).sum(1)
    return rank % 5 == 0


def choose_ridge(
    features: Tensor, labels: Tensor, expand: Callable[[Tensor], Tensor], size: int, chunk: int
) -> float | None:
    """The lambda of ``RIDGES`` with the least squared error on a fifth of the samples, fitted on the others.

    One eigendecomposition serves all candidates: of the Gram matrix of features, or, with fewer samples than features, of
    samples, which has the same solutions. Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for
    Continual Learning", NeurIPS 2023, Algorithm 1; there the fifth is a random one.

    Args:
        features: of one task, ``[N, width]``.
        labels: ``[N]``.
        expand: float64 ``[n, width] -> [n, size]``, what the regression sees of features.
        size: k.
        chunk: samples expanded at once, where there are more than features.

    Returns:
        Lambda; of several equal ones the least. None: no class has five samples, so nothing is held out.
    """
    targets = F.one_hot(labels - labels.min()).double()
    held = held_out(targets)
    if not held.any():
        return None
    fit, known, wanted = features[~held], targets[~held], targets[held]
    if len(fit) < size:
        rows = expand(fit)
        left, gram, right = expand(features[held]) @ rows.T, rows.new_zeros(len(fit), len(fit)), known
        add_gram(gram, rows.T)
    else:
        left = expand(features[held])
        gram, right = left.new_zeros(size, size), left.new_zeros(size, known.shape[1])
        for x, y in zip(torch.split(fit, chunk), torch.split(known, chunk), strict=True):
            rows = expand(x)
            add_gram(gram, rows)
            right.addmm_(rows.T, y)
    values, vectors = eigh(gram)
    # Along what the samples fitted do not have there is nothing to predict from; rounding would divide by the least lambdas.
    vectors = vectors[:, values > len(gram) * torch.finfo(values.dtype).eps * values[-1]]
    values = values[len(values) - vectors.shape[1] :, None]
    left, right = left @ vectors, vectors.T @ right
    errors = torch.stack([(left @ (right / (values + ridge)) - wanted).square().sum() for ridge in RIDGES])
    return RIDGES[int(errors.argmin())]
