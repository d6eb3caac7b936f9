"""Function values along a trial: what old tasks lose and the new one gains, every so many steps (ZeroFlow, Figure 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow.data.scenario import Batch, Task, View, joined
from zeroflow.methods import Method
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import Probe

SAMPLES = 200
"""Training samples of the old tasks together, and of the new one, that a probe looks at: evenly spread, always the same."""


class Watcher(Protocol):
    """Looks at a method between the steps of a task; ``seen``: what it keeps, part of a checkpoint."""

    seen: list[Probe]

    def look(self, step: int, *, last: bool = False) -> None:
        """Before step ``step`` of the task; ``last``: after its last step."""


class FunctionValues:
    """Mean cross-entropy over all classes so far, without dropout and augmentation, on old and on new training samples.

    Args:
        method: after ``begin_task``.
        task: number of the new one.
        every: steps between two looks.
        old: fixed images and labels; ``old`` is None at the first task.
        new: fixed images and labels; ``old`` is None at the first task.
    """

    def __init__(
        self, method: Method, task: int, every: int, old: Sequence[Batch] | None, new: Sequence[Batch]
    ) -> None:
        self.method, self.task, self.every, self.old, self.new = method, task, every, old, new
        self.seen: list[Probe] = []

    @classmethod
    def of(
        cls, config: TrialConfig, method: Method, tasks: Sequence[Task], plain: Callable[[View], Iterable[Batch]]
    ) -> FunctionValues | None:
        """The probe that a configuration asks for at the last of ``tasks``; ``plain`` makes images on the device."""
        if not config.probe_every:
            return None
        *before, new = (task.train for task in tasks)
        old = list(plain(some(joined(before)))) if before else None
        return cls(method, tasks[-1].index, config.probe_every, old, list(plain(some(new))))

    def look(self, step: int, *, last: bool = False) -> None:
        """Before step ``step`` of the task, if it is its turn; ``last``: after the task's last step, always."""
        if not last and step % self.every:
            return
        training = self.method.training
        self.method.eval()
        try:
            old = None if self.old is None else self._value(self.old)
            self.seen.append(Probe(self.task, step, "function_value", old, self._value(self.new)))
        finally:
            self.method.train(training)

    @torch.no_grad()
    def _value(self, batches: Iterable[Batch]) -> float:
        return float(np.mean(np.concatenate([part.double().cpu().numpy() for part in self._losses(batches)])))

    def _losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        for images, labels in batches:
            logits = self.method.scores(self.method.features(images, range(1)))
            yield F.cross_entropy(logits, labels.to(logits.device), reduction="none")


def some(view: View, count: int = SAMPLES) -> View:
    """The samples of a view that a probe looks at, at most ``count``."""
    chosen = np.unique(np.linspace(0, len(view) - 1, count).astype(np.int64))
    return View(view.samples, view.indices[chosen], view.labels[torch.from_numpy(chosen)], view.transform, view.size)
