"""What a backbone is: images go in, features come out; and how a pass goes through its blocks, where it has any.

A tuning asks for what it needs (``Tuning.needs``), never for a class: the features alone, the weights, the norms, the blocks, the
sequence of tokens, or the layers of a plain transformer. ``Backbone.lacks`` says what is not there, and why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

PARTS = ("features", "weights", "norms", "blocks", "sequence", "layers")
"""What of a backbone a tuning may need.

features: images go in, features come out. weights: they can be trained. norms: some have scales of their own. blocks: residual
ones that end in an MLP. sequence: more tokens may join those of an image. layers: those of timm's plain transformer block.
"""


class Prefix(NamedTuple):
    """What of a forward pass no adapter can change: shared by all evaluations on the same images.

    Attributes:
        hidden: the first block's residual stream before its MLP, ``[N, tokens, d]``: an adapter's input.
        output: the first block's output without an adapter, ``[N, tokens, d]``.
    """

    hidden: Tensor
    output: Tensor


class BlockPass:
    """A block's part of one forward pass: ``block_pass(values)`` gives what leaves it of what enters it.

    Args:
        block: the module.
        run: what computes its output; default: the block itself, with nothing beside the values.
    """

    def __init__(self, block: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self.block, self.run = block, run or block.forward

    def __call__(self, values: Tensor) -> Tensor:
        return self.run(values)

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the MLP, before the MLP's own norm, channels last ``[..., d]``; and the block's output."""
        entered: list[Tensor] = []

        def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            entered.append(given[0])

        handles = [module.register_forward_pre_hook(keep) for module in mlp_branch(self.block)]
        try:
            output = self.run(values)
        finally:
            for handle in handles:
                handle.remove()
        hidden = entered[0] if entered else values  # without a module of its own: beside attention, on what enters both
        return hidden.movedim(1, -1) if hidden.ndim == 4 and _convolves(self.block) else hidden, output

    def added(self, output: Tensor, values: Tensor) -> Tensor:
        """``output`` and, laid out as it is, ``values``: of its every position ``[..., d]``, or the same for all of them ``[d]``."""
        width = values.shape[-1]
        channels_first = output.ndim == 4 and output.shape[1] == width
        if (
            channels_first and output.shape[-1] == width
        ):  # either could be: a block of convolutions hands on what it takes
            channels_first = _convolves(self.block) or hasattr(self.block, "conv_dw")
        if values.ndim == 1:
            return output + (values[:, None, None] if channels_first else values)
        if channels_first:
            values = values.movedim(-1, 1)
        return output + values.reshape(output.shape)


Step = Callable[[int, BlockPass, Tensor], Tensor]
"""What leaves a block, from its number, its pass and what enters it."""


def plain(number: int, block: BlockPass, values: Tensor) -> Tensor:
    """The step that changes nothing."""
    return block(values)


def mlp_branch(block: nn.Module) -> list[nn.Module]:
    """The modules that the MLP's branch of a residual block may begin with; the first to be entered is its entrance."""
    if isinstance(branches := getattr(block, "ffns", None), nn.ModuleList):
        return [branches[0]]
    norms = [part for name in ("norm2", "norm") if isinstance(part := getattr(block, name, None), nn.Module)]
    mlp = getattr(block, "mlp", None)
    return [*norms, mlp] if norms and isinstance(mlp, nn.Module) else []


def mlp_width(block: nn.Module) -> int | None:
    """Width of what a block's MLP takes; None: it has none of its own."""
    layer = _first_layer(block)
    return None if layer is None else int(layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features)


def _first_layer(block: nn.Module) -> Any:
    for branch in mlp_branch(block)[-1:]:
        return next((part for part in branch.modules() if isinstance(part, nn.Linear | nn.Conv2d)), None)
    return None


def _convolves(block: nn.Module) -> bool:
    """Whether a block's MLP begins with a convolution, so that channels come first."""
    return isinstance(_first_layer(block), nn.Conv2d)


class Backbone(nn.Module, ABC):
    """A frozen feature extractor. ``backbone(images)`` gives features ``[N, width]`` of images ``[N, C, H, W]``."""

    unseen_bytes: int | None = 0
    """Bytes of weights that are in no tensor of the module; None: nor is it known what a forward pass needs besides."""

    checkpointing = False

    @property
    @abstractmethod
    def width(self) -> int:
        """Features d."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the square input, pixels."""

    @property
    def widths(self) -> Sequence[int]:
        """Width of the stream beside every block's MLP; empty where there are no blocks to stand beside."""
        return ()

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.widths)

    @property
    def like(self) -> Tensor:
        """A tensor of the precision and on the device that it computes in."""
        return next(self.parameters())

    def lacks(self, part: str) -> str | None:
        """Why one of ``PARTS`` is not there; None: it is."""
        return None if part == "features" else "nothing of it but its features can be reached"

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: a frozen backbone has no training behaviour, only adapters and heads have."""
        return super().train(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Where a graph is built, store what enters each block only and compute the rest again on the way back."""
        self.checkpointing = enable

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Get to know images ``[N, C, H, W]`` of the first task, before anything else is asked; most need not."""

    def prefix(self, images: Tensor) -> Prefix | Tensor:
        """The part of a pass that nothing beside or behind a block's MLP can change, without a graph; by default the images."""
        return images

    def entering(self, images: Tensor) -> Tensor:
        """The part of a pass before the first block, without a graph; by default the images."""
        return images

    def stepped(self, start: Prefix | Tensor, step: Step = plain) -> Tensor:
        """Features ``[N, width]``, where ``step`` makes the output of every block.

        Args:
            start: from ``prefix``, from ``entering``, or images.
        """
        raise NotImplementedError(f"a {type(self).__name__} has no blocks")

    @abstractmethod
    def forward(self, images: Tensor | Prefix, adapters: Iterable[nn.Module] | None = None) -> Tensor:
        """Features ``[N, width]`` of images or of their prefix, with an adapter beside every block's MLP or without."""

    def whole(self, images: Tensor) -> Tensor:
        """Features ``[N, width]``, where a graph is built from the images on."""
        return cast(Tensor, self(images))


def beside(adapters: Iterable[nn.Module]) -> Step:
    """The step in which every block has an adapter beside its MLP."""
    stack = list(adapters)

    def adapted(number: int, block: BlockPass, values: Tensor) -> Tensor:
        hidden, output = block.halves(values)
        return block.added(output, stack[number](hidden))

    return adapted


class OpaqueBackbone(Backbone):
    """A backbone of which nothing but what goes in and comes out is known: the base of those that are not torch's.

    Args:
        width: features d.
        image_size: pixels.
        widths: of the blocks that adapters may stand beside, if any.
    """

    def __init__(self, width: int, image_size: int, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self._width, self._image_size, self._widths = width, image_size, tuple(widths)
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    @property
    def like(self) -> Tensor:
        return cast(Tensor, self._like)

    @property
    def width(self) -> int:
        return self._width

    @property
    def widths(self) -> Sequence[int]:
        return self._widths

    @property
    def image_size(self) -> int:
        return self._image_size
