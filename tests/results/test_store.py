"""What a store holds: what is written is read, by others too, and rows that somebody has changed are left out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from everything import FINISHED, fill
from places import ROOT
from small_results import cell, odd, path, simplecil

import zeroflow.results.store as store_module
from zeroflow.errors import ConfigError
from zeroflow.results import SCHEMA_VERSION, SCHEMAS, Store, load, pack, parquet
from zeroflow.results.rows import failure, tables
from zeroflow.results.schema import markdown
from zeroflow.results.summary import render_text, summary
from zeroflow.trial.config import NESTED, TrialConfig
from zeroflow.trial.metrics import DEFINITIONS

# Round trip


def test_what_is_written_is_read(store: Store) -> None:
    result = cell(method_options={"b": 1, "a": [2]}, seed=2**62)
    store.write(tables(result, workers=4, ray_version="2.60.0"))

    (trial,) = load(store.root, "trials").to_pylist()
    assert trial["cell_id"] == result.cell_id and trial["status"] == "done"
    assert trial["schema_version"] == SCHEMA_VERSION
    for field in dataclasses.fields(TrialConfig):
        if field.name not in NESTED:
            assert trial[field.name] == getattr(result.config, field.name), field.name
    assert trial["method_options"] == '{"a":[2],"b":1}' and trial["optimizer_options"] == "{}"
    assert trial["classifier_options"] is None and trial["preprocessing"] is None
    assert TrialConfig(**json.loads(trial["config"])) == result.config
    for name, value in (result.summary | result.provenance).items():
        assert trial[name] == value, name
    assert (trial["avg"], trial["last"], trial["fgt"]) == (75.0, 70.0, 20.0)
    assert (trial["avg_task_incremental"], trial["last_task_incremental"]) == (78.0, 76.0)
    assert (trial["avg_domain_incremental"], trial["last_domain_incremental"]) == (77.0, 74.0)
    assert trial["class_order"] == [3, 1, 0, 2] and trial["class_names"] == ["cat", "dog", "eel", "fox"]
    assert json.loads(trial["metric_definitions"]) == DEFINITIONS
    assert (trial["workers"], trial["ray_version"]) == (4, "2.60.0")

    assert [tuple(row.values())[1:] for row in load(store.root, "stages").to_pylist()] == [
        (0, 80.0, 80.0, 80.0, 2, 30),
        (1, 70.0, 76.0, 74.0, 4, 60),
    ]
    assert [tuple(row.values())[1:] for row in load(store.root, "accuracy").to_pylist()] == [
        (0, 0, 80.0, 80.0, 80.0, 30),
        (1, 0, 60.0, 70.0, 68.0, 30),
        (1, 1, 80.0, 82.0, 80.0, 30),
    ]
    assert [tuple(row.values())[1:] for row in load(store.root, "steps").to_pylist()] == [
        (0, 0, 0, 1.25, 0.01, 0.5, 1),
        (1, 0, 1, 0.5, 0.005, None, 1),
    ]


def test_unequal_tasks_have_no_domain_incremental_accuracy(store: Store) -> None:
    fill(store, cell(base_classes=3))
    (trial,) = store.load("trials").to_pylist()
    assert trial["avg_domain_incremental"] is None and trial["last_domain_incremental"] is None
    assert (trial["avg_task_incremental"], trial["base_classes"]) == (78.0, 3)
    for name in ("stages", "accuracy"):
        assert set(store.load(name)["domain_incremental"].to_pylist()) == {None}
    assert store.load("stages")["classes_seen"].to_pylist() == [3, 4]


def test_keys_that_hold_lists_can_be_grouped_by_in_every_tool(store: Store) -> None:
    import duckdb
    import polars

    streams: list[dict[str, Any]] = [
        {},
        {"increments": [2, 1, 1]},
        {"increments": [1, 2, 1]},
        {"fixed_class_order": [3, 1, 0, 2]},
        {"fixed_class_order": "sorted"},
    ]
    fill(store, *(cell(seed=seed, **stream) for stream in streams for seed in (0, 1)))
    keys = ["increments", "fixed_class_order"]
    expected = {
        (None, None),
        ("[2,1,1]", None),
        ("[1,2,1]", None),
        (None, "[3,1,0,2]"),
        (None, "sorted"),
    }
    files = f"{store.root}/trials/*.parquet"
    frame = pd.read_parquet(Path(store.root, "trials"))
    found = [
        [tuple(None if pd.isna(v) else v for v in key) for key in frame.groupby(keys, dropna=False).groups],
        duckdb.sql(f"SELECT increments, fixed_class_order FROM '{files}' GROUP BY ALL").fetchall(),
        polars.read_parquet(files).group_by(keys).len().select(keys).rows(),
    ]
    for groups in found:
        assert len(groups) == 5 and set(groups) == expected
    rows = summary(store.load("trials"))
    assert [row.seeds for row in rows] == [2] * 5
    assert {(row.shown["increments"], row.shown["fixed_class_order"]) for row in rows} == {
        tuple(value or "-" for value in key) for key in expected
    }
    for row in store.load("trials").to_pylist():
        assert TrialConfig(**json.loads(row["config"])).cell_id == row["cell_id"]


def test_only_the_same_stream_is_compared_with_simplecil(store: Store) -> None:
    other: dict[str, Any] = {"fixed_class_order": "sorted", "base_classes": 3}
    fill(store, simplecil(60.0), simplecil(50.0, **other), cell(), cell(**other), cell(fixed_class_order="sorted"))
    rows = {(row.config["fixed_class_order"], row.config["base_classes"]): row for row in summary(store.load("trials"))}
    trained = [row for row in summary(store.load("trials")) if not row.is_baseline]
    assert {(row.config["base_classes"], row.vs_simplecil) for row in trained} == {
        (None, 20.0),
        (3, 30.0),
        (None, None),
    }
    assert len(rows) == 3


def test_a_rerun_replaces_its_own_rows(store: Store) -> None:
    fill(store, cell(80.0), cell(60.0, seed=1), cell(90.0))
    assert sorted(store.load("trials")["avg"].to_pylist()) == [55.0, 85.0]
    assert len(store.load("accuracy")) == 6


def test_cells_come_in_the_order_of_their_ids(store: Store) -> None:
    fill(store, *(cell(seed=seed) for seed in range(20)))
    ids = store.load("trials")["cell_id"].to_pylist()
    assert ids == sorted(ids) and len(ids) == 20


def test_not_measured_is_null_and_never_nan(store: Store) -> None:
    fill(store, cell(loss=math.nan), simplecil())
    for name in ("trials", "stages", "accuracy", "steps"):
        table = store.load(name)
        for column in table.column_names:
            assert not any(isinstance(v, float) and math.isnan(v) for v in table[column].to_pylist()), (name, column)
    trained, untrained = sorted(store.load("trials").to_pylist(), key=lambda row: row["method"])
    assert trained["final_loss"] is None and trained["seconds_per_epoch"] == 0.35
    assert untrained["optimizer"] is None and untrained["seconds_per_epoch"] is None
    assert store.load("steps")["loss"].to_pylist() == [1.25, None]


@pytest.mark.parametrize("name", ["trials", "stages", "accuracy", "steps"])
def test_every_file_has_the_declared_columns(store: Store, name: str) -> None:
    fill(store, cell(), simplecil())
    files = sorted(Path(store.root, name).iterdir())
    assert len(files) == 2
    for file in files:
        assert pq.read_schema(file).equals(SCHEMAS[name])
    assert store.load(name).schema.equals(SCHEMAS[name], check_metadata=True)
    assert all(field.metadata[b"description"] for field in SCHEMAS[name])


def test_pandas_reads_a_file_and_a_folder(store: Store) -> None:
    fill(store, cell(), simplecil())
    one = pd.read_parquet(path(store, "trials", cell()))
    assert one.loc[0, "avg"] == 75.0 and one.loc[0, "finished_at"] == pd.Timestamp(FINISHED)
    assert len(pd.read_parquet(Path(store.root, "accuracy"))) == 6


def test_duckdb_and_polars_read_the_files_as_they_are(store: Store) -> None:
    import duckdb
    import polars

    fill(store, cell(), simplecil())
    trials, accuracy = (f"{store.root}/{name}/*.parquet" for name in ("trials", "accuracy"))
    for frame in (duckdb.sql(f"SELECT * FROM '{trials}'").to_arrow_table(), polars.read_parquet(trials).to_arrow()):
        assert frame.column_names == SCHEMAS["trials"].names
        assert frame.cast(SCHEMAS["trials"]).sort_by("cell_id").to_pylist() == store.load("trials").to_pylist()
    assert duckdb.sql(f"SELECT count(*) FROM '{accuracy}'").fetchall() == [(6,)]
    assert len(polars.read_parquet(accuracy)) == 6


def test_a_table_with_other_columns_is_refused_and_nothing_is_written(store: Store) -> None:
    written = tables(cell())
    written["steps"] = written["steps"].drop_columns(["loss"])
    with pytest.raises(ValueError, match="loss"):
        store.write(written)
    assert not Path(store.root).exists()


def test_tables_of_two_cells_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="one cell"):
        store.write(tables(cell()) | {"steps": tables(cell(seed=1))["steps"]})


def test_an_object_store_is_read_like_a_folder() -> None:
    store = Store("mock://bucket/results")
    for name in SCHEMAS:
        store.storage.filesystem.create_dir(f"{store.storage.base}/{name}")
    store.write_failure(failure(cell().config, "RuntimeError", "boom", "", 1))
    assert set(store.failed()) == {cell().cell_id} and store.done() == set()
    fill(store, cell(), simplecil())
    assert store.done() == {cell().cell_id, simplecil().cell_id}
    assert store.failed() == {} and len(store.load("accuracy")) == 6


# The row in front of the columns


def test_the_row_in_front_is_the_row_in_the_columns(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [cell(), odd(), simplecil(), cell(loss=math.nan, seed=3)]
    fill(store, *results)
    store.write_failure(failure(cell(seed=9).config, "RuntimeError", 'line\n"two"', "Traceback\n ...", 2))
    for name in ("trials", "failures"):
        files = sorted(Path(store.root, name).iterdir())
        columns = pa.concat_tables([pq.ParquetFile(file).read() for file in files]).cast(SCHEMAS[name])
        with monkeypatch.context() as patched:
            patched.setattr(parquet, "decode", None)
            assert store.load(name).equals(columns, check_metadata=True), "not read from the rows in front"
    assert len(columns) == 1 and len(store.load("trials")) == len(results)


def test_what_json_cannot_say_is_read_from_the_columns(store: Store) -> None:
    fill(store, cell(loss=math.inf), cell(seed=1))
    assert sorted(store.load("trials")["final_loss"].to_pylist()) == [0.5, math.inf]


def test_files_rewritten_by_others_are_read_too(store: Store) -> None:
    fill(store, *(cell(seed=seed) for seed in range(4)))
    before = store.load("trials")
    first, second, third, _ = sorted(Path(store.root, "trials").iterdir())
    pd.read_parquet(first).to_parquet(first)
    pq.write_table(pq.read_table(second).drop_columns(["ray_version", "bwt"]), second)
    extra = pq.read_table(third)
    pq.write_table(extra.append_column("from_the_future", pa.array(["x"])), third)
    after = store.load("trials")
    assert after.drop_columns(["bwt"]).equals(before.drop_columns(["bwt"]), check_metadata=True)
    assert [value is None for value in after["bwt"].to_pylist()] == [False, True, False, False]


def test_a_classifier_that_all_rows_have_is_still_named(store: Store) -> None:
    """Otherwise the row would read as SimpleCIL's own."""
    fill(store, simplecil(70.0, classifier="lda"), simplecil(71.0, classifier="lda", class_order_seed=1))
    rows = summary(store.load("trials"))
    assert [row.label for row in rows] == ["simplecil class_order_seed=1 lda", "simplecil class_order_seed=1993 lda"]
    assert render_text(rows).count("lda") == 2


