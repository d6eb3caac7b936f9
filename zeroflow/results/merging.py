"""One store out of several, from several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from zeroflow.errors import ConfigError
from zeroflow.progress import Progress, silent
from zeroflow.results.schema import SCHEMAS
from zeroflow.results.store import Store

# What a cell's configuration determines; the rest of its row is the configuration, or says where, when and how fast.
RESULTS = (
    "avg", "last", "fgt", "bwt", "avg_task_incremental", "last_task_incremental", "avg_domain_incremental",
    "last_domain_incremental", "final_loss", "forward_passes", "trainable_parameters", "class_order", "class_names",
)  # fmt: skip


def merge(target: Store | str | Path, *sources: Store | str | Path, on_progress: Progress = silent) -> int:
    """Copy into a store what it lacks of others: finished cells, searches, landscapes, and failures of cells that are done nowhere.

    Nothing in ``target`` is overwritten, and nothing is copied before all stores are found to agree on every key of
    ``RESULTS`` that both measured. Merging again goes on where an interruption ended it.

    Args:
        target: a store, its folder or its URI; made if it is not there. sources: others, which stay as they are.
        on_progress: see ``Progress``; a unit is a cell.

    Returns:
        How many finished cells were added.

    Raises:
        ConfigError: a cell has different results in two stores (the message names the cell, the key and both values), a
            source is no store, ``target`` cannot be written, or a newer zeroflow wrote one of them.
    """
    into, *others = (store if isinstance(store, Store) else Store(store) for store in (target, *sources))
    for store in others:
        if not store.exists():
            raise ConfigError(f"results {store.root!r}: expected a store to merge from, found nothing")
    home: dict[str, Store] = {}
    rows: dict[str, dict[str, Any]] = {}
    for store in (into, *others):
        for row in store.load("trials").select(["cell_id", *RESULTS]).to_pylist():
            cell = row["cell_id"]
            first = rows.setdefault(cell, row)
            _check_equal(first, row, home.setdefault(cell, store), store)

    into.check_writable()
    added, copied = 0, [(cell, store) for cell, store in home.items() if store is not into]
    for number, (cell, store) in enumerate(copied):
        on_progress(cell, number, len(copied))
        added += into.copy(cell, store)
    failed = set(into.failed())
    for store in others:
        into.copy_others(store)
        for cell, failure in store.failed().items():
            if cell not in home and cell not in failed:
                into.write_failure(pa.Table.from_pylist([failure], schema=SCHEMAS["failures"]))
                failed.add(cell)
    return added


def _check_equal(first: dict[str, Any], second: dict[str, Any], home: Store, store: Store) -> None:
    for key in RESULTS:
        if first[key] != second[key] and first[key] is not None and second[key] is not None:
            raise ConfigError(
                f"cell {first['cell_id']}: {key} is {first[key]!r} in {home.root!r} and {second[key]!r} in "
                f"{store.root!r}; nothing was merged: remove the cell from the store that is wrong"
            )
