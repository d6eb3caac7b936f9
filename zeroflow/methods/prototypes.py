"""Class means: the classifier of SimpleCIL, APER and EASE."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow.data.scenario import Batch


@torch.no_grad()
def class_means(features: Callable[[Tensor], Tensor], batches: Iterable[Batch], classes: range) -> Tensor:
    """Mean unnormalised feature of each class.

    Args:
        features: computes features ``[N, ...]`` of images ``[N, C, H, W]``.
        batches: images under the test transform, and new labels.
        classes: the labels that occur.

    Returns:
        ``[len(classes), ...]``, in label order.
    """
    total: Tensor | None = None
    count = torch.zeros(len(classes))
    for images, labels in batches:
        found = features(images)
        member = F.one_hot(labels - classes.start, len(classes)).to(found)
        # A product, because scattered addition on a GPU has no fixed order.
        part = (member.T @ found.flatten(1)).reshape(len(classes), *found.shape[1:])
        total = part if total is None else total + part
        count += member.sum(0).cpu()
    assert total is not None and bool((count > 0).all()), "a class without training images passed the scenario's checks"
    return total / count.to(total).reshape(-1, *[1] * (total.ndim - 1))