def test_a_file_whose_name_is_no_text_is_none_of_the_stores(store: Store) -> None:
    fill(store, cell(80.0))
    (Path(store.root) / "trials" / os.fsdecode(b"caf\xe9.parquet")).touch()
    assert store.load("trials")["seed"].to_pylist() == [0] and store.done() == {cell().cell_id}


def test_a_row_that_others_have_written_twice_is_no_second_seed(store: Store) -> None:
    fill(store, cell(80.0), cell(90.0, seed=1))
    file = Path(store.root, "trials", f"{cell().cell_id}.parquet")
    once = pq.read_table(file)
    pq.write_table(pa.concat_tables([once, once]), file)
    with pytest.warns(UserWarning, match=f"skipped files .*{file.name}"):
        assert store.load("trials")["seed"].to_pylist() == [1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("column", "value", "wrong"),
    [
        ("method", None, "method is None, and 'ease' in config"),
        ("lr", 0.5, "lr is 0.5, and 0.01 in config"),
        ("seed", 7, "seed is 7, and 1 in config"),
        ("method_options", '{"a":2}', """method_options is '{"a":2}', and '{}' in config"""),
        ("config", "{}", "config is that of cell "),
        ("config", "[", "config is no configuration"),
        ("config", None, "config is no configuration"),
        ("avg", 750.0, "avg is 750.0"),
        ("fgt", -101.0, "fgt is -101.0"),
    ],
)
def test_a_row_that_was_changed_by_hand_is_left_out(store: Store, column: str, value, wrong: str, packed: bool) -> None:
    """A wrong number that looks right, or a report that ends in a traceback, is what it would be otherwise."""
    fill(store, cell(80.0), cell(90.0, seed=1))
    if packed:
        pack(store)
        file = Path(store.root, "trials", "packed.parquet")
    else:
        file = path(store, "trials", cell(seed=1))
    rows = pq.read_table(file)
    changed = [
        value if seed == 1 else old
        for seed, old in zip(rows["seed"].to_pylist(), rows[column].to_pylist(), strict=True)
    ]
    field = rows.schema.get_field_index(column)
    edited = rows.set_column(field, rows.schema.field(column), pa.array(changed, rows.schema.field(column).type))
    pq.write_table(edited, file, row_group_size=1)
    with pytest.warns(
        UserWarning, match=f"changed after they were written: {cell(seed=1).cell_id}: {re.escape(wrong)}"
    ):
        assert store.load("trials")["cell_id"].to_pylist() == [cell().cell_id]
    with pytest.warns(UserWarning, match="changed after they were written"):
        assert store.load("trials", ["avg"])["avg"].to_pylist() == [75.0], "whichever columns are asked for"
    if not packed:  # computed again, as what is damaged is
        assert store.done() == Store(store.root).done() == {cell().cell_id}


