"""Adapters: small trainable branches beside the MLPs of a frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """A bottleneck in parallel to one block's MLP: ``scale * (U drop(ReLU(D h + b_d)) + b_u)``.

    Source: AdaptFormer (Chen et al. 2022), Section 3.2. D starts uniform in +-1/sqrt(width), everything else at zero, so
    a fresh adapter changes nothing.

    Args:
        width: features per token, d.
        bottleneck: inner width.
        scale: factor s on the output.
        dropout: probability on the inner activations, active in training mode only.
        generator: source of the initial values.
    """

    def __init__(
        self, width: int, bottleneck: int, *, scale: float, dropout: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.dropout, self.scale = nn.Dropout(dropout), scale
        nn.init.uniform_(self.down.weight, -1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``[..., width]`` is the residual stream before the MLP's own norm."""
        return self.scale * self.up(self.dropout(torch.relu(self.down(hidden))))


class AdapterStack(nn.ModuleList):
    """One adapter per block; ``widths`` are those of the blocks' residual streams."""

    def __init__(
        self,
        widths: Sequence[int],
        bottleneck: int,
        *,
        scale: float = 0.1,
        dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            Adapter(width, bottleneck, scale=scale, dropout=dropout, generator=generator) for width in widths
        )
