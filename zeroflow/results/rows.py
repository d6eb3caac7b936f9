"""From a finished or failed cell to rows of the store's tables."""

from __future__ import annotations

import dataclasses
import math
import socket
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from zeroflow.imports import imports_of
from zeroflow.results.integrity import as_column
from zeroflow.results.schema import CONFIG_KEYS, SCHEMA_VERSION, SCHEMAS
from zeroflow.trial.keys.values import as_json
from zeroflow.trial.metrics import DEFINITIONS, Matrix, stage_accuracy

if TYPE_CHECKING:
    from zeroflow.studies.trajectories import Study
    from zeroflow.trial.config import TrialConfig
    from zeroflow.trial.result import TrialResult


def tables(
    result: TrialResult, *, workers: int = 1, shards: int = 1, ray_version: str | None = None
) -> dict[str, pa.Table]:
    """The rows of one finished cell: all tables of cells but ``failures``, those that have any.

    Args:
        result: the finished cell.
        workers: processes that shared its work.
        shards: slices of its mini-batches.
        ray_version: None if run without Ray.
    """
    return {
        "trials": _table("trials", [_trial(result, workers, shards, ray_version)]),
        "stages": _table("stages", _stages(result)),
        "accuracy": _table("accuracy", _accuracy(result)),
        **({"confusion": _confusion(result)} if result.confusion else {}),
        "steps": _table("steps", _steps(result)),
        **({"probes": _table("probes", _probes(result))} if result.probes else {}),
    }


def landscape(study: Study) -> tuple[pa.Table, pa.Table]:
    """The rows of one study, for ``Store.write_landscape``: tables ``trajectories`` and ``surfaces``."""
    names = {"landscape_id": study.landscape_id, "landscape": study.landscape}
    looks = [
        {**names, **run.columns(), "objective": objective, "task": task, "step": step, **dataclasses.asdict(point)}
        for run, objective, task, step, point in study.looks
    ]
    facts = {"config": study.config, **study.provenance}
    points = [*((None, point) for point in study.surface), *study.marks.items()]
    surface = [{**names, "point": name, **dataclasses.asdict(point), **facts} for name, point in points]
    return _table("trajectories", looks), _table("surfaces", surface)


def failure(config: TrialConfig, error: str, message: str, traceback: str, attempts: int) -> pa.Table:
    """The row of one failed cell, for ``Store.write_failure``.

    Args:
        config: the cell.
        error: name of the type of the last attempt's error.
        message: what that error says.
        traceback: where it arose.
        attempts: how often the cell was tried.
    """
    row = {
        "cell_id": config.cell_id,
        "config": as_json(dataclasses.asdict(config)),
        "label": config.label(),
        "error": error,
        "message": message,
        "traceback": traceback,
        "attempts": attempts,
        "host": socket.gethostname(),
        "failed_at": datetime.now(UTC),
    }
    return _table("failures", [row])


def _trial(result: TrialResult, workers: int, shards: int, ray_version: str | None) -> dict[str, Any]:
    config = dataclasses.asdict(result.config)
    return {
        **{key: as_column(config[key]) for key in CONFIG_KEYS},
        **{
            key: as_json(config[key]) if config[key] else None
            for key in ("classifier_options", "preprocessing", "later")
        },
        **result.summary,
        **result.provenance,
        "cell_id": result.cell_id,
        "schema_version": SCHEMA_VERSION,
        "status": "done",
        "config": as_json(config),
        "imports": as_json(imports) if (imports := imports_of(result.config)) else None,
        "named": as_json(dict(result.named)) if result.named else None,
        "class_order": [int(label) for label in result.class_order],
        "class_names": list(result.class_names),
        "metric_definitions": as_json(DEFINITIONS),
        "workers": workers,
        "data_shards": shards,
        "ray_version": ray_version,
    }


def _stages(result: TrialResult) -> list[dict[str, Any]]:
    pooled = {name: stage_accuracy(matrix, result.test_samples) for name, matrix in _settings(result).items()}
    return [
        {
            "cell_id": result.cell_id,
            "stage": stage,
            **{name: float(accuracy[stage]) for name, accuracy in pooled.items()},
            "classes_seen": int(result.task_classes[: stage + 1].sum()),
            "n": int(result.test_samples[: stage + 1].sum()),
        }
        for stage in range(len(result.test_samples))
    ]


def _accuracy(result: TrialResult) -> list[dict[str, Any]]:
    return [
        {
            "cell_id": result.cell_id,
            "stage": stage,
            "task": task,
            **{name: float(matrix[stage, task]) for name, matrix in _settings(result).items()},
            "n": int(result.test_samples[task]),
        }
        for stage in range(len(result.test_samples))
        for task in range(stage + 1)
    ]


def _confusion(result: TrialResult) -> pa.Table:
    """Pairs of classes that occur, column by column: there are many."""
    parts = []
    for stage, counts in enumerate(result.confusion):
        true, predicted = np.nonzero(counts)
        columns = {"true_class": true, "predicted_class": predicted, "n": counts[true, predicted]}
        constant = {
            "cell_id": pa.repeat(result.cell_id, len(true)),
            "stage": pa.repeat(pa.scalar(stage, pa.int64()), len(true)),
        }
        parts.append(pa.table({**constant, **columns}).select(SCHEMAS["confusion"].names).cast(SCHEMAS["confusion"]))
    return pa.concat_tables(parts)


def _settings(result: TrialResult) -> dict[str, Matrix]:
    """The accuracy matrices by the name of their column."""
    found = {
        "accuracy": result.accuracy_matrix,
        "task_incremental": result.task_incremental,
        "domain_incremental": result.domain_incremental,
    }
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def _steps(result: TrialResult) -> list[dict[str, Any]]:
    queries = [result.config.at(task).queries for task in range(len(result.test_samples))]
    return [{"cell_id": result.cell_id, "queries": queries[step.task], **vars(step)} for step in result.steps]


def _probes(result: TrialResult) -> list[dict[str, Any]]:
    return [{"cell_id": result.cell_id, **vars(probe)} for probe in result.probes]


def _table(name: str, rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Rows in the declared columns; a key without a column is left out, a column without a key is null."""
    return pa.Table.from_pylist([{k: _measured(v) for k, v in row.items()} for row in rows], schema=SCHEMAS[name])


def _measured(value: Any) -> Any:
    """None for NaN: readers disagree on whether NaN is a number, and on how it sorts and averages."""
    return None if isinstance(value, float) and math.isnan(value) else value
