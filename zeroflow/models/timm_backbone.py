"""Backbones from timm: any model, and plain vision transformers, where evaluations on the same images share a prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zeroflow.models.backbone import Backbone, BlockPass, Prefix, Step, beside, mlp_branch, mlp_width, plain

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class TimmBackbone(Backbone):
    """Any timm model, pooled as configured: the features are the input of its classifier.

    Args:
        model: without a head; it is frozen here.
        image_size: side of the images, pixels.
        channels: of the images.
    """

    def __init__(self, model: nn.Module, image_size: int, channels: int = 3) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self._image_size, self.channels = image_size, channels

    @property
    def width(self) -> int:
        return int(getattr(self.model, "head_hidden_size", None) or self.model.num_features)

    @property
    def image_size(self) -> int:
        return self._image_size

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The residual blocks that end in an MLP, in the order of a forward pass."""
        trunk = {
            name: module for name, module in self.model.named_modules() if not name.startswith(("head", "attn_pool"))
        }
        found = {name: module for name, module in trunk.items() if mlp_branch(module)}
        return [
            module
            for name, module in found.items()
            if not any(inner.startswith(f"{name}.") for inner in found if inner != name)
        ]

    @cached_property
    def widths(self) -> Sequence[int]:
        """As in ``Backbone``, measured by passing a blank image; empty where a block has no residual stream that ends in an MLP."""
        found: list[int | None] = []

        def measured(number: int, block: BlockPass, values: Tensor) -> Tensor:
            hidden, output = block.halves(values)
            one = isinstance(output, Tensor) and output.numel() == hidden.numel()
            found.append(hidden.shape[-1] if one and hidden.shape[-1] == mlp_width(block.block) else None)
            return output

        with torch.no_grad():
            self.stepped(self.like.new_zeros(1, self.channels, self.image_size, self.image_size), measured)
        whole = [width for width in found if width is not None]
        return whole if len(whole) == len(found) == len(self.blocks) else ()

    def lacks(self, part: str) -> str | None:
        model = type(self.model).__name__
        if part == "norms" and not any(True for norm in norms(self) for _ in norm.parameters(recurse=False)):
            return f"a {model} has no norm with values of its own"
        if part == "blocks" and not (self.blocks and self.widths):
            return f"a {model} is not made of residual blocks that each end in an MLP"
        if part == "sequence" and not _lengthens(self.model):
            return f"a {model} takes no tokens beside those of the image"
        if part == "layers":
            return f"a {model} is not made of timm's plain transformer blocks"
        return None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        if not self.blocks:
            self.model.set_grad_checkpointing(enable)

    def emitted(self, number: int, values: Tensor) -> Tensor:
        """Transform the output of block ``number``, or the features where it is ``depth``; here, return it unchanged."""
        return values

    def forward(self, images: Tensor | Prefix, adapters: Iterable[nn.Module] | None = None) -> Tensor:
        if adapters is not None:
            return self.stepped(images, beside(adapters))
        if isinstance(images, Prefix) or self.checkpointing:
            return self.stepped(images)
        return self._features(images)

    def stepped(self, start: Prefix | Tensor, step: Step = plain) -> Tensor:
        assert isinstance(start, Tensor), "only a plain transformer has a prefix"
        with _stepping(self.blocks, self._wrapped(step)):
            return self._features(start)

    def _features(self, images: Tensor) -> Tensor:
        # A copy: models that users register may work in place, and all evaluations of a step pass the same images.
        return cast(Tensor, self.model.forward_head(self.model.forward_features(images.clone()), pre_logits=True))

    def _wrapped(self, step: Step) -> Step:
        """The step, with activation checkpointing where that is on."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return step
        return cast(Step, partial(checkpoint, step, use_reentrant=False))


class TransformerBackbone(TimmBackbone):
    """A plain vision transformer of timm, including DeiT, hybrids and the towers of CLIP and SigLIP.

    Its blocks form a sequence, so a forward pass may start in the middle: see ``prefix`` and ``entering``.
    """

    def __init__(self, model: VisionTransformer, image_size: int | None = None, channels: int = 3) -> None:
        super().__init__(model, image_size or int(model.patch_embed.img_size[0]), channels)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    @property
    def widths(self) -> Sequence[int]:
        return [int(self.model.embed_dim)] * len(self.model.blocks)

    def lacks(self, part: str) -> str | None:
        from timm.models.vision_transformer import Block

        if part != "layers":
            return super().lacks(part)
        odd = next((block for block in self.blocks if type(block) is not Block), None)
        return None if odd is None else f"its blocks are {type(odd).__name__}s, not timm's plain ones"

    def tokens(self, images: Tensor) -> Tensor:
        """Input of the first block, ``[N, tokens, width]``, for ``images`` ``[N, C, H, W]``."""
        vit = self.model
        return cast(Tensor, vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))))

    def prefix(self, images: Tensor) -> Prefix:
        with torch.no_grad():
            return Prefix(*_pass_of(self.blocks[0]).halves(self.tokens(images)))

    def entering(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.tokens(images)

    def forward(self, images: Tensor | Prefix, adapters: Iterable[nn.Module] | None = None) -> Tensor:
        first = images if isinstance(images, Prefix) else self.prefix(images)
        return self.stepped(first, plain if adapters is None else beside(adapters))

    def whole(self, images: Tensor) -> Tensor:
        return self.stepped(self.tokens(images))

    def stepped(self, start: Prefix | Tensor, step: Step = plain) -> Tensor:
        """As in ``Backbone``; a tensor of four dimensions is images ``[N, C, H, W]``, any other the first block's input."""
        if isinstance(start, Prefix):
            tokens, first = self.emitted(0, step(0, _PrefixPass(self.blocks[0], start), start.hidden)), 1
        else:
            tokens, first = (self.tokens(start) if start.ndim == 4 else start), 0
        step = self._wrapped(step)
        for number, block in enumerate(self.model.blocks[first:], start=first):
            tokens = self.emitted(number, step(number, _pass_of(block), tokens))
        features = self.model.forward_head(self.model.norm(tokens), pre_logits=True)
        return self.emitted(self.depth, cast(Tensor, features))


