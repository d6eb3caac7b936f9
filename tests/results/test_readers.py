"""A store as other tools read it: pandas, DuckDB and polars on committed results, and while cells are being written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from places import ROOT

from zeroflow.errors import ConfigError
from zeroflow.results import Store, load, merge

RESULTS = ROOT / "results"
TABLES = [("quick", name) for name in ("trials", "stages", "accuracy", "steps")]
TABLES.append(("table1_quickdraw_search", "searches"))

READERS: dict[str, Callable[[str], pa.Table]] = {
    "pandas": lambda table: pa.Table.from_pandas(pd.read_parquet(table), preserve_index=False),
    "duckdb": lambda table: duckdb.sql(f"SELECT * FROM '{table}/*.parquet'").to_arrow_table(),
    "polars": lambda table: polars.scan_parquet(f"{table}/*.parquet").collect().to_arrow(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("store", "table"), TABLES)
def test_a_committed_store_reads_the_same_in_every_tool(store: str, table: str, reader: str) -> None:
    expected = load(RESULTS / store, table)
    found = READERS[reader](f"{RESULTS / store}/{table}")
    assert len(found) == len(expected) > 0
    assert found.column_names == [name for name in expected.column_names if name in found.column_names]
    same_but_for_newer_columns(found, expected)


def same_but_for_newer_columns(found: pa.Table, expected: pa.Table) -> None:
    """Columns that were added since the files were written are null in ``expected``."""
    since = [name for name in expected.column_names if name not in found.column_names]
    assert all(expected[name].null_count == len(expected) for name in since)
    old = expected.drop_columns(since)
    same(found.select(old.column_names), old)


def same(found: pa.Table, expected: pa.Table) -> None:
    """The same rows in any order."""
    keys = [(name, "ascending") for name in expected.column_names if not pa.types.is_list(expected[name].type)]
    assert found.cast(expected.schema).sort_by(keys).to_pylist() == expected.sort_by(keys).to_pylist()


def test_files_of_several_versions_read_together(tmp_path: Path) -> None:
    """As docs/results.md says: by name in DuckDB, through ``load`` in the others."""
    (tmp_path / "trials").mkdir()
    shutil.copy(RESULTS / "quick" / "trials" / "packed.parquet", tmp_path / "trials")
    old = load(RESULTS / "table1_quickdraw_search", "trials").slice(0, 1).drop_columns(["price", "data_shards"])
    pq.write_table(old, tmp_path / "trials" / f"{old['cell_id'][0]}.parquet")
    expected = load(tmp_path, "trials")
    files = f"'{tmp_path}/trials/*.parquet'"
    found = duckdb.sql(f"SELECT * FROM read_parquet({files}, union_by_name = true)").to_arrow_table()
    same_but_for_newer_columns(found, expected)
    same(polars.from_arrow(expected).to_arrow(), expected)


WRITER = """
import itertools, json, sys
import pyarrow as pa
from zeroflow.results import Store, load
from zeroflow.trial.config import cell_id_of
source, target = sys.argv[1:]
names = ("accuracy", "stages", "steps", "trials")
cell = load(source, "steps")["cell_id"][0].as_py()
tables = {name: Store(source).load(name) for name in names}
tables = {name: table.filter(pa.compute.equal(table["cell_id"], cell)) for name, table in tables.items()}
store = Store(target)
config = json.loads(tables["trials"]["config"][0].as_py())
for number in itertools.count():
    own = {**config, "seed": number}
    changes = {"cell_id": cell_id_of(own), "config": json.dumps(own), "seed": number}
    made = {}
    for name, table in tables.items():
        for column, value in changes.items():
            if column in table.column_names and (name == "trials" or column == "cell_id"):
                place = table.column_names.index(column)
                field = table.schema.field(place)
                table = table.set_column(place, field, pa.array([value] * len(table), field.type))
        made[name] = table
    store.write(made)
    print(number, flush=True)
