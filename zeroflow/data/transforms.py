"""From stored images to network input: named pairs of a training and a test transform.

A transform takes a list of uint8 images ``[C, H, W]`` and gives one float32 batch ``[N, 3, size, size]``. What is random
in it is drawn from the generator it is handed, so a batch depends on (seed, task, epoch, position) and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow.registry import Registry

Images = Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class Transform:
    """A training and a test transform that belong together.

    Attributes:
        train: ``(images, size, generator) -> [N, 3, size, size]``, random.
        test: ``(images, size) -> [N, 3, size, size]``, deterministic.
        description: one line for listings.
    """

    train: Callable[[Images, int, torch.Generator], Tensor]
    test: Callable[[Images, int], Tensor]
    description: str


transforms: Registry[Transform] = Registry("transform")


def to_unit(images: Images) -> Tensor:
    """uint8 ``[C, H, W]`` images of one size -> float32 ``[N, C, H, W]`` in [0, 1]."""
    batch = images if isinstance(images, Tensor) else torch.stack(list(images))
    return batch.float().div_(255)


def as_rgb(batch: Tensor) -> Tensor:
    """Repeat a single grey channel to three; three channels pass unchanged."""
    return batch.expand(-1, 3, -1, -1).contiguous() if batch.shape[1] == 1 else batch


def resized(batch: Tensor, size: int) -> Tensor:
    """Bilinear resize to ``size`` x ``size``; an exact copy where the batch has that size already."""
    if batch.shape[-2:] == (size, size):
        return batch
    return F.interpolate(batch, (size, size), mode="bilinear", align_corners=False, antialias=True)


def random_affine(
    batch: Tensor,
    generator: torch.Generator,
    *,
    rotation: float = 0.26,
    log_scale: float = 0.2,
    shear: float = 0.15,
    shift: float = 0.15,
    flip: bool = True,
) -> Tensor:
    """Rotate, scale, shear, shift and mirror every image of a batch on its own; outside is 0 (paper).

    Args:
        batch: float ``[N, C, H, W]``.
        generator: source of all randomness.
        rotation: largest angle, radians. log_scale: scale is e^U(-log_scale, log_scale).
        shear: largest horizontal shear. shift: largest shift, in half image widths. flip: mirror every second image.
    """
    n = batch.shape[0]
    draw = torch.rand((6, n), generator=generator) * 2 - 1
    angle, scale = draw[0] * rotation, torch.exp(draw[1] * log_scale)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    sheared = draw[2] * shear
    mirror = torch.where(draw[5] > 0, -1.0, 1.0) if flip else torch.ones(n)
    theta = torch.empty(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 0, 2] = cos * mirror, cos * sheared - sin, draw[3] * shift
    theta[:, 1, 0], theta[:, 1, 1], theta[:, 1, 2] = sin * mirror, sin * sheared + cos, draw[4] * shift
    grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
    return F.grid_sample(batch, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def random_erasing(
    batch: Tensor, generator: torch.Generator, *, probability: float = 0.25, area: tuple[float, float] = (0.02, 0.2)
) -> Tensor:
    """Blank one random rectangle (share of the image in ``area``, ratio 1/2-2) in some images of a batch."""
    n, _, height, width = batch.shape
    draw = torch.rand((5, n), generator=generator)
    size = area[0] + draw[1] * (area[1] - area[0])
    ratio = torch.exp((draw[2] * 2 - 1) * math.log(2))
    h, w = torch.sqrt(size * ratio) * height, torch.sqrt(size / ratio) * width
    top, left = draw[3] * (height - h), draw[4] * (width - w)
    y, x = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
    inside = (y >= top[:, None, None]) & (y < (top + h)[:, None, None])
    inside = inside & (x >= left[:, None, None]) & (x < (left + w)[:, None, None])
    erase = inside & (draw[0] < probability)[:, None, None]
    return batch.masked_fill(erase[:, None], 0.0)


def _plain(images: Images, size: int) -> Tensor:
    return as_rgb(resized(to_unit(images), size))


transforms.register(
    "plain",
    Transform(
        train=lambda images, size, generator: _plain(images, size),
        test=_plain,
        description="resize and divide by 255, training and test alike",
    ),
)
transforms.register(
    "drawings",
    Transform(
        train=lambda images, size, generator: as_rgb(random_affine(resized(to_unit(images), size), generator)),
        test=_plain,
        description="training: random rotation, scale, shear, shift, mirror; test: divide by 255",
    ),
)
