"""Class means: the classifier of SimpleCIL, APER and EASE."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from zeroflow.data.scenario import Batch


@torch.no_grad()
def class_means(features: Callable[[Tensor], Tensor], batches: Iterable[Batch], classes: range) -> Tensor:
    """Mean unnormalised feature of each class.

    Args:
        features: ``[N, C, H, W] -> [N, ...]``. batches: images and new labels, in evaluation form.
        classes: the labels that occur.

    Returns:
        ``[len(classes), ...]``, in label order.
    """
    total: Tensor | None = None
    count = torch.zeros(len(classes), dtype=torch.long)
    for images, labels in batches:
        found = features(images)
        if total is None:
            total = found.new_zeros(len(classes), *found.shape[1:])
        index = labels - classes.start
        total.index_add_(0, index.to(found.device), found)
        count += torch.bincount(index, minlength=len(classes))
    assert total is not None and bool((count > 0).all()), "a class without training images passed the scenario's checks"
    return total / count.to(total).reshape(-1, *[1] * (total.ndim - 1))
