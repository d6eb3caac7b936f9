"""Class-incremental learning: a data set's classes, shuffled once and split into tasks that arrive one after the other.

New label = position in the class order. Samples of a task are concatenated by new label, file order within a class.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroflow.data.ahead import prefetched
from zeroflow.data.dataset import ImageDataset, Samples
from zeroflow.data.transforms import Transform
from zeroflow.errors import ConfigError

Batch = tuple[Tensor, Tensor]


def class_order(classes: int, seed: int = 1993) -> npt.NDArray[np.int64]:
    """The field's class order: a legacy NumPy permutation (the first five of 100 with seed 1993: 68 56 78 8 23)."""
    return np.random.RandomState(seed).permutation(classes)


def even_increments(classes: int, tasks: int, base_classes: int | None = None) -> list[int]:
    """Classes per task: ``base_classes`` in the first and equally many in the others; without it all tasks are equal.

    Raises:
        ConfigError: the classes cannot be divided equally; the message names the nearest number of tasks that works.
    """
    if base_classes is not None and tasks > 1:
        if not 1 <= base_classes < classes:
            raise ConfigError(f"base_classes={base_classes}: expected 1..{classes - 1} of {classes} classes")
        rest = classes - base_classes
        if rest % (tasks - 1):
            raise ConfigError(
                f"tasks={tasks}: the {rest} classes after base_classes={base_classes} do not divide into {tasks - 1} "
                f"equal tasks; nearest: {1 + _nearest_divisor(rest, tasks - 1)}"
            )
        return [base_classes] + [rest // (tasks - 1)] * (tasks - 1)
    if tasks < 1 or classes % tasks:
        raise ConfigError(
            f"tasks={tasks}: {classes} classes do not divide into {tasks} equal tasks; "
            f"nearest: {_nearest_divisor(classes, tasks)}"
        )
    if base_classes not in (None, classes):
        raise ConfigError(f"base_classes={base_classes}: the only task has all {classes} classes")
    return [classes // tasks] * tasks


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))


def check_increments(increments: Sequence[int], classes: int) -> None:
    """Refuse classes per task that are not positive or do not add up to all classes."""
    if sum(increments) != classes or min(increments, default=0) < 1:
        raise ConfigError(
            f"increments={list(increments)}: expected positive numbers that add up to {classes} classes; "
            f"these add up to {sum(increments)}"
        )


def check_order(order: Sequence[int], classes: int) -> None:
    """Refuse a class order that is not a permutation of ``0..classes - 1``; the message names every wrong label."""
    times = Counter(order)
    wrong = {
        "not there": [label for label in range(classes) if not times[label]],
        "more than once": [label for label in times if times[label] > 1],
        "no class": [label for label in times if not 0 <= label < classes],
    }
    if any(wrong.values()):
        found = [f"{', '.join(map(str, sorted(labels)))}: {what}" for what, labels in wrong.items() if labels]
        raise ConfigError(f"class order: expected each of 0..{classes - 1} once; {'; '.join(found)}")


@dataclass(frozen=True, eq=False)
class View:
    """Some samples of a data set with their new labels, from which batches are made.

    Attributes:
        samples: the images.
        indices: of the view's samples, in order, ``[N]``.
        labels: new labels int64 ``[N]``.
        transform: how images become network input.
        size: side of the network input, pixels.
        threads: number of threads that prefetch mini-batches; 0: none. No bit depends on it.
    """

    samples: Samples
    indices: npt.NDArray[np.int64]
    labels: Tensor
    transform: Transform
    size: int
    threads: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    def training_batch(self, positions: npt.NDArray[np.int64], generator: torch.Generator) -> Batch:
        """Images ``[n, 3, size, size]`` under the training transform and labels ``[n]`` of the samples at positions."""
        images = self.transform.train(self.samples.images(self.indices[positions]), self.size, generator)
        # Memory order depends on how images are stored, and a network's last bits on memory order.
        return images.contiguous(), self.labels[torch.from_numpy(positions)]

    def plain_batches(self, batch_size: int = 256) -> Iterator[Batch]:
        """All samples in order under the test transform."""

        def batch(first: int) -> Batch:
            part = slice(first, first + batch_size)
            images = self.transform.test(self.samples.images(self.indices[part]), self.size)
            return images.contiguous(), self.labels[part]

        return prefetched((functools.partial(batch, first) for first in range(0, len(self), batch_size)), self.threads)


