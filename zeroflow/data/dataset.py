"""What a data set is: class names and two lists of samples, training and test; and the registry of data sets.

A data set is added by one function that returns an ``ImageDataset``, decorated with ``register_dataset``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroflow.errors import ConfigError
from zeroflow.registry import Registry


class Samples(Protocol):
    """Labelled images, read when asked for."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels ``[N]`` in the data set's own numbering."""
        ...

    def images(self, indices: npt.NDArray[np.int64]) -> Sequence[Tensor] | Tensor:
        """The images at ``indices``, each uint8 ``[C, H, W]``; one tensor ``[n, C, H, W]`` where sizes are equal."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySamples:
    """Samples held in memory: ``pixels`` uint8 ``[N, C, H, W]``, ``labels`` int64 ``[N]``."""

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
    """What is known of a data set before it is opened.

    Attributes:
        load: ``load(data_dir) -> ImageDataset``; raises ``ConfigError`` where files are missing.
        classes: number of classes, or None where only opening tells.
        transform: default transform. image_size: pixels the default transform makes, square.
        where: where the files come from and where they belong, for a user who does not have them.
        missing: what ``data_dir`` lacks: the paths that are not there; empty means ready.
    """

    name: str
    load: Callable[[Path | None], ImageDataset]
    classes: int | None
    transform: str
    image_size: int
    where: str
    description: str
    missing: Callable[[Path | None], list[Path]]


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
) -> Callable[[Callable[[Path | None], ImageDataset]], Callable[[Path | None], ImageDataset]]:
    """Register a loader function as data set ``name``; see ``DatasetInfo`` for the arguments."""

    def decorate(load: Callable[[Path | None], ImageDataset]) -> Callable[[Path | None], ImageDataset]:
        datasets.register(name, DatasetInfo(name, load, classes, transform, image_size, where, description, missing))
        return load

    return decorate


def load_dataset(name: str, data_dir: str | Path | None = None) -> ImageDataset:
    """Open a data set.

    Args:
        name: a registered name.
        data_dir: folder that holds the data sets' folders; not needed for embedded ones.

    Raises:
        ConfigError: unknown name, or files missing; the message says which and where they belong.
    """
    info = datasets.get(name)
    root = None if data_dir is None else Path(data_dir)
    absent = info.missing(root)
    if absent:
        raise ConfigError(f"data set {name!r} is not here: missing {', '.join(map(str, absent))}. {info.where}")
    return info.load(root)
