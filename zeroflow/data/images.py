"""Decode compressed images to RGB pixels."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zeroflow.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(source: Path | bytes, name: str) -> Tensor:
    """Decode an image of any colour mode to uint8 RGB ``[3, H, W]``, with channels last in memory.

    Transparency is dropped, the EXIF orientation is ignored, and of an animation the first frame is used, all as in
    torchvision's loader and hence PILOT. Of 16 bits the upper 8 are used, where that loader turns nearly everything white.

    Args:
        source: a file, or its content.
        name: of the image, for messages.

    Raises:
        ConfigError: the file is missing, truncated, damaged, or not an image, or its values have no known range.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            pixels = np.array(_rgb(image))
    except Exception as error:  # what a damaged file raises depends on its decoder
        reason = "of no known kind" if isinstance(error, UnidentifiedImageError) else error
        raise ConfigError(f"{name}: cannot be read as an image: {reason}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


_FEW_BITS = 14
"""Of an image of 16 bits: so few are those of a camera's sensor, or of a dark image."""


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I"):
        wide = np.array(image)
        if wide.min() < 0 or wide.max() > 0xFFFF:
            raise ValueError("values beyond 16 bits")
        if 0 < wide.max() <= 0xFF:
            raise ValueError(
                f"values of at most {wide.max()}, of which the upper 8 of 16 bits are 0; expected 16 bits, or a file of 8"
            )
        if 0 < (bits := int(wide.max()).bit_length()) <= _FEW_BITS:
            warnings.warn(
                f"16-bit images whose values take {bits} bits: their upper 8 are taken, so that no pixel is brighter than "
                f"{wide.max() >> 8} of 255; if the camera has {bits} bits, scale the files to 16",
                stacklevel=2,
            )
        return Image.fromarray((wide.astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point values of unknown range")
    with warnings.catch_warnings():
        # Of palettes whose transparency is a list of bytes Pillow says that RGBA suits them better; that is dropped here.
        warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)
        return image.convert("RGB")
