"""A learnable pattern added to the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from zeroflow.models.backbone import Backbone
from zeroflow.models.tuning.tuning import Tuning


class InputPrompt(Tuning):
    """A pattern added to every image, initially zero: a frame, and a low-rank pattern over the whole image.

    It suits a backbone whose input alone is accessible. Source: Bahng et al., "Exploring Visual Prompts for Adapting
    Large-Scale Models", 2022, Section 3 (the frame, there of 30 in 224 pixels); the low rank keeps the number of values small.

    Args:
        channels: of the images.
        size: side of the images, pixels.
        border: width of the frame, pixels.
        rank: of the pattern; 0: none.
    """

    per_example = False

    def __init__(self, channels: int, size: int, border: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        inside = torch.zeros(size, size, dtype=torch.bool)
        inside[border : size - border, border : size - border] = True
        self.register_buffer("_framed", (~inside).nonzero().T.contiguous(), persistent=False)
        self.frame = nn.Parameter(torch.zeros(channels, int((~inside).sum())))
        self.rows = nn.Parameter(torch.zeros(channels, size, rank))
        self.columns = nn.Parameter(torch.randn(channels, rank, size, generator=generator))

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> InputPrompt:
        return cls(3, backbone.image_size, settings["border"], settings["rank"], generator)

    def pattern(self) -> Tensor:
        """The pattern, ``[C, H, W]``."""
        framed = cast(Tensor, self._framed)
        frame = self.frame.new_zeros(self.rows.shape[0], self.rows.shape[1], self.columns.shape[2])
        frame = frame.index_put(
            (torch.arange(len(frame), device=framed.device)[:, None], framed[0], framed[1]), self.frame
        )
        return frame + self.rows @ self.columns

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return backbone.whole(prefix + self.pattern())
