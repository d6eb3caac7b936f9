"""Metrics of learning task by task, from the stage x task accuracy matrix. Nothing is rounded.

a[i, j] is the accuracy in percent on task j's test samples after stage i, n[j] their number. One run has such a matrix in
each of the three ``SETTINGS`` of van de Ven, Tuytelaars & Tolias 2022, "Three types of incremental learning".
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

SETTINGS = ("class-incremental", "task-incremental", "domain-incremental")
"""What counts as right: the best-scored of all classes seen; the best-scored of the sample's own task, which is told; the
place within its task of the best-scored of all classes seen, which has a meaning where all tasks have equally many."""

DEFINITIONS = {
    "avg": "mean over stages of the pooled top-1 accuracy over all test samples seen so far, percent",
    "last": "pooled top-1 accuracy over all test samples after the last stage, percent",
    "fgt": "mean over the tasks before the last of (best accuracy at any stage, the last included, minus the final one)",
    "bwt": "mean over the tasks before the last of (final accuracy minus accuracy right after learning)",
    "avg_task_incremental": "as avg, but among the classes of the sample's own task, which is told",
    "last_task_incremental": "as last, but among the classes of the sample's own task, which is told",
    "avg_domain_incremental": "as avg, but only the place of a class within its task must be right, without being told the task",
    "last_domain_incremental": "as last, but only the place of a class within its task must be right, without being told the task",
}


def stage_accuracy(accuracy: Matrix, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Pooled accuracy A[i] of each stage: sample-weighted over the tasks seen, percent ``[T]``.

    Args:
        accuracy: ``[T, T]``, NaN above the diagonal.
        samples: ``[T]``, each > 0.
    """
    _check(accuracy, samples)
    weights = np.tril(np.broadcast_to(samples.astype(np.float64), accuracy.shape))
    return (np.where(weights > 0, accuracy, 0.0) * weights).sum(axis=1) / weights.sum(axis=1)


def average(accuracy: Matrix, samples: npt.NDArray[np.int64]) -> float:
    """Avg: the mean of the stage accuracies."""
    return float(stage_accuracy(accuracy, samples).mean())


def last(accuracy: Matrix, samples: npt.NDArray[np.int64]) -> float:
    """Last: the stage accuracy after the last task."""
    return float(stage_accuracy(accuracy, samples)[-1])


def forgetting(accuracy: Matrix) -> float:
    """Fgt: how far tasks fell from their best, never negative; 0 for a single task."""
    if len(accuracy) == 1:
        return 0.0
    return float(np.mean([np.max(accuracy[j:, j]) - accuracy[-1, j] for j in range(len(accuracy) - 1)]))


def backward_transfer(accuracy: Matrix) -> float:
    """BWT (Lopez-Paz & Ranzato 2017, Eq. 3): final minus just-learned accuracy; 0 for a single task."""
    if len(accuracy) == 1:
        return 0.0
    return float(np.mean([accuracy[-1, j] - accuracy[j, j] for j in range(len(accuracy) - 1)]))


def _check(accuracy: Matrix, samples: npt.NDArray[np.int64]) -> None:
    tasks = len(samples)
    if accuracy.shape != (tasks, tasks):
        raise ValueError(f"accuracy: expected shape ({tasks}, {tasks}), got {accuracy.shape}")
    if not (samples > 0).all():
        raise ValueError(f"samples: task {int(np.argmin(samples))} has no test samples")
    if np.isnan(accuracy[np.tril_indices(tasks)]).any():
        raise ValueError("accuracy: NaN on or below the diagonal")
