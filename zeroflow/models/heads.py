"""Classification heads on features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CosineHead(nn.Module):
    """``sigma * cos(feature, W)`` with a learnable sigma that starts at 1. Source: UCIR (Hou et al. 2019), Eq. 4.

    Args:
        width: features d. classes: outputs. generator: source of W, uniform in +-1/sqrt(d).
    """

    def __init__(self, width: int, classes: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.sigma = nn.Parameter(torch.ones(1))
        nn.init.uniform_(self.weight, -1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """``[N, d] -> [N, classes]``."""
        return self.sigma * cosine(features, self.weight)


def cosine(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every feature ``[N, d]`` with every prototype ``[C, d]``: ``[N, C]``."""
    return F.linear(F.normalize(features, dim=-1), F.normalize(prototypes, dim=-1))
