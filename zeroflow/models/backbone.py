"""Frozen feature extractors: any timm vision transformer by its full tag, or the embedded one.

Pretrained weights come from the hub where there is a network, or from a local file (safetensors, or a ``.pth`` read with
``weights_only=True``). The embedded backbone is a small ViT whose checkpoint is part of the package.

timm is imported where it is used: it takes longer to import than torch, and planning a grid needs none of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from zeroflow.errors import ConfigError, unknown

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

EMBEDDED = "quickdraw_vit"
"""Name of the embedded backbone."""

Step = Callable[[int, nn.Module, Tensor], Tensor]
"""A block's output ``[N, tokens, d]`` from its number, the block and what enters it."""


class Prefix(NamedTuple):
    """What of a forward pass no adapter can change: shared by all evaluations on the same images.

    Attributes:
        hidden: the first block's residual stream before its MLP, ``[N, tokens, d]``: an adapter's input.
        output: the first block's output without an adapter, ``[N, tokens, d]``.
    """

    hidden: Tensor
    output: Tensor


class FrozenLinear(nn.Linear):
    """A linear layer that takes oneDNN's kernel while its weights are frozen: the same numbers to float32 rounding.

    ATen's own float32 path calls MKL, which leaves about half the speed of some x86 processors unused
    (``benchmarks/frozen_linear.py``).
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _ONEDNN or self.weight.requires_grad or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        # Nowhere else: a function of its own makes a node of a graph even where nothing asks for one.
        if (torch.is_grad_enabled() and input.requires_grad) or forward_ad._current_level >= 0:
            return cast(Tensor, _Product.apply(input, self.weight, self.bias))
        return _product(input, self.weight, self.bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], ""))


class _Product(torch.autograd.Function):
    """oneDNN's linear layer with frozen weights: differentiable with respect to its input, backwards and forwards."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradients[0].contiguous(), weight.t(), None), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return _product(tangents[0], weight, None)


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


class Backbone(nn.Module):
    """A frozen timm vision transformer that can be run with an adapter stack beside its MLPs.

    ``backbone(images, adapters)`` gives the feature ``[N, width]``: the class token (or the pooled tokens, as the model's
    own configuration says) after the final norm.
    """

    unseen_bytes: int | None = 0
    """Bytes of weights that are in no tensor of the module; None: nor is it known what a forward pass needs besides."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False).eval()
        for module in self.vit.modules():
            if type(module) is nn.Linear:
                module.__class__ = FrozenLinear

        self.checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Where a graph is built, store what enters each block only and compute the rest again on the way back."""
        self.checkpointing = enable

    @property
    def like(self) -> Tensor:
        """A tensor of the precision and on the device that it computes in."""
        return next(self.parameters())

    @property
    def width(self) -> int:
        """Features d."""
        return int(self.vit.num_features)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    @property
    def image_size(self) -> int:
        """Side of the square input, pixels."""
        return int(self.vit.patch_embed.img_size[0])

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: a frozen backbone has no training behaviour, only adapters and heads have."""
        return super().train(False)

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Get to know images ``[N, C, H, W]`` of the first task, before anything else is asked; most need not."""

    def emitted(self, number: int, values: Tensor) -> Tensor:
        """What leaves block ``number``, or (``depth``) the whole as features, of what it has computed: all of it."""
        return values

    def tokens(self, images: Tensor) -> Tensor:
        """What enters the first block, ``[N, tokens, width]``; ``images`` ``[N, C, H, W]``."""
        vit = self.vit
        return cast(Tensor, vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))))

    def prefix(self, images: Tensor) -> Prefix:
        """The part before the first adapter, without a graph."""
        with torch.no_grad():
            return Prefix(*_halves(self.vit.blocks[0], self.tokens(images)))

    def forward(self, images: Tensor | Prefix, adapters: Iterable[nn.Module] | None = None) -> Tensor:
        """Features ``[N, width]`` of images or of their prefix, with an adapter per block or without."""
        first = images if isinstance(images, Prefix) else self.prefix(images)
        stack = list(adapters) if adapters is not None else [None] * self.depth

        def adapted(number: int, block: nn.Module, tokens: Tensor) -> Tensor:
            hidden, output = _halves(block, tokens)
            return output if (adapter := stack[number]) is None else output + cast(Tensor, adapter(hidden))

        tokens = first.output if stack[0] is None else first.output + stack[0](first.hidden)
        return self.pooled(self.through(self.emitted(0, tokens), adapted, first=1))

    def through(self, tokens: Tensor, step: Step | None = None, *, first: int = 0) -> Tensor:
        """Tokens behind the last block, ``[N, tokens, width]``.

        Args:
            tokens: what enters block ``first``. step: ``step(number, block, tokens)`` gives a block's output; default: the
                block itself.
        """
        step = step or _plain
        for number, block in enumerate(self.vit.blocks[first:], start=first):
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(step, number, block, tokens, use_reentrant=False)
            else:
                tokens = step(number, block, tokens)
            tokens = self.emitted(number, tokens)
        return tokens

    def whole(self, images: Tensor) -> Tensor:
        """Features ``[N, width]``, where a graph is built from the images on."""
        return self.pooled(self.through(self.tokens(images)))

    def pooled(self, tokens: Tensor) -> Tensor:
        """The feature ``[N, width]`` from the tokens behind the last block."""
        features = cast(Tensor, self.vit.forward_head(self.vit.norm(tokens), pre_logits=True))
        return self.emitted(self.depth, features)


