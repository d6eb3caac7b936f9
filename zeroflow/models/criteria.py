"""What a classifier's logits are trained to make small."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Losses ``[N]`` from logits ``[N, C]`` and labels ``[N]``."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def error_rate(logits: Tensor, labels: Tensor) -> Tensor:
    """The 0-1 error itself: 0 where the label's logit is the largest, 1 where another one is larger, 1/2 for a tie.

    It has a graph like any other loss, and a derivative that is zero wherever there is one.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (1 - torch.sign(own - others.amax(1))) / 2


criteria: Mapping[str, Criterion] = {"cross-entropy": cross_entropy, "error-rate": error_rate}
"""By the name that the key ``loss`` of a cell has; the first one is the default."""
