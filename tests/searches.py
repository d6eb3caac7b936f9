"""Searches on a made-up grid, and what they found, for the tests of them."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from zeroflow.grid.grid_file import Grid, parse_grid
from zeroflow.grid.search_plan import SearchPlan, plan_search
from zeroflow.grid.search_selection import SearchOutcome, outcomes
from zeroflow.results import SCHEMAS, Store
from zeroflow.results.integrity import as_column
from zeroflow.results.schema import CONFIG_KEYS
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.keys.values import as_json

TINY = {"checkpoint": "none", "tasks": 4, "epochs": 2, "batch_size": 16, "image_size": 14}
"""With ``some_drawings``: 5 classes of 12 drawings in the first task; 9 of them are trained on, 45 drawings, 3 mini-batches."""


def grid_of(dataset: str, search: dict[str, Any], *blocks: dict[str, Any], **sections: Any) -> Grid:
    return parse_grid({"base": {**TINY, "dataset": dataset}, "grid": list(blocks), "search": search, **sections})


MOMENTUM, BOTTLENECK = "optimizer_options.momentum", "method_options.bottleneck"


def planned(dataset: str, options: dict[str, Any], *blocks: dict[str, Any], **search: Any) -> SearchPlan:
    settings = {"forward_passes": 10**6, "lr": [0.3, 0.1], "options": options, **search}
    return plan_search(grid_of(dataset, settings, *(blocks or ({"optimizer": "zo-sgd"},))), None)


def made_up(
    store: Store, config: TrialConfig, accuracy: float, *last_losses: float | None, n: int | None = None
) -> None:
    """A finished cell with an accuracy and the losses of its last epoch; in the first epoch all losses were low."""
    now = datetime(2026, 1, 2, tzinfo=UTC)
    keys = dataclasses.asdict(config)
    columns = {key: as_column(keys[key]) for key in CONFIG_KEYS}
    trial = {"cell_id": config.cell_id, "config": as_json(keys), **columns, "last": accuracy, "finished_at": now}
    trial["schema_version"] = 1
    steps = [(0, 0.001), *((config.epochs - 1, loss) for loss in last_losses)]
    rows = [{"cell_id": config.cell_id, "epoch": epoch, "loss": loss} for epoch, loss in steps]
    stages = [{"cell_id": config.cell_id, "stage": 0, "n": n}]
    store.write(
        {
            "trials": pa.Table.from_pylist([trial], SCHEMAS["trials"]),
            "steps": pa.Table.from_pylist(rows, SCHEMAS["steps"]),
            "stages": pa.Table.from_pylist(stages, SCHEMAS["stages"]),
        }
    )


def three_tries(dataset: str, **search: Any) -> SearchPlan:
    """Of zo-sgd: lr 0.3, 0.1 and 0.2."""
    settings = {"forward_passes": 100, "lr": [0.3, 0.1, 0.2], **search}
    return plan_search(grid_of(dataset, settings, {"optimizer": "zo-sgd"}), None)


def found_by(store: Store, plan: SearchPlan) -> SearchOutcome:
    (outcome,) = outcomes(plan, store)
    return outcome
