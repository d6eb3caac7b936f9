"""From stored images to network input: named pairs of a training and a test transform.

A transform takes uint8 images ``[C, H, W]``, of one size or many, and returns one float32 batch ``[N, 3, size, size]``.
All randomness comes from the generator that it is given, so a batch depends on (seed, task, epoch, position) only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow.data.preprocessing import Preprocessing
from zeroflow.errors import ConfigError
from zeroflow.registry import Registry

Images = Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class Transform:
    """A training and a test transform that belong together.

    Attributes:
        train: ``(images, size, generator) -> [N, 3, size, size]``, random.
        test: ``(images, size) -> [N, 3, size, size]``, deterministic.
        description: one line for listings.
        with_preprocessing: returns the same pair with the preprocessing of some weights; None: it takes none.
    """

    train: Callable[[Images, int, torch.Generator], Tensor]
    test: Callable[[Images, int], Tensor]
    description: str
    with_preprocessing: Callable[[Preprocessing], Transform] | None = None


transforms: Registry[Transform] = Registry("transform")


def transform_of(name: str, preprocessing: Mapping[str, Any]) -> Transform:
    """The transform registered as ``name``, with the preprocessing of a configuration in normal form.

    Raises:
        ConfigError: the transform is unknown, or it takes no preprocessing.
    """
    transform = transforms.get(name)
    if not preprocessing:
        return transform
    if transform.with_preprocessing is None:
        able = [other for other, known in transforms.items() if known.with_preprocessing]
        raise ConfigError(
            f"preprocessing={dict(preprocessing)!r}: transform {name!r} takes none; {', '.join(able)} does"
        )
    return transform.with_preprocessing(Preprocessing.of(preprocessing))


def to_unit(images: Images) -> Tensor:
    """uint8 ``[C, H, W]`` images of one size -> float32 ``[N, C, H, W]`` in [0, 1]."""
    batch = images if isinstance(images, Tensor) else torch.stack(list(images))
    return batch.float().div_(255)


def as_rgb(batch: Tensor) -> Tensor:
    """Repeat a single grey channel three times; leave three channels unchanged."""
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
    """Rotate, scale, shear, shift and flip every image of a batch independently; the outside is 0 (paper).

    Args:
        batch: float ``[N, C, H, W]``.
        generator: source of all randomness.
        rotation: maximum angle, radians.
        log_scale: the scale is e^U(-log_scale, log_scale).
        shear: maximum horizontal shear.
        shift: maximum shift, in half image widths.
        flip: flip images horizontally with probability 1/2.
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


def fitted(images: Images, size: int) -> Tensor:
    """uint8 images, of one size or of many, -> float32 ``[N, C, size, size]`` in [0, 1]; proportions are not kept."""
    if isinstance(images, Tensor):
        return resized(to_unit(images), size)
    return torch.cat([as_rgb(resized(to_unit(image[None]), size)) for image in images])


