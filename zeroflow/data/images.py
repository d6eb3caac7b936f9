"""Decode compressed images to RGB pixels."""

from __future__ import annotations

import io
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zeroflow.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile


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
    from PIL import UnidentifiedImageError

    try:
        with _opened(source) as image:
            pixels = np.array(_rgb(image, source))
    except Exception as error:  # what a damaged file raises depends on its decoder
        reason = "of no known kind" if isinstance(error, UnidentifiedImageError) else error
        raise ConfigError(f"{name}: cannot be read as an image: {reason}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _opened(source: Path | bytes) -> ImageFile:
    from PIL import Image

    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _rgb(image: ImageFile, source: Path | bytes) -> Image:
    from PIL import Image

    _refuse_unknown_layouts(image)
    if image.mode.startswith("I"):
        wide = np.array(image)
        if wide.min() < 0 or wide.max() > 0xFFFF:
            raise ValueError("values beyond 16 bits")
        negative = _tag(image, _PHOTOMETRIC) == (0,)  # 0 is white, which Pillow knows of 8 bits alone
        bound = (
            f"pixel is darker than {255 - (wide.max() >> 8)}"
            if negative
            else f"pixel is brighter than {wide.max() >> 8}"
        )
        _check_range(int(wide.max()), bound)
        upper = (wide.astype(np.int64) >> 8).astype(np.uint8)
        return Image.fromarray(255 - upper if negative else upper).convert("RGB")
    raw, largest = _raw_mode(image), _largest_of_ppm(image)
    with warnings.catch_warnings():
        # Of palettes whose transparency is a list of bytes Pillow says that RGBA suits them better; that is dropped here.
        warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)
        rgb = image.convert("RGB")
    if raw or largest is not None:
        top = _brightest(image)
        if raw:
            largest = top << 8 | 0xFF if top else _largest_of_lower(source, raw)
        _check_range(largest or 0, f"{'ink is stronger' if image.mode == 'CMYK' else 'pixel is brighter'} than {top}")
    return rgb


_FEW_BITS = 14
"""Of an image of 16 bits: so few are those of a camera's sensor, or of a dark image."""


def _check_range(largest: int, bound: str) -> None:
    """Judge a 16-bit image by the largest of all its values; ``bound`` says what the upper 8 bits make of that."""
    if 0 < largest <= 0xFF:
        raise ValueError(
            f"values of at most {largest}, of which the upper 8 of 16 bits are 0; expected 16 bits, or a file of 8"
        )
    if 0 < (bits := largest.bit_length()) <= _FEW_BITS:
        warnings.warn(
            f"16-bit images whose values take {bits} bits: their upper 8 are taken, so that no {bound} of 255; "
            f"if the camera has {bits} bits, scale the files to 16",
            stacklevel=2,
        )


# Tags of TIFF files.
_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339
_SIGNED = 2


def _tag(image: ImageFile, number: int) -> tuple[Any, ...]:
    """A tag's values; of a file that is no TIFF, or lacks the tag, none."""
    found = getattr(image, "tag_v2", {}).get(number, ())
    return found if isinstance(found, tuple) else (found,)


def _refuse_unknown_layouts(image: ImageFile) -> None:
    """Raise ``ValueError`` for values that have no known range, or that Pillow takes for others."""
    bits = max(_tag(image, _BITS), default=0)
    if image.mode == "F":
        raise ValueError("floating-point values of unknown range")
    # Those of 32 bits hold 16: so Pillow writes them.
    if _SIGNED in _tag(image, _SAMPLE_FORMAT) and bits <= 16:
        raise ValueError(f"signed values of {bits} bits, whose range is unknown; expected unsigned ones")
    if bits == 16 and not image.mode.startswith("I") and not _raw_mode(image):
        raise ValueError("16 bits a channel, each channel by itself; expected those of a pixel side by side")


# How Pillow names colours of 16 bits a channel in a file; of BMP, "BGR;16" is 16 bits a pixel.
_RAW = re.compile(r"(?:LA|RGB|RGBA|RGBa|RGBX|CMYK);16[BLN]")


def _raw_mode(image: ImageFile) -> str | None:
    """The raw mode of colours of 16 bits a channel, of which Pillow keeps the upper 8; None of others, and once it is decoded."""
    found = _RAW.search(str([tile[3] for tile in image.tile]))
    return found[0] if found else None


def _brightest(image: Image) -> int:
    """The largest value of any channel but the opacity."""
    return max(int(np.asarray(image.getchannel(band)).max()) for band in image.getbands() if band != "A")


def _largest_of_lower(source: Path | bytes, raw: str) -> int:
    """The largest value of the lower 8 of 16 bits, of any channel but the opacity, in a file with this raw mode."""
    with _opened(source) as image:
        if _tag(image, _PLANES) == (2,):  # of which Pillow gives the upper 8 alone: they may as well be black
            raise ValueError("16 bits a channel, each channel by itself, whose upper 8 are all 0; expected a file of 8")
        if raw.startswith("LA"):  # the four bytes of a pixel side by side; the second one is wanted
            lower, bands = "RGBA", ["G"]
        else:  # the bytes in the other order; what was multiplied by the opacity stays so
            little = raw[-1] == "L" or (raw[-1] == "N" and sys.byteorder == "little")
            lower = f"{raw.replace('a', 'A')[:-1]}{'B' if little else 'L'}"
            bands = [band for band in image.getbands() if band != "A"]
        image.tile = [tile._replace(args=_with(tile.args, raw, lower)) for tile in image.tile]
        return max(int(np.asarray(image.getchannel(band)).max()) for band in bands)


def _with(args: Any, old: str, new: str) -> Any:
    """A decoder's arguments with another raw mode."""
    return tuple(_with(arg, old, new) for arg in args) if isinstance(args, tuple) else new if args == old else args


def _largest_of_ppm(image: ImageFile) -> int | None:
    """The largest value of a PPM file of 16 bits, of which Pillow keeps 8, as one of 16 bits; None of others."""
    if image.format != "PPM" or image.mode != "RGB" or image.fp is None:
        return None
    codec, _, offset, args = image.tile[0]
    if not isinstance(args, tuple) or args[-1] <= 0xFF:
        return None
    image.fp.seek(offset)
    content, count = image.fp.read(), image.width * image.height * 3
    if codec == "ppm_plain":
        values = np.array(re.sub(rb"#[^\r\n]*", b" ", content).split()[:count], dtype=np.int64)
    else:
        values = np.frombuffer(content[: 2 * min(count, len(content) // 2)], dtype=">u2").astype(np.int64)
    return int(values.max(initial=0)) * 0xFFFF // args[-1]
