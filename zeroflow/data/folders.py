"""Photos in folders, ``<root>/{train,test}/<class>/*``: CUB-200, ImageNet-A, OmniBenchmark, and anyone's own.

Classes are the folders' names, sorted; images of a class are in the order of their file names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroflow.data.dataset import ImageDataset, register_dataset
from zeroflow.errors import ConfigError

PARTS = ("train", "test")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True, eq=False)
class FileSamples:
    """Samples decoded when asked for: ``paths`` of N image files, ``labels`` int64 ``[N]``."""

    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64]

    def images(self, indices: npt.NDArray[np.int64]) -> list[Tensor]:
        """The images at ``indices``, each uint8 ``[3, H, W]`` in its own size; ``ConfigError`` if one is unreadable."""
        return [read_image(self.paths[index]) for index in indices]


def read_image(path: Path) -> Tensor:
    """Decode an image file, whatever its colour mode, to uint8 RGB ``[3, H, W]``.

    Transparency is dropped and the EXIF orientation is not applied: both as torchvision's loader, hence PILOT, has it.

    Raises:
        ConfigError: the file is missing, damaged or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # what a damaged file raises depends on its decoder
        raise ConfigError(f"{path}: cannot be read as an image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_folder(name: str, root: str | Path, classes: int | None = None) -> ImageDataset:
    """Open ``<root>/{train,test}/<class>/*`` as a data set. Images are decoded later, when asked for.

    Args:
        name: what to call it. root: the folder that holds ``train`` and ``test``.
        classes: how many classes there must be; default: any number.

    Raises:
        ConfigError: with every problem at once: a part that is missing, a class that only one part has, a class without
            images, another number of classes.
    """
    folders = {part: Path(root) / part for part in PARTS}
    found = {part: _images_by_class(folder) for part, folder in folders.items() if folder.is_dir()}
    names = sorted(set().union(*found.values()))

    problems = [f"{folder}: no such folder" for part, folder in folders.items() if part not in found]
    for part, images in found.items():
        folder, expected = folders[part], "at least one" if classes is None else classes
        if not images or classes not in (None, len(images)):
            problems.append(f"{folder}: {len(images)} classes, expected {expected}")
        problems += [f"{folder / c}: missing, though the other part has it" for c in names if c not in images]
        problems += [f"{folder / c}: no images" for c in names if images.get(c) == []]
    if problems:
        raise ConfigError("\n  ".join([f"data set {name!r} is not complete:", *problems]))

    def samples(images: dict[str, list[Path]]) -> FileSamples:
        labels = np.repeat(np.arange(len(names)), [len(images[c]) for c in names])
        return FileSamples(tuple(path for c in names for path in images[c]), labels)

    return ImageDataset(name, tuple(names), samples(found["train"]), samples(found["test"]))


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    return {
        entry.name: sorted(f for f in entry.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    }


def register_image_folder(name: str, *, classes: int, description: str, source: str) -> None:
    """Register the image folder ``<data_dir>/<name>`` as data set ``name``; ``source`` tells where to get its files."""

    def missing(data_dir: Path | None) -> list[Path]:
        root = (data_dir or Path("<data_dir>")) / name
        return [root / part for part in PARTS if not (root / part).is_dir()]

    @register_dataset(
        name,
        classes=classes,
        transform="timm",
        image_size=224,
        where=f"Put the images at <data_dir>/{name}/train/<class>/*.jpg and in {name}/test/ likewise; {source}",
        description=description,
        missing=missing,
    )
    def load(data_dir: Path | None) -> ImageDataset:
        return image_folder(name, (data_dir or Path("<data_dir>")) / name, classes)


# The splits are PILOT's: the original releases of the three have no such train and test parts.
_PILOT = "https://github.com/sun-hailong/LAMDA-PILOT links the archive of this layout:"

register_image_folder(
    "cub",
    classes=200,
    description="CUB-200-2011: photos of 200 bird species",
    source=f"{_PILOT} cub.zip, md5 85e342a2d5f941e740193602057df7a5",
)
register_image_folder(
    "imagenet-a",
    classes=200,
    description="ImageNet-A: photos of 200 ImageNet classes that mislead a classifier",
    source=f"{_PILOT} ina.zip, md5 7f4aaf0b1532b7a0bd670822c152d3c5",
)
register_image_folder(
    "omnibenchmark",
    classes=300,
    description="OmniBenchmark: photos of 300 classes from many realms",
    source=f"{_PILOT} omnibenchmark.zip, md5 f1c30808a707f9197c6c811ea52e5cbb",
)