"""


@contextmanager
def cells_being_written(target: Path) -> Iterator[dict[str, int]]:
    """A process that writes one cell after the other, and how many rows each of them has in each table."""
    first = load(RESULTS / "quick", "steps")["cell_id"][0]
    rows = {
        name: pc.sum(pc.equal(load(RESULTS / "quick", name)["cell_id"], first)).as_py()
        for name in ("trials", "stages", "accuracy", "steps")
    }
    with subprocess.Popen(
        [sys.executable, "-c", "import pyarrow.compute\n" + WRITER, str(RESULTS / "quick"), str(target)],
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == b"0\n"
            yield rows
            assert writer.poll() is None, "it stopped writing"
        finally:
            writer.kill()


@pytest.mark.slow
def test_nothing_half_written_is_ever_seen(tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {name: [] for name in (*READERS, "zeroflow")}
    with cells_being_written(tmp_path) as rows:
        readers = {**READERS, "zeroflow": lambda table: load(tmp_path, Path(table).name)}
        while min(map(len, seen.values())) < 4 or max(seen["zeroflow"]) < 20:
            for reader, read in readers.items():
                trials = read(f"{tmp_path}/trials")
                done = set(trials["cell_id"].to_pylist())
                seen[reader].append(len(done))
                assert len(trials) == len(done) and trials["avg"].null_count == 0
                for table in ("stages", "accuracy", "steps"):
                    counts = read(f"{tmp_path}/{table}").group_by("cell_id").aggregate([("cell_id", "count")])
                    per_cell = dict(
                        zip(*(counts[name].to_pylist() for name in ("cell_id", "cell_id_count")), strict=True)
                    )
                    assert {per_cell.get(cell) for cell in done} == {rows[table]}, (reader, table)
    for reader, counts in seen.items():
        assert counts == sorted(counts) and counts[-1] > counts[0], (reader, counts)


@pytest.mark.slow
def test_a_join_leaves_out_the_cell_that_is_being_written(tmp_path: Path) -> None:
    """As in docs/results.md: a cell's row in trials is written last, and trials is the first that a join lists."""
    with cells_being_written(tmp_path) as rows:
        for _ in range(10):
            found = duckdb.sql(f"""
                SELECT count(step) FROM '{tmp_path}/trials/*.parquet' LEFT JOIN '{tmp_path}/steps/*.parquet' USING (cell_id)
                GROUP BY cell_id
            """).fetchall()
            assert set(found) == {(rows["steps"],)}


def test_the_examples_in_the_document_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "results.md").read_text(), re.DOTALL)
    for name, source in (("quick", "quick"), ("other", "estimators")):
        shutil.copytree(RESULTS / source, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    written = {}
    for block in blocks:
        what = next(word for word in ("merge", "duckdb", "polars", "pandas", "load") if f"import {word}" in block)
        exec(compile(block, what, "exec"), {})
        written[what] = capsys.readouterr().out
    trials = load(RESULTS / "quick", "trials")
    assert written.keys() == {"load", "pandas", "duckdb", "polars", "merge"}
    methods = set(trials["method"].to_pylist())
    for what in ("load", "pandas", "polars"):
        assert all(method in written[what] for method in methods), what
    lines = {(row["method"], row["optimizer"]) for row in trials.to_pylist()}
    stages = int(trials["stop_after"][0].as_py() or 10)
    assert f"{stages * len(lines)} rows" in written["duckdb"]  # a line per stage
    added = len(load(RESULTS / "estimators", "trials")) - len(
        {*trials["cell_id"].to_pylist()} & {*load(RESULTS / "estimators", "trials")["cell_id"].to_pylist()}
    )
    assert f"{added} cells added" in written["merge"]


def test_several_stores_load_as_one_with_every_cell_once(tmp_path: Path) -> None:
    quick, other = RESULTS / "quick", RESULTS / "estimators"
    merge(tmp_path, other, quick)
    for table in ("trials", "accuracy"):
        together = load([quick, Store(other), quick], table)
        cells = set(load(quick, table)["cell_id"].to_pylist()) | set(load(other, table)["cell_id"].to_pylist())
        assert set(together["cell_id"].to_pylist()) == cells and len(together) == len(load(tmp_path, table))
    assert load([quick], "stages").equals(load(quick, "stages"))
    with pytest.raises(ConfigError, match="did you mean 'trials'"):
        load([quick, other], "trails")
