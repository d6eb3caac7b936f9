"""What a trial has found so far: part of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroflow.trial.result import Probe, Step


@dataclass
class History:
    """Accuracies, steps and probes of a trial so far.

    Attributes:
        accuracy: percent, setting x stage x task; NaN where there is none yet.
        steps: every training step.
        probes: what was seen between them.
        predictions: of each finished stage, true and predicted class of every test sample ``[2, N]``.
        stages: how many are finished.
    """

    accuracy: npt.NDArray[np.float64]
    steps: list[Step] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    stages: int = 0

    def add(self, steps: Sequence[Step], probes: Sequence[Probe]) -> None:
        """Add a task's steps and probes, which are numbered within the task, under their numbers within the trial."""
        first = len(self.steps)
        self.steps += [dataclasses.replace(step, step=first + step.step) for step in steps]
        self.probes += [dataclasses.replace(probe, step=first + probe.step) for probe in probes]

    def confusion(self, seen: Sequence[int]) -> list[npt.NDArray[np.int64]]:
        """Of each stage, test samples by true class and predicted class.

        Args:
            seen: classes seen after each stage.
        """
        found = []
        for (true, predicted), classes in zip(self.predictions, seen, strict=True):
            counts = np.zeros((classes, classes), np.int64)
            np.add.at(counts, (true.numpy(), predicted.numpy()), 1)
            found.append(counts)
        return found

    def state(self) -> dict[str, Any]:
        """All of it as tensors and plain values."""
        return {
            "accuracy": torch.from_numpy(self.accuracy),
            "steps": as_rows(self.steps),
            "probes": as_rows(self.probes),
            "predictions": self.predictions,
            "stages": self.stages,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> History:
        """The history that ``state`` was made from."""
        steps, probes = [Step(*row) for row in state["steps"]], [Probe(*row) for row in state["probes"]]
        return cls(state["accuracy"].numpy(), steps, probes, state["predictions"], state["stages"])


def as_rows(records: Sequence[Step | Probe]) -> list[list[Any]]:
    """Records as lists of plain values, which a checkpoint can hold; ``Step(*row)`` is the way back."""
    return [list(dataclasses.asdict(record).values()) for record in records]
