"""What two results of the same cell must agree on, wherever they were computed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.results.schema import SCHEMAS

# What a cell's configuration determines; the rest of its row is the configuration, or says where, when and how fast.
RESULTS = (
    "avg", "last", "fgt", "bwt", "avg_task_incremental", "last_task_incremental", "avg_domain_incremental",
    "last_domain_incremental", "final_loss", "forward_passes", "trainable_parameters", "class_order", "class_names",
)  # fmt: skip


SCHEMA = pa.schema([SCHEMAS["trials"].field(name) for name in ("cell_id", *RESULTS)])
"""The columns of ``trials`` that comparing takes."""


@dataclass(frozen=True)
class Difference:
    """A result that a cell has with two values."""

    cell: str
    key: str
    first: Any
    second: Any

    def described(self, first: str, second: str) -> str:
        """In words; ``first``, ``second``: where the two values are."""
        return f"cell {self.cell}: {self.key} is {self.first!r} in {first} and {self.second!r} in {second}"


def differences(first: pa.Table, second: pa.Table) -> list[Difference]:
    """Cells of both tables that differ in a result both measured, each with the first such key, in the order of ``second``."""
    rows = {row["cell_id"]: row for row in first.select(SCHEMA.names).to_pylist()}
    pairs = [(rows[row["cell_id"]], row) for row in second.select(SCHEMA.names).to_pylist() if row["cell_id"] in rows]
    found = ((one, other, _key(one, other)) for one, other in pairs)
    return [Difference(one["cell_id"], key, one[key], other[key]) for one, other, key in found if key]


def warn_of_differences(table: str, counting: Sequence[pa.Table], others: pa.Table, place: str) -> None:
    """Warn of cells that have other results elsewhere, and of searches that have other tries.

    Args:
        table: whose rows these are; of other tables than ``trials`` and ``searches`` nothing is said.
        counting: rows that count.
        others: rows that do not where they are of the same cells or searches.
        place: where these are.
    """
    for part in counting:
        if table == "trials":
            for found in differences(part, others):
                warnings.warn(f"{found.described('an earlier store', place)}; the earlier one counts", stacklevel=3)
        if table == "searches":
            for sentence in _other_searches(part, others, place):
                warnings.warn(sentence, stacklevel=3)


def _other_searches(first: pa.Table, second: pa.Table, place: str) -> Iterator[str]:
    """Searches of both tables that differ in their tries or their choice, as after a run with another budget, each in words."""
    here, there = _tries(first), _tries(second)
    for search in sorted(here.keys() & there.keys()):
        if here[search] != there[search]:
            yield (
                f"search {search}: {len(here[search])} tries in an earlier store and {len(there[search])} in {place}, or another "
                "choice; the earlier one counts (zeroflow search, run again on a merged store, chooses among all of its cells)"
            )


def _tries(searches: pa.Table) -> dict[str, set[tuple[Any, ...]]]:
    found: dict[str, set[tuple[Any, ...]]] = {}
    for row in searches.to_pylist():
        accuracy = None if row["accuracy"] is None else round(row["accuracy"], 6)
        found.setdefault(row["search_id"], set()).add((row["cell_id"], row["chosen"], accuracy))
    return found


VERSIONED = ("imports", "named")
"""Columns of ``trials`` that hold hashes by name: of imported Python files, of weights and images of one's own."""


def several_versions(trials: pa.Table) -> list[str]:
    """The files of one's own of which there are results of more than one version, each in words.

    Args:
        trials: with the columns ``VERSIONED``.
    """
    texts: dict[str, set[str]] = {}
    for column in VERSIONED:
        for named in pc.unique(trials[column]).drop_null().to_pylist():
            for name, digest in json.loads(named).items():
                texts.setdefault(name, set()).add(digest)
    return [
        f"results of {len(found)} versions of {name} stand side by side: {', '.join(sorted(found))}"
        for name, found in texts.items()
        if len(found) > 1
    ]


def _key(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    for key in RESULTS:
        if one[key] != other[key] and one[key] is not None and other[key] is not None:
            return key
    return None
