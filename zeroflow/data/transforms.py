"""From stored images to network input: named pairs of a training and a test transform.

A transform takes uint8 images ``[C, H, W]``, of one size or many, and gives one float32 batch ``[N, 3, size, size]``.
What is random in it is drawn from the generator it is handed, so a batch depends on (seed, task, epoch, position) and
on nothing else.
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
        height, width: of the image.
        draws: per try four numbers in [0, 1): for the area, the ratio, the top and the left side. The first try whose
            box fits is taken; if none does, the largest box in the middle with a permitted ratio.
        area: smallest and largest share of the image. ratio: smallest and largest width / height.
    """
    for share, shape, down, right in draws:
        target = height * width * (area[0] + share * (area[1] - area[0]))
        aspect = math.exp(math.log(ratio[0]) + shape * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(images: Images, size: int, generator: torch.Generator) -> Tensor:
    """Cut a random box (area 5-100 %, ratio 3/4-4/3) out of every image, fit it to ``size``, mirror it or not (1 : 1).

    Args:
        images: uint8 ``[C, H, W]``, of one size or of many. size: pixels of the result, square.
        generator: source of all randomness; an image's draws do not depend on the other images' sizes.

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
        crop = photo.resized_crop(image, *box, [size, size], antialias=True)
        made.copy_(crop.flip(-1) if mirrored else crop)
    return batch.div_(255)


def center_crop(images: Images, size: int) -> Tensor:
    """Resize the shorter side to ``size`` x 256/224, bicubic, and take the middle: ``[N, 3, size, size]`` in [0, 1]."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as photo

    def cropped(batch: Tensor) -> Tensor:
        larger = photo.resize(batch, [size * 256 // 224], InterpolationMode.BICUBIC, antialias=True)
        return photo.center_crop(larger, [size, size])

    if isinstance(images, Tensor):
        return to_unit(as_rgb(cropped(images)))
    batch = torch.empty(len(images), 3, size, size, dtype=torch.float32)
    for made, image in zip(batch, images, strict=True):
        made.copy_(cropped(image[None])[0])
    return batch.div_(255)


def normalised(batch: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], in place: mean = std = 0.5, from the ``pretrained_cfg`` of timm's ``augreg`` checkpoints."""
    return batch.sub_(0.5).div_(0.5)


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
# Both crop as PILOT does: the test crop keeps 7/8 of the side, where the checkpoints' pretrained_cfg says 0.9. PILOT
# feeds [0, 1] to checkpoints made for [-1, 1]: "pilot" keeps that, to be comparable; "timm" puts it right.
transforms.register(
    "pilot",
    Transform(
        train=random_resized_crop,
        test=center_crop,
        description="photos as in PILOT: random resized crop and mirror; test: resize, centre crop; not normalised",
    ),
)
transforms.register(
    "timm",
    Transform(
        train=lambda images, size, generator: normalised(random_resized_crop(images, size, generator)),
        test=lambda images, size: normalised(center_crop(images, size)),
        description="as pilot, then normalised with mean = std = 0.5, as timm's augreg checkpoints expect",
    ),
)
