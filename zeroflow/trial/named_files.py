"""What a cell is computed from beside its configuration, and that may change while its name stays: weights, images of one's own.

A cell's id comes from names alone. So that new weights at an old path are not taken for the old ones, results keep hashes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from zeroflow.data.dataset import ImageDataset
from zeroflow.trial.config import TrialConfig

_DIGITS = 12


def weights_of(config: TrialConfig) -> dict[str, str]:
    """Hashes of the files of weights that a cell names and that are on this machine, by the names in its configuration."""
    named = [name for name in (config.backbone, config.checkpoint) if name is not None and Path(name).is_file()]
    return {name: _digest(_facts(Path(name))) for name in named}


def images_of(config: TrialConfig, dataset: ImageDataset) -> dict[str, str]:
    """Hash of the classes and labels of a data set of one's own (``folder:NAME``), by its name; of published ones nothing."""
    if ":" not in config.dataset:
        return {}
    facts = json.dumps([list(dataset.class_names), labels_digest(dataset)])
    return {config.dataset: hashlib.sha256(facts.encode()).hexdigest()[:_DIGITS]}


def labels_digest(dataset: ImageDataset) -> str:
    """Hash of the labels of all samples."""
    found = hashlib.sha256()
    for samples in (dataset.train, dataset.test):
        found.update(samples.labels.astype(np.int64).tobytes() + b"|")
    return found.hexdigest()


_Fact = tuple[str, int, int, int]
"""Path, size, time and number of a file: while they stay it is not read again."""


def _facts(file: Path) -> tuple[_Fact, ...]:
    return tuple((str(path), (stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ino) for path in _parts(file))


def _parts(file: Path) -> Iterator[Path]:
    """A file, and the shards that it names if it is an index of them."""
    yield file
    if file.name.endswith(".index.json"):
        try:
            names: Sequence[str] = sorted(set(json.loads(file.read_text())["weight_map"].values()))
            yield from (path for name in names if (path := file.parent / name).is_file())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # loading says what is wrong with it


@functools.cache
def _digest(facts: tuple[_Fact, ...]) -> str:
    found = hashlib.sha256()
    for path, *_ in facts:
        with Path(path).open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:_DIGITS]
