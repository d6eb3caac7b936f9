"""A small filter in front of the model: a handful of values that any backbone can be tuned by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeroflow.models.backbone import Backbone
from zeroflow.models.tuning.tuning import Tuning

SLOPE = 0.1
"""Of what lies beyond an image's own range."""


class InputFilter(Tuning):
    """Every image passes a ``size`` x ``size`` filter, a gain and an offset, and is bent back into its own range.

    The filter has one weight for each distance from its centre, so it does the same in all directions: 5 x 5 has six. A weight is
    shared by all pixels at its distance, so that one step changes an image as much whatever their number. At first
    it gives every image back, bit for bit. Few values, which every pixel of every image feels alike, are what an estimate from
    function values finds reliably. Ours; no paper.

    Beyond its edge an image goes on as it is there, so that a plain surface stays plain up to the edge; a drawing, whose edge
    is paper, goes on in paper. What leaves the range of the image's own values, channel by channel, is shrunk to ``SLOPE`` of
    its excess: a range that any normalisation has, and nothing to be kept from the training images.

    Args:
        channels: of the images.
        size: of the filter, pixels, odd.
        shared: one filter for all channels, otherwise one for each.
    """

    per_example = False

    def __init__(self, channels: int, size: int, shared: bool = True) -> None:
        super().__init__()
        self.channels, self.margin = channels, size // 2
        steps = torch.arange(size) - self.margin
        distances = steps[:, None] ** 2 + steps**2
        rings, ring_of, pixels = torch.unique(distances, return_inverse=True, return_counts=True)
        self.register_buffer("_ring_of", ring_of, persistent=False)
        self.register_buffer("_pixels", pixels, persistent=False)
        filters = 1 if shared else channels
        self.rings = nn.Parameter(torch.zeros(filters, len(rings)))
        self.gain, self.offset = nn.Parameter(torch.ones(filters)), nn.Parameter(torch.zeros(filters))
        self.rings.detach()[:, 0] = 1

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> InputFilter:
        return cls(3, settings["size"], settings["shared"])

    def kernel(self) -> Tensor:
        """The filter ``[1 or C, size, size]``, gain included."""
        weights = self.gain[:, None] * self.rings / cast(Tensor, self._pixels)
        return weights[:, cast(Tensor, self._ring_of)]

    def filtered(self, images: Tensor) -> Tensor:
        """What enters the model, ``[N, C, H, W]``."""
        weights = self.kernel()[:, None].expand(self.channels, -1, -1, -1)
        offset = self.offset.expand(self.channels)
        padded = F.pad(images, [self.margin] * 4, mode="replicate")
        found = F.conv2d(padded, weights, offset, groups=self.channels)
        inside = found.clamp(images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True))
        return inside + SLOPE * (found - inside)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return backbone.whole(self.filtered(prefix))