class Closed(Backbone):
    """A backbone of which nothing but what goes in and comes out is known: the base of those that are not torch's.

    Args:
        width: features d. image_size: pixels. depth: blocks, where adapters may stand beside them.
    """

    def __init__(self, width: int, image_size: int, depth: int = 0) -> None:
        nn.Module.__init__(self)
        self._width, self._image_size, self._depth = width, image_size, depth
        self.checkpointing = False
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    @property
    def like(self) -> Tensor:
        return cast(Tensor, self._like)

    @property
    def width(self) -> int:
        return self._width

    @property
    def depth(self) -> int:
        return self._depth

    @property
    def image_size(self) -> int:
        return self._image_size

    def whole(self, images: Tensor) -> Tensor:
        return self(images)


def _halves(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A transformer block's residual stream after attention, and its output."""
    hidden = tokens + block.ls1(block.attn(block.norm1(tokens)))
    return hidden, hidden + block.ls2(block.mlp(block.norm2(hidden)))


def _plain(number: int, block: nn.Module, tokens: Tensor) -> Tensor:
    return _halves(block, tokens)[1]


def embedded_architecture() -> tuple[str, dict[str, Any]]:
    """timm name and arguments of the embedded backbone: width 192, depth 6, 3 heads, 28 x 28 in 7 x 7 patches."""
    return "vit_tiny_patch16_224", {"img_size": 28, "patch_size": 7, "depth": 6}


def build_timm(name: str, arguments: dict[str, Any], *, pretrained: bool = False) -> VisionTransformer:
    """Build a headless timm vision transformer, with random weights or the hub's.

    Raises:
        ConfigError: no such model, not a plain vision transformer, arguments it does not take, or no weights to be had.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        raise unknown("backbone", name, [EMBEDDED, *timm.list_models(), *timm.list_pretrained()])
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except Exception as error:
        raise ConfigError(f"backbone {name!r} with {arguments}: {error}") from error
    if not isinstance(model, VisionTransformer) or getattr(model, "dist_token", None) is not None:
        raise ConfigError(
            f"backbone {name!r} is a {type(model).__name__}; expected a plain vision transformer of timm's"
        )
    return model


@functools.cache
def _load_entry_points() -> None:
    """Modules of other packages that register models with timm: the group ``zeroflow.backbones``."""
    for entry_point in entry_points(group="zeroflow.backbones"):
        entry_point.load()


@functools.cache
def check_backbone(name: str, checkpoint: str | None) -> None:
    """Refuse an unknown name or a checkpoint that is not there, without building anything."""
    if name != EMBEDDED:
        import timm

        _load_entry_points()
        if not timm.is_model(name):
            raise unknown("backbone", name, [EMBEDDED, *timm.list_models(), *timm.list_pretrained()])
        architecture, _, tag = name.partition(".")
        if tag and name not in timm.list_pretrained(architecture + ".*"):
            raise unknown("backbone", name, timm.list_pretrained(architecture + "*"))
    if checkpoint not in (None, "none", "hub") and not Path(str(checkpoint)).is_file():
        raise ConfigError(f"checkpoint: no file {checkpoint!r}; expected .safetensors or .pth, 'hub', or 'none'")


@functools.cache
def default_image_size(name: str) -> int | None:
    """Side of the input that a backbone takes if none is asked for, pixels; None where only building it tells."""
    if name == EMBEDDED:
        return int(embedded_architecture()[1]["img_size"])
    import timm

    _load_entry_points()
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return int(settings.input_size[-1]) if settings is not None else None


@functools.cache
def preprocessing_of(name: str) -> Mapping[str, Any]:
    """What a backbone's weights expect of images, by the keys of ``zeroflow.data.Preprocessing``: those that its timm tag names."""
    if name == EMBEDDED:  # see ``pretrain``: whole drawings in [0, 1]
        return {
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
    import timm

    _load_entry_points()
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {key: value for key in keys if (value := getattr(settings, key, None))}


@functools.cache
def check_buildable(name: str, checkpoint: str | None, image_size: int | None) -> None:
    """Refuse a backbone that cannot be built, or a local checkpoint that cannot be read or does not fit; downloads nothing."""
    local = checkpoint if checkpoint not in (None, "hub") or name == EMBEDDED else "none"
    create_backbone(name, checkpoint=local, image_size=image_size)


def create_backbone(
    name: str = EMBEDDED,
    *,
    checkpoint: str | None = None,
    image_size: int | None = None,
    channels: int = 3,
    seed: int = 0,
) -> Backbone:
    """Build a frozen backbone.

    Args:
        name: ``"quickdraw_vit"`` or any timm vision transformer, best with its full tag.
        checkpoint: a ``.safetensors`` or ``.pth`` file; ``"hub"``: download; ``"none"``: random weights from ``seed``.
            Default: the embedded checkpoint for the embedded backbone, the hub for any other.
        image_size: side of the input in pixels; default: the model's own.
        channels: input channels.
        seed: of random weights.

    Raises:
        ConfigError: unknown name, weights that cannot be read, or that do not fit the model.
    """
    check_backbone(name, checkpoint)
    arguments: dict[str, Any] = {} if channels == 3 else {"in_chans": channels}
    source = checkpoint or ("embedded" if name == EMBEDDED else "hub")
    if name == EMBEDDED:
        if source == "hub":
            raise ConfigError(f"checkpoint: {EMBEDDED!r} is not on the hub; leave checkpoint out for the embedded file")
        name, embedded = embedded_architecture()
        arguments = {**embedded, **arguments}
    if image_size is not None:
        arguments["img_size"] = image_size
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vit = build_timm(name, arguments, pretrained=source == "hub")
    if source == "embedded":
        with resources.as_file(resources.files("zeroflow.models").joinpath(f"embedded/{EMBEDDED}.safetensors")) as file:
            load_checkpoint(vit, file)
    elif source not in ("hub", "none"):
        load_checkpoint(vit, Path(source))
    return Backbone(vit)


def load_checkpoint(vit: VisionTransformer, path: Path) -> None:
    """Load a state dict with timm's parameter names into ``vit``; head weights are ignored, anything else must fit.

    Raises:
        ConfigError: the file cannot be read, a weight is not finite, or a parameter is missing, unknown or of another shape.
    """
    import safetensors.torch
    from timm.models import adapt_input_conv
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"checkpoint {path}: cannot be read: {error}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"checkpoint {path}: expected a state dict of tensors with timm's parameter names")
    state = {key: value.float() for key, value in state.items() if not key.startswith(("head.", "head_dist."))}
    if broken := [key for key, value in state.items() if not value.isfinite().all()]:
        raise ConfigError(f"checkpoint {path}: weights that are not finite: {', '.join(broken[:10])}")
    try:
        # timm's own rules for another image size, patch size or number of channels than the file's.
        projection = "patch_embed.proj.weight"
        if projection in state and state[projection].ndim == 4:
            state[projection] = adapt_input_conv(vit.patch_embed.proj.in_channels, state[projection])
        vit.load_state_dict(checkpoint_filter_fn(state, vit))
    except Exception as error:
        raise ConfigError(f"checkpoint {path}: does not fit the model: {error}") from error
