"""Image data sets as they lie on disk, made for the tests."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from zeroflow.data import ImageDataset, load_dataset
from zeroflow.data.images import read_image


def write_cifar(data_dir: Path, **replaced: object) -> Path:
    """Small files in the published format: protocol 2, arrays under the module names of NumPy 1."""
    folder = data_dir / "cifar-100-python"
    folder.mkdir()
    contents: dict[str, object] = {"meta": {"fine_label_names": [f"class {i}" for i in range(100)]}}
    for seed, (part, count) in enumerate((("train", 200), ("test", 100))):
        pixels = np.random.RandomState(seed).randint(0, 256, (count, 3072)).astype(np.uint8)
        contents[part] = {"data": pixels, "fine_labels": [(7 * i) % 100 for i in range(count)]}
    for name, content in {**contents, **replaced}.items():
        stored = pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (folder / name).write_bytes(stored)
    return data_dir


NAMES = ["owl", "Wren", "鸟"]


def picture(red: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4 + red % 3), (red, 0, 7)).save(file, kind)
    return file.getvalue()


def features(labels: dict[str, Any], image: str = "image") -> dict[bytes, bytes]:
    """The schema metadata that the ``datasets`` library writes."""
    described: dict[str, Any] = {image: {"_type": "Image"}}
    described |= {name: {"names": names, "_type": "ClassLabel"} for name, names in labels.items()}
    return {b"huggingface": json.dumps({"info": {"features": described}}).encode()}


def write_parquet(
    path: Path,
    reds: Sequence[int],
    labels: Any,
    *,
    image: str = "image",
    label: str = "label",
    metadata: dict[bytes, bytes] | None = None,
    rows: int = 2,
    plain: bool = False,
) -> None:
    """A file of one-coloured pictures, in row groups of ``rows``; ``plain``: the images as binary, not as a struct."""
    contents = [picture(red) for red in reds]
    images = (
        pa.array(contents)
        if plain
        else pa.array([{"bytes": c, "path": f"{path.name}-{i}.png"} for i, c in enumerate(contents)])
    )
    table = pa.table({image: images, label: labels}).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def write_both_parquet(
    root: Path,
    train: str = "data/train-00000-of-00001.parquet",
    test: str = "data/test-00000-of-00001.parquet",
    **options: Any,
) -> Path:
    options = {"metadata": features({"label": NAMES}), **options}
    write_parquet(root / train, [10, 11, 12, 13, 14], [0, 1, 2, 1, 0], **options)
    write_parquet(root / test, [20, 21, 22], [2, 1, 0], **options)
    return root


def reds(dataset: ImageDataset, part: str = "train") -> list[int]:
    samples = getattr(dataset, part)
    return [int(image[0, 0, 0]) for image in samples.images(np.arange(len(samples.labels)))]


def png_of_16_bits(values: np.ndarray) -> bytes:
    """A PNG of values ``[H, W, C]``: grey, grey with opacity, colours, or colours with opacity."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    written = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def tiff(
    values: np.ndarray, photometric: int, *, planes: bool = False, packed: bool = False, **tags: tuple[int, ...]
) -> bytes:
    """A TIFF of integers ``[H, W, C]`` of any width, sign and byte order.

    Args:
        values: their type is that of the file.
        photometric: 0: 0 is white; 1: 0 is black; 2: RGB; 5: CMYK.
        planes: one channel after the other.
        packed: compressed.
        tags: others, by number, such as ``t338=(2,)``.
    """
    height, width, channels = values.shape
    order = ">" if values.dtype.str[0] == ">" else "<"
    parts = [plane.tobytes() for plane in np.moveaxis(values, -1, 0)] if planes else [values.tobytes()]
    parts = [zlib.compress(part) if packed else part for part in parts]
    signed = 2 if values.dtype.kind == "i" else 1
    own: dict[int, Sequence[int]] = {
        256: [width], 257: [height], 258: [8 * values.dtype.itemsize] * channels, 259: [8 if packed else 1], 262: [photometric],
        273: [0] * len(parts), 277: [channels], 278: [height], 279: [len(part) for part in parts], 284: [2 if planes else 1],
        339: [signed] * channels, **{int(name[1:]): value for name, value in tags.items()},
    }  # fmt: skip
    after = 8 + 2 + 12 * len(own) + 4  # where values begin that do not fit into their entry, all of 4 bytes
    begin = after + sum(4 * len(value) for value in own.values() if len(value) > 1)
    own[273] = [begin + sum(map(len, parts[:i])) for i in range(len(parts))]
    entries, more = b"", b""
    for tag, value in sorted(own.items()):
        entries += struct.pack(f"{order}HHI", tag, 4, len(value))
        entries += struct.pack(f"{order}I", value[0] if len(value) == 1 else after + len(more))
        more += struct.pack(f"{order}{len(value)}I", *value) if len(value) > 1 else b""
    magic = b"MM\0*" if order == ">" else b"II*\0"
    directory = struct.pack(f"{order}IH", 8, len(own)) + entries + struct.pack(f"{order}I", 0)
    return magic + directory + more + b"".join(parts)


IMAGENET = {
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic", "crop_pct": 0.875,
    "crop_mode": "center",
}  # fmt: skip


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Soft shapes of every colour with edges and some grain."""
    random = np.random.default_rng(seed)
    soft = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.array(soft).astype(int) + random.integers(-12, 13, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 40)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_birds(data_dir: Path) -> Path:
    """Folder ``birds`` of photos of many sizes and colour modes: 3 classes of 4 training and 3 test images."""
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 3)):
        for label, name in enumerate(("Ä b", "owl", "wren")):
            folder = data_dir / "birds" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = 40 + 7 * i + label, 61 - 5 * i
                image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
                mode = ("RGB", "L", "CMYK", "RGB")[i]
                image.convert(mode).save(folder / f"{i} é.JPG", quality=95)
    return data_dir


def opened(data_dir: Path, **how: int) -> ImageDataset:
    """The birds that ``write_birds`` wrote."""
    return load_dataset("folder:birds", data_dir, **how)


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the image files that are decoded from now on."""
    names: list[str] = []

    def counted(source: Path, name: str) -> torch.Tensor:
        names.append(name)
        return read_image(source, name)

    monkeypatch.setattr("zeroflow.data.folders.read_image", counted)
    return names


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """uint8 ``[channels, height, width]``."""
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=seeded(seed))
