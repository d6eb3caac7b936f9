"""A shift behind every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from zeroflow.models.backbone import Backbone, Prefix
from zeroflow.models.tuning.tuning import Tuning


class BlockShift(Tuning):
    """A learnable vector that is added to every token behind every block, zero at first: depth x width values.

    What SSF (Lian et al. 2022) adds behind its layers, in one place of each block and without the scales. It is added to what
    travels between blocks, so that nothing inside one need be touched.
    """

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.shifts = nn.ParameterList(torch.zeros(width) for _ in range(depth))

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> BlockShift:
        return cls(backbone.depth, backbone.width)

    def prefix(self, backbone: Backbone, images: Tensor) -> Prefix:
        return backbone.prefix(images)

    def forward(self, backbone: Backbone, prefix: Prefix) -> Tensor:
        def shifted(number: int, block: nn.Module, tokens: Tensor) -> Tensor:
            return cast(Tensor, block(tokens)) + self.shifts[number]

        first = backbone.emitted(0, prefix.output + self.shifts[0])
        return backbone.pooled(backbone.through(first, shifted, first=1))