def test_a_newer_row_is_refused_wherever_it_stands(store: Store) -> None:
    """Also where another file was written later."""
    fill(store, cell(), cell(seed=1))
    file = path(store, "trials", cell())
    rows = pq.read_table(file)
    where = rows.schema.get_field_index("schema_version")
    pq.write_table(
        rows.set_column(where, rows.schema.field(where), pa.array([99], rows.schema.field(where).type)), file
    )
    os.utime(file, (1, 1))
    for ask in (lambda: store.done(), lambda: store.load("stages"), lambda: store.load("trials", ["avg"])):
        with pytest.raises(ConfigError, match="schema version 99 by a newer zeroflow"):
            ask()


def test_what_others_write_as_nan_is_not_measured(store: Store) -> None:
    fill(store, cell())
    for table, column in (("trials", "avg"), ("steps", "loss")):
        file = Path(store.root, table, f"{cell().cell_id}.parquet")
        found = pq.read_table(file)
        nan = pa.array([float("nan")] * len(found))
        pq.write_table(found.set_column(found.column_names.index(column), column, nan), file)
        assert store.load(table)[column].null_count == len(found)


@pytest.mark.slow
def test_no_changed_byte_changes_a_row_unnoticed(store: Store) -> None:
    fill(store, odd())
    file, expected, skipped = path(store, "trials", odd()), store.load("trials"), 0
    data = file.read_bytes()
    for position in range(0, len(data), 61):
        file.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = store.load("trials")
        assert len(found) == 0 or found.equals(expected), f"byte {position}"
        skipped += len(found) == 0
    assert skipped > 50


