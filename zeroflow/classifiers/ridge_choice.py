"""Choose lambda of ridge regression on held-out samples of one task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import eigh
from torch.nn import functional as F

from zeroflow.classifiers.normal_equations import add_gram

RIDGES = tuple(10.0**power for power in range(-8, 9))
"""RanPAC's candidates. They are absolute, so their range covers the feature scale of any backbone."""


def held_out(targets: Tensor) -> Tensor:
    """Mask of the held-out samples, bool ``[N]``: every fifth sample of each class, in order.

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
    that of samples, which has the same solutions. Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models
    for Continual Learning", NeurIPS 2023, Algorithm 1, where the fifth is random.

    Args:
        features: of one task, ``[N, width]``.
        labels: ``[N]``.
        expand: computes the inputs of the regression, ``[n, width]`` to float64 ``[n, size]``.
        size: width of the inputs, k.
        chunk: samples expanded at once, where there are more samples than features.

    Returns:
        Lambda, the smallest if several are equally good. None: no class has five samples, so nothing is held out.
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
    # Directions outside the span of the fitted samples predict nothing; dividing their rounding by a small lambda would.
    vectors = vectors[:, values > len(gram) * torch.finfo(values.dtype).eps * values[-1]]
    values = values[len(values) - vectors.shape[1] :, None]
    left, right = left @ vectors, vectors.T @ right
    errors = torch.stack([(left @ (right / (values + ridge)) - wanted).square().sum() for ridge in RIDGES])
    return RIDGES[int(errors.argmin())]