def joined(views: Sequence[View]) -> View:
    """Concatenate views of the same samples."""
    indices = np.concatenate([view.indices for view in views])
    return replace(views[0], indices=indices, labels=torch.cat([view.labels for view in views]))


@dataclass(frozen=True)
class Task:
    """One stage of the stream. ``classes`` is the range of new labels it brings."""

    index: int
    classes: range
    train: View
    test: View = field(repr=False)


@dataclass(frozen=True)
class Scenario:
    """A whole stream: tasks in order, and the inverse label map.

    Attributes:
        tasks: one per stage.
        order: ``order[new label]`` = the data set's own label.
        class_names: names by new label.
    """

    tasks: Sequence[Task]
    order: npt.NDArray[np.int64]
    class_names: tuple[str, ...]


Indices = list[npt.NDArray[np.int64]]
"""Of the samples of each class, in the order of the stream."""


def _by_class(dataset: ImageDataset, part: str, order: npt.NDArray[np.int64]) -> Indices:
    samples = dataset.train if part == "training" else dataset.test
    found = [np.flatnonzero(samples.labels == label) for label in order]
    if empty := [dataset.class_names[own] for own, indices in zip(order, found, strict=True) if not len(indices)]:
        raise ConfigError(f"data set {dataset.name!r}: no {part} images for {', '.join(empty[:10])}")
    return found


def _with_held_out(
    dataset: ImageDataset, train: Indices, order: npt.NDArray[np.int64], share: float
) -> tuple[Indices, Indices]:
    """Training samples without the last share of every class, at least one, and that share."""
    if single := [dataset.class_names[own] for own, indices in zip(order, train, strict=True) if len(indices) < 2]:
        raise ConfigError(
            f"validation={share}: data set {dataset.name!r}: expected at least two training images of every class, of "
            f"which one is held out; {len(single)} have one, such as: {', '.join(single[:10])}"
        )
    kept = [max(1, len(indices) - max(1, round(len(indices) * share))) for indices in train]
    pairs = list(zip(train, kept, strict=True))
    return [indices[:n] for indices, n in pairs], [indices[n:] for indices, n in pairs]


def class_incremental(
    dataset: ImageDataset,
    increments: Sequence[int],
    transform: Transform,
    size: int,
    *,
    order: npt.NDArray[np.int64] | None = None,
    validation: float = 0.0,
    threads: int = 0,
) -> Scenario:
    """Split a data set into tasks.

    Args:
        dataset: the images.
        increments: classes per task; they add up to all classes.
        transform: how images become network input.
        size: side of the network input, pixels.
        order: ``order[new label]`` = own label; default: ``class_order(classes)``.
        validation: if > 0, this share of every class's training samples, the last ones, replaces the test samples and is
            excluded from training: for choosing settings without test data.
        threads: number of threads that prefetch mini-batches.

    Raises:
        ConfigError: the increments do not add up, the order is not a permutation, or a class has no samples, or too few to
            hold one out.
    """
    classes = len(dataset.class_names)
    check_increments(increments, classes)
    chosen = class_order(classes) if order is None else np.asarray(order)
    check_order(chosen.tolist(), classes)
    if not 0 <= validation < 1:
        raise ConfigError(f"validation={validation}: expected a share in [0, 1)")
    train, test = _by_class(dataset, "training", chosen), _by_class(dataset, "test", chosen)
    held_out = dataset.test
    if validation:
        held_out, (train, test) = dataset.train, _with_held_out(dataset, train, chosen, validation)

    def view(samples: Samples, per_class: Indices, labels: range) -> View:
        sizes = [len(per_class[label]) for label in labels]
        new = torch.from_numpy(np.repeat(np.asarray(labels), sizes))
        return View(samples, np.concatenate([per_class[label] for label in labels]), new, transform, size, threads)

    tasks, first = [], 0
    for index, count in enumerate(increments):
        labels = range(first, first + count)
        tasks.append(Task(index, labels, view(dataset.train, train, labels), view(held_out, test, labels)))
        first += count
    return Scenario(tuple(tasks), chosen, tuple(dataset.class_names[own] for own in chosen))
