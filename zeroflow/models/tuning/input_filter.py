"""A small filter in front of the backbone: a handful of values that tune any backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeroflow.models.backbone import Backbone
from zeroflow.models.tuning.tuning import Tuning

SLOPE = 0.1
"""Slope for values outside an image's own range."""


class InputFilter(Tuning):
    """A ``size`` x ``size`` filter, a gain and an offset on every image, with the result squashed into the image's own range.

    The filter is isotropic, with one weight per distance from its centre: 5 x 5 has six. A weight is divided among all pixels
    at its distance, so that a step changes an image equally whatever their number. Initially it returns every image unchanged,
    bit for bit. Zeroth-order estimates are reliable for so few values, each of which affects every pixel. Ours; no paper.

    Images are padded by replicating their edges, so that a uniform surface stays uniform up to the edge. Values outside the
    image's own range, channel by channel, keep ``SLOPE`` of their excess: the range needs no statistics of the training
    images, whatever the normalisation.

    Args:
        channels: of the images.
        size: side of the filter, pixels, odd.
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
        """The filtered images, ``[N, C, H, W]``."""
        weights = self.kernel()[:, None].expand(self.channels, -1, -1, -1)
        offset = self.offset.expand(self.channels)
        padded = F.pad(images, [self.margin] * 4, mode="replicate")
        found = F.conv2d(padded, weights, offset, groups=self.channels)
        inside = found.clamp(images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True))
        return inside + SLOPE * (found - inside)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return backbone.whole(self.filtered(prefix))
