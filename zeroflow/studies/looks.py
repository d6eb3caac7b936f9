"""What a model is shown: a few images of every task as the transform of a grid's cells makes them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zeroflow.data import Preprocessing, Task, datasets, load_dataset
from zeroflow.models.factory import create_backbone, default_image_size
from zeroflow.progress import Progress, silent
from zeroflow.trial import randomness
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.probes import some
from zeroflow.trial.stream import scenario_of

IMAGES = 3
"""Of a task's training samples and of its test samples, evenly spread."""

PARTS = ("training", "test")


@dataclass(frozen=True, eq=False)
class Shown:
    """An image as the network gets it: float32 ``[3, size, size]``, and the name of its class."""

    pixels: Tensor
    class_name: str


@dataclass(frozen=True, eq=False)
class Look:
    """What the cells of one data set, transform, image size and preprocessing show to their model.

    Attributes:
        cells: they.
        size: pixels.
        tasks: of each task the images of both ``PARTS``, under the first cell's tasks and seed.
    """

    cells: Sequence[TrialConfig]
    size: int
    tasks: Sequence[tuple[Sequence[Shown], Sequence[Shown]]]

    @property
    def transform(self) -> str:
        return _transform(self.cells[0])

    @property
    def preprocessing(self) -> Preprocessing | None:
        """None: the transform takes none, and does not normalise."""
        given = self.cells[0].preprocessing
        return Preprocessing.of(given) if given else None

    @property
    def title(self) -> str:
        backbones = ", ".join(dict.fromkeys(config.backbone for config in self.cells))
        how = self.preprocessing or "not normalised"
        title = f"{self.cells[0].dataset}, transform {self.transform}, {self.size} pixels, {how}; for {backbones}"
        return title + (f"; tasks and seed of the first of {len(self.cells)} cells" if len(self.cells) > 1 else "")

    def numbers(self) -> list[str]:
        """A line for each part: the smallest number, mean, standard deviation and largest of each channel of the images shown."""
        lines = []
        for number, part in enumerate(PARTS):
            channels = torch.stack([shown.pixels for task in self.tasks for shown in task[number]]).transpose(0, 1)
            told = [
                f"{name} min {c.min():.3f}, mean {c.mean():.3f}, std {c.std():.3f}, max {c.max():.3f}"
                for name, c in zip(("red", "green", "blue"), channels.double(), strict=True)
            ]
            lines.append(f"{part}, {channels.shape[1]} images: {'; '.join(told)}")
        return lines

    def mapped_back(self, shown: Shown) -> Tensor:
        """An image as uint8 ``[size, size, 3]``, the normalisation undone."""
        pixels = shown.pixels
        if made := self.preprocessing:
            mean, std = (pixels.new_tensor(colour)[:, None, None] for colour in (made.mean, made.std))
            pixels = pixels * std + mean
        return _picture(pixels)


REACH = 3.0
"""The number that is drawn white where numbers are drawn as they are; its negative is black, 0 grey."""


def as_it_is(shown: Shown) -> Tensor:
    """The network's numbers as uint8 ``[size, size, 3]``, on the same scale whatever the preprocessing: see ``REACH``."""
    return _picture(shown.pixels / (2 * REACH) + 0.5)


def _picture(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def _transform(config: TrialConfig) -> str:
    return config.transform or datasets.get(config.dataset).transform


def groups(cells: Sequence[TrialConfig]) -> dict[tuple[str, str, int, str], list[TrialConfig]]:
    """Cells by what decides how their images look: data set, transform, image size and preprocessing."""
    found: dict[tuple[str, str, int, str], list[TrialConfig]] = defaultdict(list)
    for config in cells:
        made = json.dumps(dict(config.preprocessing), sort_keys=True)
        found[config.dataset, _transform(config), _size(config), made].append(config)
    return dict(found)


def _size(config: TrialConfig) -> int:
    if size := config.image_size or default_image_size(config.backbone):
        return size
    return create_backbone(config.backbone, checkpoint="none").image_size


def looks(cells: Sequence[TrialConfig], data_dir: str | None, on_progress: Progress = silent) -> Iterator[Look]:
    """A look for each of the ``groups`` of cells; data sets are opened, nothing is trained.

    Args:
        cells: in normal form.
        data_dir: of the data sets.
        on_progress: see ``Progress``; a unit is a look.

    Raises:
        ConfigError: a data set that is not here, or what is wrong with it.
    """
    found = groups(cells)
    for number, ((dataset, _, size, _), members) in enumerate(found.items()):
        on_progress(dataset, number, len(found))
        scenario = scenario_of(members[0], load_dataset(dataset, data_dir), size)
        yield Look(members, size, [_shown(task, scenario.class_names, members[0].seed) for task in scenario.tasks])


def _shown(task: Task, names: Sequence[str], seed: int) -> tuple[list[Shown], list[Shown]]:
    positions = np.unique(np.linspace(0, len(task.train) - 1, IMAGES).astype(np.int64))
    augmented = task.train.training_batch(
        positions, randomness.generator(seed, randomness.AUGMENTATION, task.index, 0, 0)
    )
    plain = next(some(task.test, IMAGES).plain_batches(IMAGES))
    both = [
        [Shown(pixels, names[int(label)]) for pixels, label in zip(*part, strict=True)] for part in (augmented, plain)
    ]
    return both[0], both[1]
