"""Images of 16 bits a channel: colours, opacity, ink, negatives and signs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from image_files import png_of_16_bits, tiff

from zeroflow.data.images import read_image
from zeroflow.errors import ConfigError


def ramp(largest: int, channels: int) -> np.ndarray:
    """Values ``[4, 5, channels]`` from 0 to ``largest``."""
    return np.linspace(0, largest, 20 * channels).astype(np.uint16).reshape(4, 5, channels)


def opaque(values: np.ndarray, opacity: int = 0xFFFF) -> np.ndarray:
    return np.dstack([values, np.full(values.shape[:2], opacity)]).astype(np.uint16)


def ppm(values: np.ndarray, largest: int = 0xFFFF, plain: bool = False) -> bytes:
    header = f"P{3 if plain else 6}\n# {largest + 1} colours\n5 4 {largest}\n".encode()
    return header + (" # 7\n".join(map(str, values.ravel())).encode() if plain else values.astype(">u2").tobytes())


KINDS: dict[str, Callable[[int], bytes]] = {
    "grey PNG": lambda top: png_of_16_bits(ramp(top, 1)),
    "grey PNG with opacity": lambda top: png_of_16_bits(opaque(ramp(top, 1))),
    "grey PNG with little opacity": lambda top: png_of_16_bits(opaque(ramp(top, 1), 77)),
    "colour PNG": lambda top: png_of_16_bits(ramp(top, 3)),
    "colour PNG with opacity": lambda top: png_of_16_bits(opaque(ramp(top, 3))),
    "colour TIFF": lambda top: tiff(ramp(top, 3), 2),
    "colour TIFF of other order": lambda top: tiff(ramp(top, 3).astype(">u2"), 2),
    "colour TIFF, compressed": lambda top: tiff(ramp(top, 3), 2, packed=True),
    "colour TIFF of other order, compressed": lambda top: tiff(ramp(top, 3).astype(">u2"), 2, packed=True),
    "colour TIFF with opacity": lambda top: tiff(opaque(ramp(top, 3)), 2, t338=(2,)),
    "colour TIFF times opacity": lambda top: tiff(opaque(ramp(top, 3)), 2, t338=(1,)),
    "colour TIFF with a fourth": lambda top: tiff(opaque(ramp(top, 3)), 2, t338=(0,)),
    "colour PPM": lambda top: ppm(ramp(top, 3)),
    "colour PPM in letters": lambda top: ppm(ramp(top, 3), plain=True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def read(content: bytes) -> tuple[np.ndarray, list[str]]:
    """Pixels ``[H, W, 3]``, and what is said."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = read_image(content, "a.png").permute(1, 2, 0).numpy()
    return found, [str(each.message) for each in told]


@kinds
def test_of_16_bits_the_upper_8_are_taken(kind: str) -> None:
    found, told = read(KINDS[kind](0xFFFF))
    grey = ramp(0xFFFF, 1 if "grey" in kind else 3)
    expected = np.broadcast_to(grey >> 8, (4, 5, 3)).astype(int)
    assert np.abs(found - expected).max() <= ("PPM" in kind), "Pillow rounds those of PPM files"
    assert not told


@kinds
@pytest.mark.parametrize("largest", [200, 255, 1])
def test_values_that_the_upper_8_bits_would_lose_are_refused(kind: str, largest: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"a\.png: .* values of at most {largest}, .* expected 16 bits, or a file of 8"
    ):
        read(KINDS[kind](largest))


@kinds
def test_what_is_black_is_black(kind: str) -> None:
    found, told = read(KINDS[kind](0))
    assert found.max() == 0 and not told


@kinds
@pytest.mark.parametrize("bits", [9, 12, 14, 15])
def test_values_that_take_few_of_16_bits_are_told(kind: str, bits: int) -> None:
    """Of all channels together, as of grey."""
    found, told = read(KINDS[kind](2**bits - 1))
    top = int(found.max())
    assert top == (2**bits - 1) >> 8 or ("PPM" in kind and top == 1 << bits - 8)
    assert len(told) == (bits < 15)
    assert all(f"take {bits} bits: " in text and f"no pixel is brighter than {top} of 255" in text for text in told)


def test_one_bright_channel_is_enough() -> None:
    values = ramp(200, 3)
    values[0, 0, 2] = 0xFFFF
    assert read(png_of_16_bits(values))[1] == []


def test_the_range_that_a_ppm_file_states_counts() -> None:
    found, told = read(ppm(ramp(4095, 3), 4095))
    assert found.max() == 255 and not told


def test_of_ink_too_few_bits_are_told() -> None:
    assert read(tiff(ramp(0xFFFF, 4), 5))[1] == []
    assert read(tiff(ramp(0, 4), 5))[0].min() == 255
    (told,) = read(tiff(ramp(4095, 4), 5))[1]
    assert "no ink is stronger than 15 of 255" in told
    with pytest.raises(ConfigError, match="values of at most 200"):
        read(tiff(ramp(200, 4), 5))


@pytest.mark.parametrize("packed", [False, True])
def test_where_0_is_white_16_bits_are_inverted_as_8_are(packed: bool) -> None:
    wide = ramp(0xFFFF, 1)
    found, told = read(tiff(wide, 0, packed=packed))
    assert np.array_equal(found, np.broadcast_to(255 - (wide >> 8), (4, 5, 3))) and not told
    narrow, _ = read(tiff((wide >> 8).astype(np.uint8), 0, packed=packed))
    assert np.array_equal(narrow, found)
    (said,) = read(tiff(ramp(4095, 1), 0, packed=packed))[1]
    assert "take 12 bits" in said and "no pixel is darker than 240 of 255" in said
    with pytest.raises(ConfigError, match="values of at most 200"):
        read(tiff(ramp(200, 1), 0, packed=packed))
    assert read(tiff(ramp(0, 1), 0, packed=packed))[0].min() == 255


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["<i2", ">i2", "i1"])
def test_signed_values_are_refused(kind: str, packed: bool) -> None:
    values = ramp(100 if kind == "i1" else 0x7FFF, 1).astype(kind)
    bits = 8 * values.dtype.itemsize
    with pytest.raises(ConfigError, match=f"signed values of {bits} bits, whose range is unknown; expected unsigned"):
        read(tiff(values, 1, packed=packed))


def test_wide_channels_in_planes_are_read_right_or_refused() -> None:
    """Pillow takes those that are not compressed for 8 bits, and of others tells the upper 8 alone."""
    wide = ramp(0xFFFF, 3)
    for content in (tiff(wide, 2, planes=True), tiff(ramp(200, 3), 2, planes=True, packed=True)):
        with pytest.raises(ConfigError, match="16 bits a channel, each channel by itself"):
            read(content)
    narrow = (wide >> 8).astype(np.uint8)
    for content in (tiff(wide, 2, planes=True, packed=True), tiff(narrow, 2, planes=True)):
        assert np.array_equal(read(content)[0], narrow)
