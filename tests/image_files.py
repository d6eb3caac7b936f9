"""Image data sets as they lie on disk, made for the tests."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from zeroflow.data import ImageDataset
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


def features(labels: dict[str, Sequence[str]], image: str = "image") -> dict[bytes, bytes]:
    """The schema metadata that the ``datasets`` library writes."""
    described: dict[str, Any] = {image: {"_type": "Image"}}
    described |= {name: {"names": list(names), "_type": "ClassLabel"} for name, names in labels.items()}
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
