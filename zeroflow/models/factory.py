"""Backbones by name: the embedded one, any timm model, a file of ``torch.export``, or one of another package.

Pretrained weights come from the hub, or from a local file (``zeroflow.models.weights``). The embedded backbone is a small ViT
whose checkpoint ships with the package.

timm is imported inside functions: it takes longer to import than torch, and planning a grid needs little of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroflow.errors import ConfigError, unknown
from zeroflow.models.backbone import Backbone
from zeroflow.models.own import EXPORTED, ModuleBackbone, open_exported
from zeroflow.models.timm_backbone import TimmBackbone, TransformerBackbone
from zeroflow.models.weights import load_weights

EMBEDDED = "quickdraw_vit"
"""Name of the embedded backbone."""


def embedded_architecture() -> tuple[str, dict[str, Any]]:
    """timm name and arguments of the embedded backbone: width 192, depth 6, 3 heads, 28 x 28 in 7 x 7 patches."""
    return "vit_tiny_patch16_224", {"img_size": 28, "patch_size": 7, "depth": 6}


def build_timm(name: str, arguments: dict[str, Any], *, pretrained: bool = False) -> Any:
    """Build a headless timm model, with random weights or the hub's; ``img_size`` is omitted where a model takes any size.

    Raises:
        ConfigError: the model is unknown, does not take the arguments, or its weights are not available.
    """
    import timm

    if not timm.is_model(name):
        raise unknown("backbone", name, _names())
    try:
        return _created(name, {"pretrained": pretrained, "num_classes": 0}, arguments)
    except Exception as error:
        raise ConfigError(f"backbone {name!r} with {arguments}: {error}") from error


@torch.no_grad()
def _created(name: str, settings: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """timm's model; without a graph, as some scale their weights while they are built."""
    import timm

    try:
        return timm.create_model(name, **settings, **arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        free = {key: value for key, value in arguments.items() if key != "img_size"}
        return timm.create_model(name, **settings, **free)


@functools.cache
def own_backbones() -> dict[str, Callable[[], nn.Module]]:
    """Backbones of other packages: the entry points ``zeroflow.backbones``.

    A callable builds a module that maps images ``[N, 3, H, W]`` to features ``[N, d]``, under the name of the entry point; a
    Python module is only imported, so that it can register models with timm.
    """
    found = {point.name: point.load() for point in entry_points(group="zeroflow.backbones")}
    return {name: build for name, build in found.items() if callable(build)}


def non_timm_names() -> list[str]:
    """Names of the embedded backbone and of those of other packages."""
    return [EMBEDDED, *own_backbones()]


def _names() -> list[str]:
    """All known names, for error messages."""
    import timm

    return [*non_timm_names(), *timm.list_models(), *timm.list_pretrained()]


@functools.cache
def check_backbone(name: str, checkpoint: str | None) -> None:
    """Refuse an unknown name or a missing checkpoint, without building anything."""
    if name.endswith(EXPORTED):
        if not Path(name).is_file():
            raise ConfigError(f"backbone: no file {name!r}; expected a program saved by torch.export")
    elif name != EMBEDDED and name not in own_backbones():
        import timm

        if not timm.is_model(name):
            raise unknown("backbone", name, _names())
        architecture, _, tag = name.partition(".")
        if tag and name not in timm.list_pretrained(architecture + ".*"):
            raise unknown("backbone", name, timm.list_pretrained(architecture + "*"))
    if brings_weights(name) and checkpoint is not None:
        raise ConfigError(f"checkpoint={checkpoint!r}: backbone {name!r} brings its own weights; leave checkpoint out")
    if checkpoint not in (None, "none", "hub") and not Path(str(checkpoint)).is_file():
        raise ConfigError(
            f"checkpoint: no file {checkpoint!r}; expected a file of weights (.safetensors, .pth, .bin, ...), 'hub', or 'none'"
        )


def brings_weights(name: str) -> bool:
    """Whether a backbone comes with its own weights, so that it takes no checkpoint."""
    return name.endswith(EXPORTED) or name in own_backbones()


@functools.cache
def default_image_size(name: str) -> int | None:
    """Default side of a backbone's input, pixels; None where it is known only once the backbone is built."""
    if name == EMBEDDED:
        return int(embedded_architecture()[1]["img_size"])
    settings = _timm_settings(name)
    return int(settings.input_size[-1]) if settings is not None else None


@functools.cache
def preprocessing_of(name: str) -> Mapping[str, Any]:
    """The preprocessing that a backbone's weights expect, by the keys of ``zeroflow.data.Preprocessing``, from its timm tag."""
    if name == EMBEDDED:  # see ``pretrain``: whole drawings in [0, 1]
        whole = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
        return {"mean": [0.0] * 3, "std": [1.0] * 3, **whole}
    settings, keys = _timm_settings(name), ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {key: value for key in keys if (value := getattr(settings, key, None))}


def _timm_settings(name: str) -> Any:
    """timm's pretrained configuration of a name; None where there is none, as for your own modules and endpoints."""
    if brings_weights(name):
        return None
    import timm

    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:  # an architecture that it knows, with a tag that it does not
        return None


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
        name: ``"quickdraw_vit"``; any timm model, best with its full tag; a ``.pt2`` file of ``torch.export``; or an entry
            point of another package.
        checkpoint: a file of weights; ``"hub"``: download; ``"none"``: random weights from ``seed``.
            Default: the embedded checkpoint for the embedded backbone, the hub for any other timm model.
        image_size: side of the input in pixels; default: the model's own.
        channels: input channels.
        seed: of random weights.

    Raises:
        ConfigError: the name is unknown, the weights cannot be read or do not fit the model, or images are smaller than a patch.
    """
    check_backbone(name, checkpoint)
    if name.endswith(EXPORTED):
        return open_exported(Path(name), image_size, channels)
    if name in own_backbones():
        return ModuleBackbone(own_backbones()[name](), name, image_size, channels)
    arguments: dict[str, Any] = {} if channels == 3 else {"in_chans": channels}
    source = checkpoint or ("embedded" if name == EMBEDDED else "hub")
    architecture = name
    if name == EMBEDDED:
        if source == "hub":
            raise ConfigError(f"checkpoint: {EMBEDDED!r} is not on the hub; leave checkpoint out for the embedded file")
        architecture, embedded = embedded_architecture()
        arguments = {**embedded, **arguments}
    if image_size is not None:
        arguments["img_size"] = image_size
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build_timm(architecture, arguments, pretrained=source == "hub")
    _check_patch(model, name, image_size)
    if source == "embedded":
        with resources.as_file(resources.files("zeroflow.models").joinpath(f"embedded/{EMBEDDED}.safetensors")) as file:
            load_weights(model, file)
    elif source not in ("hub", "none"):
        load_weights(model, Path(source))
    return wrapped(model, image_size or default_image_size(name), channels)


def _check_patch(model: Any, name: str, image_size: int | None) -> None:
    """Refuse images of which a vision transformer would see nothing, or not the last rows and columns."""
    embedding = getattr(model, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    if image_size is None or not isinstance(patch, tuple) or image_size == default_image_size(name):
        return
    side = max(patch)
    if image_size < side:
        raise ConfigError(
            f"image_size={image_size}: smaller than a patch of backbone {name!r}, {side} pixels; its own images have "
            f"{default_image_size(name)}"
        )
    if (over := image_size % side) and not getattr(embedding, "dynamic_img_pad", False):
        raise ConfigError(
            f"image_size={image_size}: backbone {name!r} cuts images into patches of {side} pixels and would not see the last "
            f"{over} rows and columns; expected a multiple of {side}, such as {image_size - over} or {image_size - over + side}"
        )


def wrapped(model: Any, image_size: int | None = None, channels: int = 3) -> TimmBackbone:
    """Wrap a timm model as a backbone; the image size is optional where the model has its own."""
    from timm.models.vision_transformer import VisionTransformer

    # One with a forward pass of its own is not the sum of its blocks.
    timms = VisionTransformer.forward_features
    if isinstance(model, VisionTransformer) and getattr(model.forward_features, "__func__", None) is timms:
        return TransformerBackbone(model, channels=channels)
    embedding = getattr(model, "patch_embed", None)
    sides = getattr(embedding, "img_size", None) or model.pretrained_cfg["input_size"][1:]
    return TimmBackbone(model, image_size or int(sides[0]), channels)
