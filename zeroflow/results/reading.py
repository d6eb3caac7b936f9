"""The rows of several stores together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.errors import unknown
from zeroflow.results import agreement
from zeroflow.results.schema import SCHEMAS
from zeroflow.results.store import Store, key_of


def load(
    results: Store | str | Path | Sequence[Store | str | Path], table: str, cells: Collection[str] | None = None
) -> pa.Table:
    """The rows of a table of a store, or of several stores together.

    Args:
        results: a store, its folder or its URI; or several, of which a cell (a search, a landscape) counts in the first that
            has it, with a warning if a later one has other results or tries.
        table: see ``zeroflow.results.SCHEMAS`` for the names and their columns.
        cells: ids of those to read, which is quicker than all; default: all.

    Raises:
        ConfigError: no such table, or a newer zeroflow wrote the store.
    """
    several = results if isinstance(results, Sequence) and not isinstance(results, str) else [results]
    stores = [each if isinstance(each, Store) else Store(each) for each in several]
    parts = [store.load(table, cells=cells) for store in stores]
    if len(parts) == 1:
        return parts[0]
    key = key_of(table)
    kept: list[pa.Table] = []
    seen: set[str] = set()
    for store, part in zip(stores, parts, strict=True):
        agreement.warn_of_differences(table, kept, part, store.root)
        kept.append(part.filter(pc.invert(pc.is_in(part[key], pa.array(sorted(seen), pa.string())))))
        seen.update(pc.unique(part[key]).to_pylist())
    if table not in SCHEMAS:
        raise unknown("table", table, SCHEMAS)
    return pa.concat_tables([SCHEMAS[table].empty_table(), *kept])