class _TimmBlockPass(BlockPass):
    """Pass of timm's plain transformer block: both halves without hooks."""

    def __call__(self, values: Tensor) -> Tensor:
        return self.halves(values)[1]

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        block: Any = self.block
        hidden = values + block.ls1(block.attn(block.norm1(values)))
        return hidden, hidden + block.ls2(block.mlp(block.norm2(hidden)))

    def added(self, output: Tensor, values: Tensor) -> Tensor:
        return output + values


class _PrefixPass(_TimmBlockPass):
    """Pass of the first block, already computed as the prefix."""

    def __init__(self, block: nn.Module, prefix: Prefix) -> None:
        super().__init__(block)
        self.prefix = prefix

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.prefix


def _pass_of(block: nn.Module) -> BlockPass:
    from timm.models.vision_transformer import Block

    return _TimmBlockPass(block) if type(block) is Block else BlockPass(block)


@contextmanager
def _stepping(blocks: Sequence[nn.Module], step: Step) -> Iterator[None]:
    """Let ``step`` compute the output of every block while the model runs; the model passes further arguments to each."""
    own = 0  # tokens of the images

    def made(
        number: int, block: nn.Module, forward: Callable[..., Tensor], values: Tensor, *more: Any, **named: Any
    ) -> Tensor:
        nonlocal own
        own = own if number else values.shape[1]

        def run(given: Tensor) -> Tensor:
            return forward(given, *more, **_lengthened(named, given.shape[1] - own))

        return step(number, BlockPass(block, run), values)

    try:
        for number, block in enumerate(blocks):
            block.forward = partial(made, number, block, block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _lengthened(named: dict[str, Any], more: int) -> dict[str, Any]:
    """A block's arguments for ``more`` tokens after those of the image: they have no position, so RoPE does not rotate them."""
    if more <= 0 or (rope := named.get("rope")) is None:
        return named
    sine, cosine = rope[..., :1, :].chunk(2, dim=-1)
    still = torch.cat([torch.zeros_like(sine), torch.ones_like(cosine)], dim=-1)
    return {**named, "rope": torch.cat([rope, still.expand(*rope.shape[:-2], more, -1)], dim=-2)}


def _lengthens(model: Any) -> bool:
    """Whether the attention of a model takes tokens without a position."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, VisionTransformer | Eva)


def norms(backbone: nn.Module) -> list[nn.Module]:
    """The normalisation layers, torch's and timm's, including those without parameters."""
    return [module for module in backbone.modules() if "norm" in type(module).__name__.lower()]