def crop_box(
    height: int, width: int, draws: Sequence[Sequence[float]], *, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random box inside an image, as ``(top, left, height, width)`` in pixels: torchvision's RandomResizedCrop.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        draws: four numbers in [0, 1) per try: for the area, the ratio, the top and the left side. The first box that fits is
            taken; if none does, the largest central box with an allowed ratio.
        area: minimum and maximum share of the image.
        ratio: minimum and maximum width / height.
    """
    for share, shape, down, right in draws:
        target = height * width * (area[0] + share * (area[1] - area[0]))
        aspect = math.exp(math.log(ratio[0]) + shape * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    images: Images, size: int, generator: torch.Generator, interpolation: str = "bilinear"
) -> Tensor:
    """Crop a random box (area 5-100 %, ratio 3/4-4/3) of every image, resize it to ``size``, flip it with probability 1/2.

    Args:
        images: uint8 ``[C, H, W]``, of one size or of many.
        size: side of the result, pixels.
        generator: source of all randomness; an image's draws do not depend on the other images' sizes.
        interpolation: one of ``zeroflow.data.preprocessing.INTERPOLATIONS``.

    Returns:
        float32 ``[N, 3, size, size]`` in [0, 1].
    """
    from torchvision.transforms.v2 import functional as photo

    tries = torch.rand((len(images), 10, 4), generator=generator, dtype=torch.float64).tolist()
    mirror = (torch.rand(len(images), generator=generator) < 0.5).tolist()
    batch = torch.empty(len(images), 3, size, size, dtype=torch.float32)  # the one large block: threads wait for memory
    for made, image, draws, mirrored in zip(batch, images, tries, mirror, strict=True):
        height, width = image.shape[-2:]
        box = crop_box(height, width, draws, area=(0.05, 1.0), ratio=(3 / 4, 4 / 3))
        crop = photo.resized_crop(image, *box, [size, size], _resampling(interpolation), antialias=True)
        made.copy_(crop.flip(-1) if mirrored else crop)
    return batch.div_(255)


def center_crop(images: Images, size: int) -> Tensor:
    """Resize the shorter side to ``size`` x 256/224, bicubic, and crop the centre: ``[N, 3, size, size]`` in [0, 1]."""
    from torchvision.transforms.v2 import functional as photo

    def cropped(batch: Tensor) -> Tensor:
        larger = photo.resize(batch, [size * 256 // 224], _resampling("bicubic"), antialias=True)
        return photo.center_crop(larger, [size, size])

    return _each(images, size, cropped)


def evaluation_crop(images: Images, size: int, preprocessing: Preprocessing) -> Tensor:
    """Resize and crop the centre as timm's evaluation transform does: ``[N, 3, size, size]`` in [0, 1]."""
    from torchvision.transforms.v2 import functional as photo

    larger, mode = math.floor(size / preprocessing.crop_pct), preprocessing.crop_mode
    mean = [min(max(round(255 * value), 0), 255) for value in preprocessing.mean]

    def cropped(batch: Tensor) -> Tensor:
        ratio = max(batch.shape[-2:]) / larger
        kept = [max(1, round(side / ratio)) for side in batch.shape[-2:]]
        sides = {"center": [larger], "squash": [larger, larger], "border": kept}[mode]
        batch = photo.resize(batch, sides, _resampling(preprocessing.interpolation), antialias=True)
        if mode == "border":
            down, right = (max(size - side, 0) for side in batch.shape[-2:])
            around = [right // 2, down // 2, (right + 1) // 2, (down + 1) // 2]
            batch = photo.pad(as_rgb(batch), around, fill=mean)
        return photo.center_crop(batch, [size, size])

    return _each(images, size, cropped)


def _each(images: Images, size: int, crop: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``crop`` to uint8 batches ``[n, C, H, W]`` of one size each; returns float32 ``[N, 3, size, size]`` in [0, 1]."""
    if isinstance(images, Tensor):
        return to_unit(as_rgb(crop(images)))
    batch = torch.empty(len(images), 3, size, size, dtype=torch.float32)
    for made, image in zip(batch, images, strict=True):
        made.copy_(crop(image[None])[0])
    return batch.div_(255)


def _resampling(interpolation: str) -> Any:
    """torchvision's name of an interpolation; for nearest, the exact one that uses pixel centres, as Pillow does."""
    from torchvision.transforms.v2 import InterpolationMode

    return InterpolationMode("nearest-exact" if interpolation == "nearest" else interpolation)


def normalised(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    """``(batch - mean) / std`` by channel, in place; ``batch``: float ``[N, 3, H, W]``."""
    mean, std = (batch.new_tensor(colour)[:, None, None] for colour in (preprocessing.mean, preprocessing.std))
    return batch.sub_(mean).div_(std)


def _plain(images: Images, size: int) -> Tensor:
    return as_rgb(fitted(images, size))


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
        train=lambda images, size, generator: as_rgb(random_affine(fitted(images, size), generator)),
        test=_plain,
        description="training: random rotation, scale, shear, shift, mirror; test: divide by 255",
    ),
)
# PILOT's test crop keeps 7/8 of the side whatever the weights, and it feeds them [0, 1]: "pilot" keeps that, to be comparable.
transforms.register(
    "pilot",
    Transform(
        train=random_resized_crop,
        test=center_crop,
        description="photos as in PILOT: random resized crop and mirror; test: resize, centre crop; not normalised",
    ),
)


def _of_weights(preprocessing: Preprocessing) -> Transform:
    """Preprocess photos as the weights expect them."""

    def train(images: Images, size: int, generator: torch.Generator) -> Tensor:
        return normalised(random_resized_crop(images, size, generator, preprocessing.interpolation), preprocessing)

    return Transform(
        train,
        test=lambda images, size: normalised(evaluation_crop(images, size, preprocessing), preprocessing),
        description="photos as the weights expect them: random resized crop and mirror; test: timm's own crop; normalised",
        with_preprocessing=_of_weights,
    )


transforms.register("timm", _of_weights(Preprocessing()))
