"""CIFAR-100 from the files that torchvision keeps on disk: ``<data_dir>/cifar-100-python/{train,test,meta}``.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The files are Python 2 pickles, and a
pickle may name any function to be called: these are read with the four names that they need, and no others.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zeroflow.data.archives import Archive
from zeroflow.data.dataset import ArraySamples, ImageDataset, register_dataset, root_of
from zeroflow.errors import ConfigError

FOLDER = "cifar-100-python"
CLASSES = 100
SHAPE = (3, 32, 32)
# From torchvision.datasets.CIFAR100 (train_list, test_list, meta).
MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
ARCHIVE = Archive(
    "cifar-100-python.tar.gz",
    "eb9058c3a382ffc7106e4002c42a8d85",
    FOLDER,
    tuple(MD5),
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
)

# What an array's own pickle calls; NumPy 2 moved its home, the files keep the old one.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles lists, dictionaries, strings, numbers and arrays only."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs") from None


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[path.name]:
        warnings.warn(f"{path}: not the published file (expected md5 {MD5[path.name]})", stacklevel=2)
    try:
        stored = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ConfigError(f"{path}: cannot be read as a CIFAR-100 file: {error}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{path}: expected a dictionary, found {type(stored).__name__}")
    return stored


def _samples(path: Path) -> ArraySamples:
    stored = _read(path)
    pixels, labels = stored.get("data"), stored.get("fine_labels")
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and isinstance(labels, list)
        and pixels.shape == (len(labels), np.prod(SHAPE))
        and all(isinstance(label, int) and 0 <= label < CLASSES for label in labels)
    ):
        raise ConfigError(f"{path}: expected 'data' uint8 [N, 3072] and N 'fine_labels' in 0..{CLASSES - 1}")
    return ArraySamples(torch.from_numpy(pixels).reshape(-1, *SHAPE), np.array(labels, dtype=np.int64))


def _missing(data_dir: Path | None) -> list[Path]:
    folder = root_of(data_dir) / FOLDER
    return [folder / part for part in MD5 if not (folder / part).is_file()]


@register_dataset(
    "cifar100",
    classes=CLASSES,
    transform="timm",
    image_size=224,
    where=f"`zeroflow download cifar100 --data-dir DIR` fetches it; or unpack {ARCHIVE.url} (md5 {ARCHIVE.md5}) in "
    f"<data_dir>: it makes <data_dir>/{FOLDER}/ with train, test and meta",
    description="100 classes of photos, 32x32, 500 train and 100 test each",
    missing=_missing,
    archive=ARCHIVE,
)
def cifar100(data_dir: Path | None) -> ImageDataset:
    """Read ``<data_dir>/cifar-100-python``; warn of a file that differs from the published one.

    Raises:
        ConfigError: a file is missing or damaged, contains other data, or would run code.
    """
    absent = _missing(data_dir)
    if absent or data_dir is None:
        raise ConfigError(f"cifar100: missing {', '.join(map(str, absent))}")
    folder = data_dir / FOLDER
    names = _read(folder / "meta").get("fine_label_names")
    if not (isinstance(names, list) and len(names) == CLASSES and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{folder / 'meta'}: expected {CLASSES} 'fine_label_names'")
    return ImageDataset("cifar100", tuple(names), _samples(folder / "train"), _samples(folder / "test"))