@pytest.mark.slow
def test_a_folder_larger_than_a_batch_comes_whole_and_in_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, *(cell(seed=seed) for seed in range(23)))
    whole = {name: store.load(name) for name in SCHEMAS}
    monkeypatch.setattr(store_module, "_AT_ONCE", 4)
    for name, table in whole.items():
        assert store.load(name).equals(table)
    assert whole["trials"]["cell_id"].to_pylist() == sorted(cell(seed=seed).cell_id for seed in range(23))


# The page about it


def test_the_page_holds_every_column() -> None:
    assert markdown() in (ROOT / "docs" / "columns.md").read_text(), "write out zeroflow.results.schema.markdown() anew"


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Store("runs/quick"), cell(seed=0), cell(seed=1), simplecil())
    fill(Store("runs/other"), cell(seed=1), cell(seed=2))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "results.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True, timeout=120)
    assert len(Store("runs/quick").done()) == 4, "the page shows how to merge"


@pytest.mark.slow
def test_the_benchmark_of_the_store_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "store.py"), "--cells", "30", "--rounds", "1"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    found = json.loads(run.stdout)
    assert found["cells"] == 30 and {"load trials", "done", "plan", "one file"} <= found["seconds"].keys()


# What reading imports


@pytest.mark.slow
def test_results_are_read_without_torch() -> None:
    program = (
        "import sys, zeroflow.results.report; assert not {'torch', 'timm', 'ray', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
