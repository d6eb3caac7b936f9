"""What two results of the same cell must agree on, wherever they were computed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
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


def warn_of_differences(counting: Sequence[pa.Table], others: pa.Table, place: str) -> None:
    """Warn of cells that have other results elsewhere.

    Args:
        counting: rows of ``trials`` that count.
        others: rows that do not where they are of the same cells.
        place: where these are.
    """
    for part in counting:
        for found in differences(part, others):
            warnings.warn(f"{found.described('an earlier store', place)}; the earlier one counts", stacklevel=3)


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
