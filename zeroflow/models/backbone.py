"""The interface of backbones: images in, features out, and a forward pass block by block where there are blocks.

A tuning names what it needs of a backbone (``Tuning.needs``) instead of a class: the features alone, the weights, the norms,
the blocks, the sequence of tokens, or the layers of a plain transformer. ``Backbone.lacks`` tells what is missing, and why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

PARTS = ("features", "weights", "norms", "blocks", "sequence", "layers")
"""What a tuning may need of a backbone.

features: images in, features out. weights: trainable weights. norms: norms with scales. blocks: residual blocks that end in an
MLP. sequence: tokens may be added to those of an image. layers: the layers of timm's plain transformer block.
"""


class Prefix(NamedTuple):
    """The part of a forward pass that no adapter changes: shared by all evaluations on the same images.

    Attributes:
        hidden: the first block's residual stream before its MLP, ``[N, tokens, d]``: an adapter's input.
        output: the first block's output without an adapter, ``[N, tokens, d]``.
    """

    hidden: Tensor
    output: Tensor


class BlockPass:
    """A block's part of one forward pass: ``block_pass(values)`` computes its output from its input.

    Args:
        block: the module.
        run: computes the output; default: the block itself, called with its input only.
    """

    def __init__(self, block: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self.block, self.run = block, run or block.forward

    def __call__(self, values: Tensor) -> Tensor:
        return self.run(values)

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the MLP before the MLP's own norm, channels last ``[..., d]``, and the block's output."""
        entered: list[Tensor] = []

        def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            entered.append(given[0])

        handles = [module.register_forward_pre_hook(keep) for module in mlp_branch(self.block)]
        try:
            output = self.run(values)
        finally:
            for handle in handles:
                handle.remove()
        hidden = entered[0] if entered else values  # parallel to attention: both take the block's input
        return hidden.movedim(1, -1) if hidden.ndim == 4 and _convolves(self.block) else hidden, output

    def added(self, output: Tensor, values: Tensor) -> Tensor:
        """``output`` plus ``values`` in the same layout: one per position ``[..., d]``, or the same for all positions ``[d]``."""
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
"""Computes a block's output from its number, its ``BlockPass`` and its input."""


def plain(number: int, block: BlockPass, values: Tensor) -> Tensor:
    """The step that leaves a block unchanged."""
    return block(values)


def mlp_branch(block: nn.Module) -> list[nn.Module]:
    """The modules that the MLP branch of a residual block may begin with; the first one called is its entry."""
    if isinstance(branches := getattr(block, "ffns", None), nn.ModuleList):
        return [branches[0]]
    norms = [part for name in ("norm2", "norm") if isinstance(part := getattr(block, name, None), nn.Module)]
    mlp = getattr(block, "mlp", None)
    return [*norms, mlp] if norms and isinstance(mlp, nn.Module) else []


def mlp_width(block: nn.Module) -> int | None:
    """Input width of a block's MLP; None: it has no MLP of its own."""
    layer = _first_layer(block)
    return None if layer is None else int(layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features)


def _first_layer(block: nn.Module) -> Any:
    for branch in mlp_branch(block)[-1:]:
        return next((part for part in branch.modules() if isinstance(part, nn.Linear | nn.Conv2d)), None)
    return None


def _convolves(block: nn.Module) -> bool:
    """Whether a block's MLP begins with a convolution, so that its channels come first."""
    return isinstance(_first_layer(block), nn.Conv2d)


class Backbone(nn.Module, ABC):
    """A frozen feature extractor. ``backbone(images)`` returns features ``[N, width]`` of images ``[N, C, H, W]``."""

    unseen_bytes: int | None = 0
    """Bytes of weights outside the module's tensors; None: unknown, and so is the memory of a forward pass."""

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
        """Width of every block's residual stream; empty where there are no blocks that adapters could be added to."""
        return ()

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.widths)

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and device of the computation."""
        return next(self.parameters())

    def lacks(self, part: str) -> str | None:
        """Why the backbone lacks one of ``PARTS``; None: it has it."""
        return None if part == "features" else "nothing of it but its features can be reached"

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: only adapters and heads have a training mode, a frozen backbone has not."""
        return super().train(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activation checkpointing: store only the inputs of blocks, and recompute the rest in the backward pass."""
        self.checkpointing = enable

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Calibrate on images ``[N, C, H, W]`` of the first task, before any other call; most backbones need not."""

    def prefix(self, images: Tensor) -> Prefix | Tensor:
        """The part of a pass that no adapter or block shift changes, without a graph; by default the images."""
        return images

    def entering(self, images: Tensor) -> Tensor:
        """The part of a pass before the first block, without a graph; by default the images."""
        return images

    def stepped(self, start: Prefix | Tensor, step: Step = plain) -> Tensor:
        """Features ``[N, width]``, with the output of every block computed by ``step``.

        Args:
            start: the result of ``prefix`` or ``entering``, or images.
            step: computes the output of a block.
        """
        raise NotImplementedError(f"a {type(self).__name__} has no blocks")

    @abstractmethod
    def forward(self, images: Tensor | Prefix, adapters: Iterable[nn.Module] | None = None) -> Tensor:
        """Features ``[N, width]`` of images or of their prefix, with one adapter per block or without."""

    def whole(self, images: Tensor) -> Tensor:
        """Features ``[N, width]``, with an autograd graph that reaches back to the images."""
        return cast(Tensor, self(images))


def beside(adapters: Iterable[nn.Module]) -> Step:
    """The step that adds an adapter parallel to every block's MLP."""
    stack = list(adapters)

    def adapted(number: int, block: BlockPass, values: Tensor) -> Tensor:
        hidden, output = block.halves(values)
        return block.added(output, stack[number](hidden))

    return adapted


class OpaqueBackbone(Backbone):
    """A backbone of which only inputs and outputs are known: the base of those that are not torch modules.

    Args:
        width: features d.
        image_size: side of the input, pixels.
        widths: of the blocks' residual streams, where adapters can be added; empty: nowhere.
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
