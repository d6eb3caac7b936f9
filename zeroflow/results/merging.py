"""One store out of several, from several machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.errors import ConfigError
from zeroflow.progress import Progress, silent
from zeroflow.results import agreement
from zeroflow.results.copying import complete, copy_cell, copy_others
from zeroflow.results.schema import SCHEMAS
from zeroflow.results.store import Store


def merge(target: Store | str | Path, *sources: Store | str | Path, on_progress: Progress = silent) -> int:
    """Copy into a store what it lacks of others: finished cells, searches, landscapes, and failures of cells that are done nowhere.

    Nothing in ``target`` is overwritten, and nothing is copied before all stores are found to agree on every key of
    ``agreement.RESULTS`` that both measured. Merging again goes on where an interruption ended it.

    Args:
        target: a store, its folder or its URI; made if it is not there.
        *sources: others, which stay as they are.
        on_progress: see ``Progress``; a unit is a cell.

    Returns:
        How many finished cells were added.

    Raises:
        ConfigError: a cell has different results in two stores (the message names the cell, the key and both values), stores
            hold results of several texts of one imported file, a source is no store, ``target`` cannot be written, or a newer zeroflow wrote one of them.
    """
    into, *others = (store if isinstance(store, Store) else Store(store) for store in (target, *sources))
    for store in others:
        if not store.exists():
            raise ConfigError(f"results {store.root!r}: expected a store to merge from, found nothing")
    home: dict[str, Store] = {}
    _check_texts((into, *others))
    found = agreement.SCHEMA.empty_table()
    for store in (into, *others):
        trials = store.load("trials", agreement.SCHEMA.names)
        _check_equal(found, trials, home, store)
        new = [cell for cell in trials["cell_id"].to_pylist() if home.setdefault(cell, store) is store]
        found = pa.concat_tables([found, trials.filter(pc.is_in(trials["cell_id"], pa.array(new, pa.string())))])

    into.check_writable()
    added, copied = 0, [(cell, store) for cell, store in home.items() if store is not into]
    for number, (cell, store) in enumerate(copied):
        on_progress(cell, number, len(copied))
        added += copy_cell(into, cell, store)
    failed = set(into.failed())
    for store in others:
        complete(into, store)
        copy_others(into, store)
        for cell, failure in store.failed().items():
            if cell not in home and cell not in failed:
                into.write_failure(pa.Table.from_pylist([failure], schema=SCHEMAS["failures"]))
                failed.add(cell)
    return added


def _check_texts(stores: Sequence[Store]) -> None:
    trials = pa.concat_tables([store.load("trials", agreement.VERSIONED) for store in stores])
    for several in agreement.several_versions(trials):
        raise ConfigError(f"{several}; nothing was merged: keep results of different versions in different stores")


def _check_equal(found: pa.Table, trials: pa.Table, home: Mapping[str, Store], store: Store) -> None:
    for difference in agreement.differences(found, trials):
        words = difference.described(repr(home[difference.cell].root), repr(store.root))
        raise ConfigError(f"{words}; nothing was merged: remove the cell from the store that is wrong")
