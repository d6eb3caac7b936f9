"""Mutated stores: every row that is read is one that was written, and no cell goes without a word."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from everything import everything
from mutations import Check, beside, damaged, judged, numbers

from zeroflow.results import SCHEMAS, Store, load
from zeroflow.results.packing import pack
from zeroflow.results.parquet import encode
from zeroflow.results.store import NOT_BY_CELL, key_of

Rows = dict[str, dict[str, Counter[str]]]
"""By table and id, each row as JSON."""


def rows_of(store: Path) -> Rows:
    found: Rows = {}
    for table in SCHEMAS:
        by_id = found[table] = {}
        for row in load(store, table).to_pylist():
            by_id.setdefault(row[key_of(table)], Counter())[json.dumps(row, default=str)] += 1
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Rows]:
    """A loose store and the same one packed, and what both hold."""
    loose = tmp_path_factory.mktemp("stores") / "loose"
    everything(Store(loose))
    packed = Path(shutil.copytree(loose, loose.with_name("packed")))
    pack(packed)
    return {"loose": loose, "packed": packed}, rows_of(loose)


def rewritten(file: Path, table: pa.Table, random: Random) -> None:
    """Write a table in place of a file, as zeroflow or as other programs do."""
    if random.random() < 0.5 and set(table.column_names) == set(SCHEMAS[file.parent.name].names):
        file.write_bytes(encode(file.parent.name, table))
    else:
        pq.write_table(table, file)


KINDS = (
    "damage",
    "damage",
    "damage",
    "lost",
    "beside",
    "beside",
    "temporary",
    "copy",
    "misnamed",
    "version",
    "column",
    "older",
    "clock",
    "order",
    "unfinished",
)


def changed_store(root: Path, random: Random) -> tuple[str, set[tuple[str, str]], set[str]]:
    """Change a store; what was done, the files that it destroyed (table, id), and columns that may differ now."""
    file = random.choice(sorted(root.glob("*/*.parquet")))
    table, id_ = file.parent.name, file.stem
    kind = random.choice(KINDS)
    if kind == "damage":
        what, data = damaged(file.read_bytes(), random)
        file.write_bytes(data)
        return f"{table}/{id_}: {what}", {(table, id_)}, set()
    if kind == "lost":
        file.unlink()
        return f"{table}/{id_} is lost", {(table, id_)}, set()
    if kind == "beside":
        return (
            beside(random.choice((file.parent, root)), random, (".parquet", ".txt", ".tmp", ""), b"PAR1junkPAR1"),
            set(),
            set(),
        )
    if kind == "temporary":
        content = file.read_bytes()
        (file.parent / f".{file.name}.{random.randrange(9**9)}.tmp").write_bytes(
            content[: random.randrange(len(content))]
        )
        return f"a temporary file of {table}/{id_}", set(), set()
    if kind == "copy":
        new = random.choice((f"{id_} (1).parquet", f"{id_}.parquet.bak", f"copy of {id_}.parquet", f"{id_}~"))
        shutil.copy(file, file.with_name(new))
        return f"{table}/{new} is a copy", set(), set()
    if kind == "misnamed":
        other = random.choice(sorted(file.parent.glob("*.parquet")))
        other.write_bytes(file.read_bytes())
        return f"{table}/{other.stem} is a copy of {id_}", {(table, other.stem)} if other != file else set(), set()
    if kind == "unfinished":
        trials = random.choice(sorted((root / "trials").glob("*.parquet")))
        trials.unlink()
        return f"trials/{trials.stem} is not written yet", {("trials", trials.stem)}, set()
    if kind == "clock":
        os.utime(file, random.choice(((0, 0), (7.2e9, 7.2e9))))
        return f"{table}/{id_} is of another century", set(), set()
    rows = pq.ParquetFile(file).read()
    if kind == "order":
        pq.write_table(rows.select(sorted(rows.column_names)), file)
        return f"{table}/{id_}: columns in another order", set(), set()
    if kind == "column":
        pq.write_table(rows.append_column("from_the_future", pa.array([1] * len(rows))), file)
        return f"{table}/{id_}: a further column", set(), set()
    if kind == "older" and table not in ("trials",):
        lost = random.choice([name for name in rows.column_names if name != key_of(table)])
        pq.write_table(rows.drop_columns(lost), file)
        return f"{table}/{id_}: no column {lost} yet", set(), {lost}
    for name in random.sample(sorted((root / "trials").glob("*.parquet")), 1):
        trials = pq.ParquetFile(name).read()
        place = trials.column_names.index("schema_version")
        future = trials.set_column(place, "schema_version", pa.array([2] * len(trials), pa.int64()))
        rewritten(name, future, random)
    return f"trials/{name.stem}: schema version 2", {("trials", name.stem)}, {"schema_version"}


def wrong_rows(root: Path, original: Rows, destroyed: set[tuple[str, str]], columns: set[str]) -> str | None:
    """Compare a store with what was written."""
    done, told = Store(root).done(), ""
    for table in SCHEMAS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = load(root, table).to_pylist()
        told += " ".join(str(warning.message) for warning in caught)
        found: dict[str, Counter[str]] = {}
        for row in rows:
            found.setdefault(row[key_of(table)], Counter())[json.dumps(row, default=str)] += 1
        for id_, these in found.items():
            right = original[table].get(id_, Counter())
            if columns and these != right:
                these, right = without(these, columns), without(right, columns)
            if these - right:
                return f"{table}: rows of {id_} that were never written: {next(iter(these - right))[:300]}"
            if these != right and (table, id_) not in destroyed:
                return f"{table}: {id_} has {these.total()} of its {right.total()} rows"
        for id_ in original[table].keys() - found.keys():
            if table in NOT_BY_CELL or id_ in done:
                if (table, id_) not in destroyed and id_ not in told:
                    return f"{table}: {id_} is lost without a word"
            elif ("trials", id_) not in destroyed:
                return f"{table}: {id_} is lost, though nothing happened to its trial"
        if table == "trials" and (ghosts := done - found.keys() - {id_ for id_ in done if id_ in told}):
            return f"done, but without a row or a word: {ghosts}"
    return None


def without(rows: Counter[str], columns: set[str]) -> Counter[str]:
    kept: Counter[str] = Counter()
    for row, count in rows.items():
        values: dict[str, Any] = json.loads(row)
        kept[json.dumps({key: value for key, value in values.items() if key not in columns})] += count
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("some", numbers(40))
@pytest.mark.parametrize("kind", ["loose", "packed"])
def test_a_mutated_store_gives_rows_that_were_written_or_is_refused(
    kind: str, some: range, stores: tuple[dict[str, Path], Rows], tmp_path: Path
) -> None:
    places, original = stores

    def one(random: Random, number: int) -> tuple[str, Check, str]:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        root = Path(shutil.copytree(places[kind], tmp_path / "store"))
        what, destroyed, columns = changed_store(root, random)
        if kind == "packed":  # a packed file holds all ids
            destroyed |= {(table, id_) for table, name in destroyed if name == "packed" for id_ in original[table]}
        return what, lambda: wrong_rows(root, original, destroyed, columns), str(root)

    assert not (found := judged(f"store {kind}", some, one)), "\n".join(found)
