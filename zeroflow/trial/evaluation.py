"""Accuracy on all tasks seen so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zeroflow.data.scenario import Batch, Task, View
from zeroflow.methods import Method
from zeroflow.optim import NonFiniteLoss
from zeroflow.trial.features import FrozenFeatures


@dataclass(frozen=True)
class DeviceBatches:
    """A view's samples under the test transform, with images on the device: as often as they are asked for."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    view: View

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.view.plain_batches(self.batch_size):
            yield images.to(self.device, self.dtype), labels


@dataclass(frozen=True, eq=False)
class Inputs:
    """A view's samples as a method's ``features`` takes them: images, the frozen backbone's features of them, or both.

    Attributes:
        method: says what it takes.
        images: a view's samples with images on the device.
        frozen: looks features up.
    """

    method: Method
    images: Callable[[View], Iterable[Batch]]
    frozen: FrozenFeatures

    def __call__(self, view: View) -> Iterable[Batch]:
        if self.method.takes == "images":
            return self.images(view)
        return self.frozen.batches(view, self.images(view) if self.method.takes == "both" else None)


class Evaluation:
    """Accuracy on all tasks seen so far; features of frozen spaces are computed once per test image and kept.

    Args:
        method: what is evaluated.
        inputs: a view's samples as ``method.features`` takes them, and their labels.
    """

    def __init__(self, method: Method, inputs: Callable[[View], Iterable[Batch]]) -> None:
        self.method, self.inputs = method, inputs
        self.kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def scores(self, test: View, task: int) -> Tensor:
        """Score a task's test samples for all classes seen so far, ``[N, classes]``."""
        self.method.eval()
        kept = self.kept.get(task)
        known = 0 if kept is None else kept.shape[1]
        spaces = range(known, max(self.method.frozen_spaces, 1))
        if len(spaces) or kept is None:
            fresh = torch.cat([self.method.features(inputs, spaces) for inputs, _ in self.inputs(test)])
            kept = fresh if kept is None else torch.cat([kept, fresh], dim=1)
            self.kept[task] = kept[:, : self.method.frozen_spaces]
        return self.method.scores(kept.clone())  # which may work in place

    def accuracy(self, test: View, task: int) -> float:
        """Top-1 accuracy on a task's test samples, percent."""
        return _percent(self.scores(test, task).argmax(dim=1).cpu() == test.labels)

    def accuracies(self, seen: Task, classes: int, width: int | None) -> tuple[tuple[float, float, float], Tensor]:
        """Accuracy on a task's test samples in the three ``SETTINGS``, percent, and the classes they are taken for ``[N]``.

        Args:
            seen: the task.
            classes: seen so far.
            width: classes of every task of the stream; None where they differ, and where being right without the task
                therefore has no meaning (then NaN).

        Raises:
            NonFiniteLoss: scores that are not finite, of which none is the best.
        """
        scores, labels, first = self.scores(seen.test, seen.index), seen.test.labels, seen.classes.start
        scorer = _scorer(self.method)
        if scores.shape != (len(labels), classes):
            raise ValueError(
                f"{scorer}: scores of shape {tuple(scores.shape)}, expected {(len(labels), classes)}: images x "
                "classes seen"
            )
        if bad := int((~scores.amax(dim=1).isfinite()).sum()):
            raise NonFiniteLoss(
                f"{scorer}: {bad} of {len(labels)} test samples of task {seen.index} have scores that are not finite"
                f"{'; lower lr or eps' if self.method.trains else ''}"
            )
        anywhere = scores.argmax(dim=1).cpu()
        within = scores[:, first : seen.classes.stop].argmax(dim=1).cpu() + first
        domain = math.nan if width is None else _percent(anywhere % width == labels % width)
        return (_percent(anywhere == labels), _percent(within == labels), domain), anywhere


def _scorer(method: Method) -> str:
    """Whose scores they are, for messages: a method's of somebody's own, or those of the classifier that it asks."""
    classifier = getattr(method, "classifier", None)
    if classifier is None or not type(method).scores.__module__.startswith("zeroflow."):
        return type(method).__name__
    return f"{type(method).__name__} with classifier {classifier.name!r}"


def _percent(right: Tensor) -> float:
    return 100.0 * float(right.double().mean())
