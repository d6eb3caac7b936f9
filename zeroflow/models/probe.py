"""Check before any work that a backbone supports a tuning, by trying it, without downloading anything.

A backbone whose weights are on this machine is built as in a cell; of any other, only the architecture is built, on torch's
meta device, which computes shapes without numbers. Then two blank images pass through the tuning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from zeroflow.errors import ConfigError
from zeroflow.models.access import accesses
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import EMBEDDED, brings_weights, create_backbone, default_image_size
from zeroflow.models.timm_backbone import TransformerBackbone
from zeroflow.models.tuning import create_tuning

IMAGES = 2
Found = TypeVar("Found")


def check_tuning(
    name: str,
    checkpoint: str | None,
    image_size: int | None,
    access: str | None,
    tuning: str,
    settings: Mapping[str, Any],
) -> None:
    """Refuse a tuning that would fail in the cell.

    Args:
        name: of the backbone, as in ``create_backbone``.
        checkpoint: as in ``create_backbone``.
        image_size: as in ``create_backbone``.
        access: a name in ``accesses``; None: white-box.
        tuning: a name in ``tunings``.
        settings: all options of the tuning.

    Raises:
        ConfigError: the backbone cannot be built, its weights do not fit, it lacks what the tuning needs, or a forward pass
            fails.
    """
    given = tuple(sorted((key, value) for key, value in settings.items() if isinstance(value, int | float | str)))
    _check_tuning(name, checkpoint, image_size, access, tuning, given)


@functools.cache
def _check_tuning(
    name: str,
    checkpoint: str | None,
    image_size: int | None,
    access: str | None,
    tuning: str,
    settings: tuple[tuple[str, Any], ...],
) -> None:
    backbone = _built(name, checkpoint, image_size)
    where = f"backbone {name!r}"
    way = accesses[access or "white-box"]
    if way.transformers_only and not isinstance(backbone, TransformerBackbone):
        raise ConfigError(f"access={access!r} with {where}: {way.transformers_only}")
    if why := way.lacks(backbone, tuning):
        able = ", ".join(way.able(backbone))
        raise ConfigError(f"{where}: it cannot be tuned by {tuning!r}: {why}; it can by {able}")
    try:
        shape = _tried(backbone, name, image_size, lambda built: _pass(built, tuning, dict(settings)))
    except ConfigError:
        raise
    except Exception as error:
        own = default_image_size(name)
        right = f"; its own images have {own}" if own not in (None, backbone.image_size) else ""
        raise ConfigError(
            f"{where} with {IMAGES} images of {backbone.image_size} pixels, tuned by {tuning!r}: {_line(error)}{right}"
        ) from error
    if shape != (IMAGES, backbone.width):
        raise ConfigError(
            f"{where}: {IMAGES} images give {shape}; expected features of shape {(IMAGES, backbone.width)}"
        )


def check_buildable(name: str, checkpoint: str | None, image_size: int | None) -> None:
    """Refuse a backbone that cannot be built, or a local checkpoint that cannot be read or does not fit; see ``check_tuning``."""
    check_tuning(name, checkpoint, image_size, None, "none", {})


class Anatomy(NamedTuple):
    """Properties of a backbone: number of parameters and of features, side of its images in pixels, supported tunings."""

    parameters: int
    width: int
    image_size: int
    tunings: Sequence[str]


def anatomy(name: str) -> Anatomy:
    """Properties of a backbone without a head, with its default image size.

    Raises:
        ConfigError: it is unknown, or cannot be built here.
    """
    backbone = _built(name, None, None)
    try:
        return _tried(backbone, name, None, _anatomy)
    except Exception as error:
        raise ConfigError(f"backbone {name!r}: {_line(error)}") from error


def _anatomy(backbone: Backbone) -> Anatomy:
    values = sum(parameter.numel() for parameter in backbone.parameters())
    return Anatomy(values, backbone.width, backbone.image_size, accesses["white-box"].able(backbone))


def _tried(backbone: Backbone, name: str, image_size: int | None, look: Callable[[Backbone], Found]) -> Found:
    """The result of ``look``; with real numbers if it fails on the meta device, which has none."""
    try:
        return look(backbone)
    except ConfigError:
        raise
    except Exception:
        if not _meta(backbone):
            raise
        return look(_built_here(name, image_size))


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _meta(backbone: Backbone) -> bool:
    return backbone.like.device.type == "meta"


def _pass(backbone: Backbone, tuning: str, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the features of two blank images."""
    like, channels = backbone.like, getattr(backbone, "channels", 3)
    made = create_tuning(tuning, backbone, torch.Generator().manual_seed(0), settings).eval()
    if _meta(backbone):
        made = made.to("meta")
    images = torch.zeros(
        IMAGES, channels, backbone.image_size, backbone.image_size, device=like.device, dtype=like.dtype
    )
    with torch.no_grad():
        return tuple(made(backbone, made.prefix(backbone, images)).shape)


@functools.lru_cache(maxsize=2)
def _built(name: str, checkpoint: str | None, image_size: int | None) -> Backbone:
    if checkpoint not in (None, "hub", "none") or name == EMBEDDED or brings_weights(name):
        return create_backbone(name, checkpoint=checkpoint, image_size=image_size)
    try:
        with torch.device("meta"):
            return create_backbone(name, checkpoint="none", image_size=image_size)
    except Exception:
        return _built_here(name, image_size)


def _built_here(name: str, image_size: int | None) -> Backbone:
    return create_backbone(name, checkpoint="none", image_size=image_size)
