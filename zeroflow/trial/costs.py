"""All that a trial costs, added up in one place: forward passes, memory, seconds, and what a black box is asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zeroflow.methods import Method
from zeroflow.models.endpoint import BlackBox
from zeroflow.optim import Executor
from zeroflow.trial.training import TaskTrainer


@dataclass(frozen=True)
class Asked:
    """What a black box was asked for.

    Attributes:
        requests: that were sent.
        images: in all of them.
        reused: images whose features were read from disk instead.
    """

    requests: int = 0
    images: int = 0
    reused: int = 0

    @classmethod
    def by_all(cls, black_box: BlackBox, reused: int, executor: Executor) -> Asked:
        """Add up what all processes of a trial have asked since it was opened; each of them calls this."""
        here = float(black_box.requests), float(black_box.images), float(reused)
        everywhere = executor.map(executor.groups, lambda _: here, 3)
        return cls(*(int(sum(each)) for each in zip(*everywhere, strict=True)))

    def __add__(self, other: Asked) -> Asked:
        return Asked(self.requests + other.requests, self.images + other.images, self.reused + other.reused)


@dataclass
class Costs:
    """What a trial has cost so far: part of a checkpoint.

    Attributes:
        forward_passes: of mini-batches.
        forward_equivalents: all work in forward passes, see ``Estimator.equivalents``.
        epochs: that were trained, in all tasks.
        peak_bytes: the most memory that a step of a task needed; where none is trained, a forward pass.
        classifier_bytes: what of it was the classifier, which grows with the stream.
        trainable_parameters: of the task that trained the most.
        training_seconds: of all steps; None: too few were timed to know.
        seconds: from the beginning to the last finished task, time between interruption and resumption left out.
        asked: of a black box.
    """

    forward_passes: int = 0
    forward_equivalents: int = 0
    epochs: int = 0
    peak_bytes: int = 0
    classifier_bytes: int = 0
    trainable_parameters: int = 0
    training_seconds: float | None = 0.0
    seconds: float = 0.0
    asked: Asked = Asked()

    def add_training(self, method: Method, trainer: TaskTrainer) -> None:
        """Add what a task's training has cost."""
        steps, optimizer = len(trainer.steps), trainer.optimizer
        self.add_peak(trainer.peak_bytes, method)
        self.trainable_parameters = max(self.trainable_parameters, optimizer.flat.size)
        prepared, evaluated = method.passes()
        prepared *= steps + optimizer.full_forwards  # once a step, and in every evaluation of a snapshot
        self.forward_passes += prepared + evaluated * optimizer.forwards
        self.forward_equivalents += prepared + evaluated * optimizer.equivalents
        self.epochs += trainer.epochs
        own, before = trainer.seconds, self.training_seconds
        self.training_seconds = None if own is None or before is None else before + own

    def add_peak(self, peak_bytes: int, method: Method) -> None:
        """Remember a peak of memory if it is higher than those before."""
        if peak_bytes > self.peak_bytes:
            self.peak_bytes, self.classifier_bytes = peak_bytes, classifier_bytes(method)

    @contextmanager
    def passes_beside_training(self, method: Method, batch_size: int | None) -> Iterator[None]:
        """Add the images that a method passes through the network inside, in mini-batches."""
        passed, worked = method.images_passed, method.images_worked
        yield
        self.forward_passes += math.ceil((method.images_passed - passed) / (batch_size or 1))
        self.forward_equivalents += math.ceil((method.images_worked - worked) / (batch_size or 1))

    def summary(
        self, method: Method, black_box: BlackBox | None, price_per_1000_images: float | None
    ) -> dict[str, Any]:
        """The costs as a result names them.

        Args:
            method: as it is at the end.
            black_box: that was asked; None: the backbone is none.
            price_per_1000_images: of the black box.
        """
        peak = self.peak_bytes + classifier_bytes(method) - self.classifier_bytes
        unseen, training = method.backbone.unseen_bytes, self.training_seconds
        costs = {
            "forward_passes": self.forward_passes,
            "forward_equivalents": self.forward_equivalents,
            "peak_memory_bytes": None if unseen is None else peak + unseen,
            "trainable_parameters": self.trainable_parameters,
            "seconds": self.seconds,
            "training_seconds": training,
            "seconds_per_epoch": None if training is None or not self.epochs else training / self.epochs,
        }
        if black_box is None:
            return costs
        price = None if price_per_1000_images is None else self.asked.images * price_per_1000_images / 1000
        return costs | {
            "requests": self.asked.requests,
            "queried_images": self.asked.images,
            "reused_images": self.asked.reused,
            "price": price,
        }

    def state(self) -> dict[str, Any]:
        """All of it as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Costs:
        """The costs that ``state`` was made from."""
        # Tasks that were kept before this was counted.
        known = {"training_seconds": None, **state}
        return cls(**{**known, "asked": Asked(**state["asked"])})


def classifier_bytes(method: Method) -> int:
    """Bytes that the method's classifier keeps of what it has seen."""
    return sum(value.nbytes for value in method.classifier.buffers()) if method.own_classifier else 0
