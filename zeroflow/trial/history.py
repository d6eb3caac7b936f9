"""What a trial has found so far: part of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zeroflow.trial.result import Probe, Step


@dataclass
class History:
    """Accuracies, steps and probes of a trial so far.

    Attributes:
        accuracy: percent, setting x stage x task; NaN where there is none yet.
        steps: every training step.
        probes: what was seen between them.
        stages: how many are finished.
    """

    accuracy: npt.NDArray[np.float64]
    steps: list[Step] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    stages: int = 0

    def add(self, steps: Sequence[Step], probes: Sequence[Probe]) -> None:
        """Add a task's steps and probes, which are numbered within the task, under their numbers within the trial."""
        first = len(self.steps)
        self.steps += [dataclasses.replace(step, step=first + step.step) for step in steps]
        self.probes += [dataclasses.replace(probe, step=first + probe.step) for probe in probes]

    def state(self) -> dict[str, Any]:
        """All of it as tensors and plain values."""
        return {
            "accuracy": torch.from_numpy(self.accuracy),
            "steps": as_rows(self.steps),
            "probes": as_rows(self.probes),
            "stages": self.stages,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> History:
        """The history that ``state`` was made from."""
        steps, probes = [Step(*row) for row in state["steps"]], [Probe(*row) for row in state["probes"]]
        return cls(state["accuracy"].numpy(), steps, probes, state["stages"])


def as_rows(records: Sequence[Step | Probe]) -> list[list[Any]]:
    """Records as lists of plain values, which a checkpoint can hold; ``Step(*row)`` is the way back."""
    return [list(dataclasses.asdict(record).values()) for record in records]
