"""Results of two tasks, equal or not, for the tests of stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from everything import PROVENANCE

from zeroflow.results import Store
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import Step, TrialResult


def cell(level: float = 80.0, *, loss: float = 0.5, **config: Any) -> TrialResult:
    """A result of two tasks whose stage accuracies are ``level`` and ``level - 10``, so Avg is ``level - 5``."""
    values = TrialConfig(**({"tasks": 2, "lr": 0.01, "queries": 1} | config))
    untrained = values.method == "simplecil"
    return TrialResult(
        config=values,
        accuracy_matrix=np.array([[level, np.nan], [level - 20, level]]),
        task_incremental=np.array([[level, np.nan], [level - 10, level + 2]]),
        domain_incremental=None if values.base_classes else np.array([[level, np.nan], [level - 12, level]]),
        test_samples=np.array([30, 30]),
        task_classes=np.array([3, 1] if values.base_classes else [2, 2]),
        class_order=np.array([3, 1, 0, 2]),
        class_names=["cat", "dog", "eel", "fox"],
        steps=[] if untrained else [Step(0, 0, 0, 1.25, 0.01, 0.5), Step(1, 0, 1, loss, 0.005)],
        probes=[],
        costs={
            "forward_passes": 0 if untrained else 12_000,
            "peak_memory_bytes": 3 * 2**20,
            "trainable_parameters": 0 if untrained else 700,
            "seconds": 4.5,
            "training_seconds": 0.0 if untrained else 3.5,
            "seconds_per_epoch": None if untrained else 0.35,
        },
        provenance=dict(PROVENANCE),
    )


def simplecil(level: float = 70.0, **config: Any) -> TrialResult:
    return cell(level, method="simplecil", optimizer=None, lr=None, queries=None, schedule=None, epochs=None, **config)


def path(store: Store, table: str, result: TrialResult) -> Path:
    return Path(store.root, table, f"{result.cell_id}.parquet")
