"""Domain shifts of the embedded stream: the same drawings, rendered in another way.

The embedded backbone was trained on thin white strokes on black paper. A shift is a deterministic rendering of all drawings,
training and test alike; class means of frozen features lose accuracy, so a method can gain some. There are several shifts,
since one alone would prove little: a blur undoes a broad marker by construction, but not a rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow.data.dataset import ArraySamples, ImageDataset, Samples, register_dataset
from zeroflow.data.quickdraw import STREAM_CLASSES, quickdraw100

NOISE_SEED = 1993
NOISE_SHARE = 0.1

Render = Callable[[Tensor], Tensor]
"""Maps drawings uint8 ``[N, 1, H, W]`` to drawings of the same shape."""


def marker(drawings: Tensor) -> Tensor:
    """Every stroke a pixel wider on each side: the maximum over 3 x 3 pixels."""
    return F.max_pool2d(drawings.float(), 3, stride=1, padding=1).to(torch.uint8)


def thin(drawings: Tensor) -> Tensor:
    """Every stroke a pixel thinner: the minimum over 2 x 2 pixels."""
    return 255 - F.max_pool2d(255 - F.pad(drawings.float(), (0, 1, 0, 1)), 2, stride=1).to(torch.uint8)


def negative(drawings: Tensor) -> Tensor:
    """Black strokes on white paper."""
    return 255 - drawings


def noise(drawings: Tensor) -> Tensor:
    """A tenth of the pixels black or white at random (salt and pepper), other pixels for every drawing."""
    # Keyed on the number of drawings too: training and test drawings must not share their noise.
    generator = np.random.Generator(np.random.Philox(key=np.array([NOISE_SEED, len(drawings)], np.uint64)))
    hit = torch.from_numpy(generator.random(tuple(drawings.shape), dtype=np.float32))
    return drawings.masked_fill(hit < NOISE_SHARE / 2, 0).masked_fill(hit > 1 - NOISE_SHARE / 2, 255)


def coarse(drawings: Tensor) -> Tensor:
    """Half the resolution: the mean over blocks of 2 x 2 pixels in all four of them."""
    return F.avg_pool2d(drawings.float(), 2).repeat_interleave(2, -1).repeat_interleave(2, -2).to(torch.uint8)


def rotated(drawings: Tensor) -> Tensor:
    """A quarter turn."""
    return drawings.rot90(1, (-2, -1)).contiguous()


SHIFTS: Mapping[str, tuple[Render, str]] = {
    "marker": (marker, "drawn with a broad marker: every stroke a pixel wider on each side"),
    "thin": (thin, "drawn with a finer pen: every stroke a pixel thinner"),
    "negative": (negative, "as a negative: black strokes on white paper"),
    "noise": (noise, "with salt and pepper on a tenth of the pixels"),
    "coarse": (coarse, "at half the resolution, in blocks of 2 x 2 pixels"),
    "rotated": (rotated, "turned by 90 degrees"),
}
"""Rendering and one line of description, by the last part of the data set's name."""


def _register(name: str, render: Render, how: str) -> None:
    @register_dataset(
        f"quickdraw100-{name}",
        classes=STREAM_CLASSES,
        transform="drawings",
        image_size=28,
        where="shipped with zeroflow",
        description=f"QuickDraw-100 {how}",
    )
    def load(data_dir: Path | None = None) -> ImageDataset:
        plain = quickdraw100(data_dir)

        def rendered(samples: Samples) -> ArraySamples:
            drawings = samples.images(np.arange(len(samples.labels)))
            assert isinstance(drawings, Tensor)
            return ArraySamples(render(drawings), samples.labels)

        return ImageDataset(f"quickdraw100-{name}", plain.class_names, rendered(plain.train), rendered(plain.test))


for _name, (_render, _how) in SHIFTS.items():
    _register(_name, _render, _how)
