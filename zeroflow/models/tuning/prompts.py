"""Learnable tokens (visual prompts) added to those of the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zeroflow.models.backbone import Backbone, BlockPass
from zeroflow.models.tuning.tuning import Tuning


class Prompts(Tuning):
    """Learnable tokens at the end of the sequence, initially zero, that enter the first block and pass through all others.

    Source: VPT (Jia et al., "Visual Prompt Tuning", ECCV 2022), Eq. 4-5; appended after the patches and initialised with zero,
    as in PILOT.

    Args:
        backbone: determines width and depth.
        tokens: number of tokens at each place.
    """

    per_example = False
    needs = "sequence"
    deep: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, tokens: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.zeros(backbone.depth if self.deep else 1, tokens, backbone.widths[0]))

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Prompts:
        return cls(backbone, settings["tokens"])

    def prefix(self, backbone: Backbone, images: Tensor) -> Tensor:
        return backbone.entering(images)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        own, last = 0, backbone.depth - 1

        def prompted(number: int, block: BlockPass, tokens: Tensor) -> Tensor:
            nonlocal own
            own = own or tokens.shape[1]
            if self.deep or number == 0:
                tokens = torch.cat([tokens[:, :own], self.prompts[number].expand(len(tokens), -1, -1)], dim=1)
            tokens = block(tokens)
            return tokens[:, :own] if number == last else tokens

        return backbone.stepped(prefix, prompted)


class DeepPrompts(Prompts):
    """The same with new tokens at every block, which replace those of the previous block (Eq. 6-7)."""

    deep = True
