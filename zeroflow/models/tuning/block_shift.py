"""A shift behind every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.models.backbone import Backbone, BlockPass, Prefix
from zeroflow.models.tuning.tuning import Tuning


class BlockShift(Tuning):
    """A learnable vector that is added to every token behind every block, zero at first: depth x width values.

    What SSF (Lian et al. 2022) adds behind its layers, in one place of each block and without the scales. It is added to what
    travels between blocks, so that nothing inside one need be touched.
    """

    needs = "blocks"

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.shifts = nn.ParameterList(torch.zeros(width) for width in widths)

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> BlockShift:
        return cls(backbone.widths)

    def prefix(self, backbone: Backbone, images: Tensor) -> Prefix | Tensor:
        return backbone.prefix(images)

    def forward(self, backbone: Backbone, prefix: Prefix | Tensor) -> Tensor:
        def shifted(number: int, block: BlockPass, values: Tensor) -> Tensor:
            return block.added(block(values), self.shifts[number])

        return backbone.stepped(prefix, shifted)
