"""Scales and shifts after every layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.models.backbone import Backbone
from zeroflow.models.tuning.tuning import Tuning


class ScaleAndShift(nn.Module):
    """``scale * x + shift`` along the last axis of size ``width``, initialised from N(1, .02) and N(0, .02)."""

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        nn.init.normal_(self.scale, mean=1.0, std=0.02, generator=generator)
        nn.init.normal_(self.shift, std=0.02, generator=generator)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.scale + self.shift


class SSF(Tuning):
    """A scale and a shift after the patch embedding, both norms and all four linear layers of every block, and the last norm.

    Source: SSF (Lian et al., "Scaling & Shifting Your Features", NeurIPS 2022), Eq. 2 and Figure 2.

    Args:
        backbone: its frozen weights are shared, not copied.
    """

    needs = "layers"

    def __init__(self, backbone: Backbone, generator: torch.Generator | None = None) -> None:
        super().__init__()
        # The structure is copied, the weights are not: deepcopy treats entries of its memo as copied already.
        shared: dict[int, Any] = {id(value): value for value in [*backbone.parameters(), *backbone.buffers()]}
        self.tuned = copy.deepcopy(backbone, shared)
        vit: Any = self.tuned.model
        width = vit.embed_dim

        def followed(module: nn.Module, width: int) -> nn.Module:
            return nn.Sequential(module, ScaleAndShift(width, generator))

        if hasattr(vit.patch_embed, "norm"):
            vit.patch_embed.norm = followed(vit.patch_embed.norm, width)
        else:  # a hybrid's
            vit.patch_embed = followed(vit.patch_embed, width)
        for block in vit.blocks:
            block.norm1, block.norm2 = followed(block.norm1, width), followed(block.norm2, width)
            for holder, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2"))):
                for name in names:
                    layer = getattr(holder, name)
                    setattr(holder, name, followed(layer, layer.out_features))
        vit.norm = followed(vit.norm, width)

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> SSF:
        return cls(backbone, generator)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return self.tuned.whole(prefix)
