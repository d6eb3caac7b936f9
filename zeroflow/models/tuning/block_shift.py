"""A shift after every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.models.backbone import Backbone, BlockPass, Prefix
from zeroflow.models.tuning.tuning import Tuning


class BlockShift(Tuning):
    """A learnable vector added to every token after every block, initially zero: depth x width values.

    It is the shift of SSF (Lian et al. 2022), at one place per block and without scales. It is added between blocks, so that
    nothing inside a block changes.
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
