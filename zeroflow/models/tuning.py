"""Ways to tune a frozen backbone: what is trained, and how it changes the forward pass."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from zeroflow.models.adapters import AdapterStack
from zeroflow.models.backbone import Backbone, Prefix
from zeroflow.registry import Registry


class Tuning(nn.Module, ABC):
    """Trainable values beside a frozen backbone, which is handed in at each call and is no part of this module."""

    per_example: ClassVar[bool] = True
    """Whether its values may differ from example to example of a mini-batch, as ``zo-per-example`` needs it."""

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Tuning:
        """A fresh one for ``backbone``; ``generator`` makes its initial values, of the settings it takes what it knows."""
        return cls()

    def prefix(self, backbone: Backbone, images: Tensor) -> Any:
        """The part of a forward pass that no trained value changes, without a graph; ``images`` ``[N, C, H, W]``."""
        return images

    @abstractmethod
    def forward(self, backbone: Backbone, prefix: Any) -> Tensor:
        """Features ``[N, width]`` from ``prefix``."""


class Untuned(Tuning):
    """The backbone as it is: only a head is trained."""

    def prefix(self, backbone: Backbone, images: Tensor) -> Tensor:
        with torch.no_grad():
            return backbone(images)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return prefix


class Adapters(Tuning):
    """A bottleneck beside every block's MLP; arguments as in ``AdapterStack``."""

    def __init__(self, stack: AdapterStack) -> None:
        super().__init__()
        self.stack = stack

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Adapters:
        own = {name: settings[name] for name in ("scale", "dropout")}
        return cls(AdapterStack(backbone.depth, backbone.width, settings["bottleneck"], **own, generator=generator))

    def prefix(self, backbone: Backbone, images: Tensor) -> Prefix:
        return backbone.prefix(images)

    def forward(self, backbone: Backbone, prefix: Prefix | Tensor) -> Tensor:
        return cast(Tensor, backbone(prefix, self.stack))


class Prompts(Tuning):
    """Learnable tokens at the end of the sequence, zero at first, that enter the first block and stay.

    Source: VPT (Jia et al., "Visual Prompt Tuning", ECCV 2022), Eq. 4-5; appended behind the patches and started at zero as
    PILOT does.

    Args:
        backbone: for its shape. tokens: how many at each place.
    """

    per_example = False
    deep: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, tokens: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.zeros(backbone.depth if self.deep else 1, tokens, backbone.width))

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Prompts:
        return cls(backbone, settings["tokens"])

    def prefix(self, backbone: Backbone, images: Tensor) -> Tensor:
        with torch.no_grad():
            return backbone.tokens(images)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        own = prefix.shape[1]

        def prompted(number: int, block: nn.Module, tokens: Tensor) -> Tensor:
            if self.deep or number == 0:
                tokens = torch.cat([tokens[:, :own], self.prompts[number].expand(len(tokens), -1, -1)], dim=1)
            return cast(Tensor, block(tokens))

        return backbone.pooled(backbone.through(prefix, prompted)[:, :own])


class DeepPrompts(Prompts):
    """The same, with new tokens at every block; those of the block before are dropped (Eq. 6-7)."""

    deep = True


class ScaleAndShift(nn.Module):
    """``scale * x + shift`` on the last axis of ``width``, drawn from N(1, .02) and N(0, .02)."""

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        nn.init.normal_(self.scale, mean=1.0, std=0.02, generator=generator)
        nn.init.normal_(self.shift, std=0.02, generator=generator)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.scale + self.shift


class SSF(Tuning):
    """A scale and a shift behind the patch embedding, every norm and every linear layer.

    Source: SSF (Lian et al., "Scaling & Shifting Your Features", NeurIPS 2022), Eq. 2 and Figure 2.

    Args:
        backbone: its frozen weights are shared, not copied.
    """

    def __init__(self, backbone: Backbone, generator: torch.Generator | None = None) -> None:
        super().__init__()
        # The structure is copied, the weights are not: deepcopy takes what stands in its memo as copied already.
        shared: dict[int, Any] = {id(value): value for value in [*backbone.parameters(), *backbone.buffers()]}
        self.tuned = copy.deepcopy(backbone, shared)
        vit: Any = self.tuned.vit

        def followed(module: nn.Module, width: int) -> nn.Module:
            return nn.Sequential(module, ScaleAndShift(width, generator))

        vit.patch_embed.norm = followed(vit.patch_embed.norm, backbone.width)
        for block in vit.blocks:
            block.norm1, block.norm2 = followed(block.norm1, backbone.width), followed(block.norm2, backbone.width)
            for holder, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2"))):
                for name in names:
                    layer = getattr(holder, name)
                    setattr(holder, name, followed(layer, layer.out_features))
        vit.norm = followed(vit.norm, backbone.width)

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> SSF:
        return cls(backbone, generator)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return self.tuned.whole(prefix)


class Full(Tuning):
    """Every weight of a copy of the backbone."""

    per_example = False

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.tuned = copy.deepcopy(backbone).requires_grad_(True)

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Full:
        return cls(backbone)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return self.tuned.whole(prefix)


class InputPrompt(Tuning):
    """A pattern that is added to every image, zero at first: a frame around it, and a pattern of low rank over all of it.

    All that can be trained of a backbone of which only the input can be reached. Source: Bahng et al., "Exploring Visual
    Prompts for Adapting Large-Scale Models", 2022, Section 3 (the frame); the low rank keeps the number of values small.

    Args:
        channels, size: of the images. border: width of the frame, pixels. rank: of the pattern; 0: none.
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
        """What is added, ``[C, H, W]``."""
        framed = cast(Tensor, self._framed)
        frame = self.frame.new_zeros(self.rows.shape[0], self.rows.shape[1], self.columns.shape[2])
        frame = frame.index_put(
            (torch.arange(len(frame), device=framed.device)[:, None], framed[0], framed[1]), self.frame
        )
        return frame + self.rows @ self.columns

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return backbone.whole(prefix + self.pattern())


_BUILT_IN: dict[str, type[Tuning]] = {
    "none": Untuned, "adapter": Adapters, "vpt-shallow": Prompts, "vpt-deep": DeepPrompts, "ssf": SSF, "full": Full, "input-prompt": InputPrompt,
}  # fmt: skip

tunings: Registry[type[Tuning]] = Registry("tuning")
for _name, _tuning in _BUILT_IN.items():
    tunings.register(_name, _tuning)
