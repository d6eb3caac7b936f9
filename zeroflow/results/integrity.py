"""Whether a row of ``trials`` is as it was written: its id is the hash of its configuration, which its columns repeat."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.results.schema import CONFIG_KEYS, OLDER
from zeroflow.trial.config import cell_id_of
from zeroflow.trial.keys.values import as_json

_LIMITS = {"avg": (0.0, 100.0), "last": (0.0, 100.0), "fgt": (-100.0, 100.0), "bwt": (-100.0, 100.0)}
READ = ("cell_id", "config", *CONFIG_KEYS, *_LIMITS)
"""The columns of ``trials`` that this takes."""


def without_contradictions(trials: pa.Table, root: str, stacklevel: int) -> pa.Table:
    """The rows that are as they were written; a warning names the others, of a store at ``root``."""
    changed = contradictions(trials)
    if not changed:
        return trials
    named = "; ".join(f"{cell}: {wrong}" for cell, wrong in changed.items())
    warnings.warn(
        f"left out cells of {root} that were changed after they were written: {named}", stacklevel=stacklevel + 1
    )
    return without(trials, changed)


def without(trials: pa.Table, cells: Iterable[str]) -> pa.Table:
    """The rows of other cells."""
    return trials.filter(pc.invert(pc.is_in(trials["cell_id"], pa.array(list(cells), pa.string()))))


def as_today(trials: pa.Table) -> pa.Table:
    """The same rows, with the keys of configurations that older files lack: seeds of both are of one setting."""
    for key, value in OLDER.items():
        if (column := trials.schema.get_field_index(key)) >= 0:
            trials = trials.set_column(column, trials.schema.field(column), pc.fill_null(trials[key], value))
    return trials


def contradictions(trials: pa.Table) -> dict[str, str]:
    """Cells whose rows were changed by others, with what is wrong.

    Args:
        trials: rows of the table ``trials``, with the columns ``READ``.
    """
    rows = trials.select(READ).to_pylist()
    return {row["cell_id"]: wrong for row in rows if (wrong := _wrong(row))}


def _wrong(row: Mapping[str, Any]) -> str | None:
    try:
        config = json.loads(row["config"])
        made = cell_id_of(config)
    except (TypeError, ValueError, AttributeError):
        return "config is no configuration"
    if made != row["cell_id"]:
        return f"config is that of cell {made}"
    for key in CONFIG_KEYS:
        if key in row and row[key] != (said := as_column(config.get(key))) and not (row[key] is None and said == "{}"):
            return f"{key} is {row[key]!r}, and {said!r} in config"
    for name, (least, most) in _LIMITS.items():
        if (value := row.get(name)) is not None and not least <= value <= most:
            return f"{name} is {value!r}"
    return None


def as_column(value: Any) -> Any:
    """The value of a key of a configuration as its column in ``trials`` holds it: mappings and lists as JSON."""
    if isinstance(value, Mapping | list):
        return as_json(value)
    return value
