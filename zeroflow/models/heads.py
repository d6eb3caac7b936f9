"""Classification heads on features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CosineHead(nn.Module):
    """``sigma * cos(feature, W)`` with a learnable sigma. Source: UCIR (Hou et al. 2019), Eq. 4.

    Args:
        width: features d.
        classes: outputs.
        sigma: initial value.
        generator: source of W, uniform in +-1/sqrt(d).
    """

    def __init__(
        self, width: int, classes: int, *, sigma: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, width))
        self.sigma = nn.Parameter(torch.full((1,), sigma))
        self.grow(classes, generator)

    def grow(self, classes: int, generator: torch.Generator | None = None) -> None:
        """Append outputs to the existing ones."""
        old = self.weight.detach()
        bound = 1 / math.sqrt(old.shape[1])
        new = torch.empty(classes, old.shape[1], dtype=old.dtype)  # on the CPU, where generators are
        nn.init.uniform_(new, -bound, bound, generator=generator)
        self.weight = nn.Parameter(torch.cat([old, new.to(old.device)]))

    def forward(self, features: Tensor) -> Tensor:
        """``[N, d] -> [N, classes]``."""
        return self.sigma * cosine(features, self.weight)


def cosine(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every feature ``[N, d]`` with every prototype ``[C, d]``: ``[N, C]``."""
    return F.linear(F.normalize(features, dim=-1), F.normalize(prototypes, dim=-1))
