"""The interface of data sets (class names, training and test samples) and their registry.

To add a data set, decorate one function that returns an ``ImageDataset`` with ``register_dataset``.
"""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroflow.data.archives import Archive
from zeroflow.data.decoded import EncodedSamples, prepared
from zeroflow.defaults import CACHE_BYTES
from zeroflow.errors import ConfigError, is_text
from zeroflow.registry import Registry


class Samples(Protocol):
    """Labelled images, read on access."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels ``[N]``, the data set's own numbers."""
        ...

    def images(self, indices: npt.NDArray[np.int64]) -> Sequence[Tensor] | Tensor:
        """The images at ``indices``, each uint8 ``[C, H, W]``; one tensor ``[n, C, H, W]`` where sizes are equal."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySamples:
    """Samples in memory: ``pixels`` uint8 ``[N, C, H, W]``, ``labels`` int64 ``[N]``."""

    pixels: Tensor
    labels: npt.NDArray[np.int64]

    def images(self, indices: npt.NDArray[np.int64]) -> Tensor:
        return self.pixels[torch.from_numpy(indices)]


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A classification data set with a fixed training and test part. Labels index ``class_names``."""

    name: str
    class_names: tuple[str, ...]
    train: Samples
    test: Samples


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set that are known before it is opened.

    Attributes:
        load: ``load(data_dir) -> ImageDataset``; raises ``ConfigError`` where files are missing.
        classes: number of classes; None: unknown before it is opened.
        transform: name of the default transform.
        image_size: side of the images that the default transform makes, pixels.
        where: where to get the files and where to put them, for a user who does not have them.
        missing: returns the paths that ``data_dir`` lacks; empty: the data set can be opened.
        archive: what ``zeroflow download`` downloads, verifies and unpacks; None: nothing.
    """

    name: str
    load: Callable[[Path | None], ImageDataset]
    classes: int | None
    transform: str
    image_size: int
    where: str
    description: str
    missing: Callable[[Path | None], list[Path]]
    archive: Archive | None = None


datasets: Registry[DatasetInfo] = Registry("dataset")


def register_dataset(
    name: str,
    *,
    classes: int | None,
    transform: str,
    image_size: int,
    where: str,
    description: str,
    missing: Callable[[Path | None], list[Path]] = lambda data_dir: [],
    archive: Archive | None = None,
) -> Callable[[Callable[[Path | None], ImageDataset]], Callable[[Path | None], ImageDataset]]:
    """Register a loader function as data set ``name``; see ``DatasetInfo`` for the arguments."""

    def decorate(load: Callable[[Path | None], ImageDataset]) -> Callable[[Path | None], ImageDataset]:
        info = DatasetInfo(name, load, classes, transform, image_size, where, description, missing, archive)
        datasets.register(name, info)
        return load

    return decorate


def root_of(data_dir: Path | None) -> Path:
    """The folder of the data sets for messages, or a placeholder where none is given."""
    return data_dir or Path("<data_dir>")


def inside_data_dir(dataset: str, folder: str) -> str:
    """Check that ``folder`` is a path below ``data_dir``, and return it.

    Raises:
        ConfigError: it is empty or absolute, or has a part that is empty, ``.`` or ``..``.
    """
    if (
        any(part in ("", ".", "..") for part in folder.split("/"))
        or folder[0] == "~"
        or "\\" in folder
        or "\0" in folder
    ):
        raise ConfigError(f"dataset={dataset!r}: expected the name of a folder below data_dir, without '.' and '..'")
    return folder


def unlike(names: Iterable[str]) -> list[str]:
    """Problems with class names that are blank, no text, or look alike: spaces around them, another spelling of accents."""
    seen: dict[str, list[str]] = {}
    found = []
    for name in names:
        if not is_text(name):
            found.append(
                f"the name of a class is not UTF-8: {os.fsencode(name)!r}; results could not be written under it"
            )
            continue
        seen.setdefault(unicodedata.normalize("NFC", name).strip(), []).append(name)
    found += [f"a class without a name: {name!r}" for name in seen.pop("", [])]
    twins = [", ".join(map(ascii, sorted(same))) for same in seen.values() if len(same) > 1]
    return found + [f"names of classes look alike: {same}; expected one name for a class" for same in twins]


def load_dataset(
    name: str, data_dir: str | Path | None = None, *, threads: int | None = None, cache_bytes: int = CACHE_BYTES
) -> ImageDataset:
    """Open a data set. The first time, all image files are decoded once, which takes minutes if they are many.

    Args:
        name: a registered name, ``folder:NAME`` or ``parquet:NAME``.
        data_dir: folder of the data sets' folders; not needed for embedded ones.
        threads: number of threads that decode images, see ``zeroflow.data.decoded.prepared``. No pixel depends on it.
        cache_bytes: limit for the decoded images kept on this machine, see the same. No pixel depends on it.

    Raises:
        ConfigError: the name is unknown, files are missing (the message says where to put them), or files are invalid (it
            lists all problems).
    """
    info = datasets.get(name)
    root = None if data_dir is None else Path(data_dir).expanduser()
    absent = info.missing(root)
    if absent:
        raise ConfigError(f"data set {name!r} is not here: missing {', '.join(map(str, absent))}. {info.where}")
    dataset, problems = info.load(root), []

    def ready(part: str, samples: Samples) -> Samples:
        if isinstance(samples, EncodedSamples):
            try:
                return prepared(samples, threads=threads, cache_bytes=cache_bytes)
            except ConfigError as error:
                problems.append(f"data set {name!r}, {part}: {error}")
        return samples

    dataset = dataclasses.replace(dataset, train=ready("train", dataset.train), test=ready("test", dataset.test))
    if problems:
        raise ConfigError("\n".join(problems))
    return dataset
