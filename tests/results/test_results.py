"""The store and its tables, as a user meets them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from everything import FINISHED, fill
from places import ROOT, TESTS
from pyarrow import fs
from small_results import cell, path, simplecil

import zeroflow.results.store as store_module
from zeroflow.errors import ConfigError
from zeroflow.results import SCHEMA_VERSION, SCHEMAS, Store, load, merge, pack, parquet
from zeroflow.results.estimates import estimate
from zeroflow.results.rows import failure, tables
from zeroflow.results.schema import markdown
from zeroflow.results.summary import render_markdown, render_text, summary
from zeroflow.trial.config import NESTED, TrialConfig
from zeroflow.trial.metrics import DEFINITIONS
from zeroflow.trial.result import TrialResult


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


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


def odd() -> TrialResult:
    """A result with the values that text formats get wrong."""
    names = ['say "é\n\u2028"', "back\\slash\ttab", "", "nul\0", "\U0001f600"]
    result = cell(100 / 3, seed=2**63 - 1, class_order_seed=0, dataset="null", lr=5e-324, eps=1.7976931348623157e308)
    return dataclasses.replace(result, class_names=names, class_order=np.arange(5))


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


# Readers and writers at once


WRITER = """
import itertools, random, sys
import pyarrow.compute as pc
from zeroflow.results import Store

source, store = Store(sys.argv[1]), Store(sys.argv[2])
tables = {name: source.load(name) for name in ("trials", "stages", "accuracy", "steps")}
cells = sorted(source.done())
random.shuffle(cells)
for cell in itertools.chain(set(cells) - store.done(), itertools.cycle(cells)):
    store.write({name: table.filter(pc.field("cell_id") == cell) for name, table in tables.items()})
    print(cell, flush=True)
"""


@contextmanager
def writing(source: Store, root: str, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes the cells of ``source`` into a store, over and over; killed after ``seconds``."""
    command = [sys.executable, "-c", WRITER, source.root, root]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer, ThreadPoolExecutor() as pool:
        try:
            assert writer.stdout and writer.stdout.readline()
            pool.submit(lambda: writer.stdout and writer.stdout.read())  # else it stops when the pipe is full
            timer = threading.Timer(seconds, writer.kill)
            timer.start()
            yield writer
            timer.join()
        finally:
            writer.kill()


def check_whole(store: Store, expected: dict[str, float], before: set[str]) -> set[str]:
    """What a reader finds at any moment: what was there before and more, each cell once and whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trials, stages, external = store.load("trials"), store.load("stages"), {}
        for file in Path(store.root, "trials").glob("*.parquet"):
            external[file.stem] = pq.ParquetFile(file).read(["cell_id", "avg"]).to_pylist()
    found = dict(zip(trials["cell_id"].to_pylist(), trials["avg"].to_pylist(), strict=True))
    assert len(found) == len(trials), "a cell twice"
    assert found == {cell_id: expected[cell_id] for cell_id in found}
    assert before <= found.keys(), "a cell lost"
    counts = pc.value_counts(stages["cell_id"]).to_pylist()
    assert found.keys() <= {count["values"] for count in counts} and {count["counts"] for count in counts} <= {2}
    assert found.keys() <= external.keys()
    assert external == {cell_id: [{"cell_id": cell_id, "avg": expected[cell_id]}] for cell_id in external}
    return set(found)


@pytest.mark.slow
def test_readers_see_whole_cells_while_writers_work_and_are_killed(store: Store, tmp_path: Path) -> None:
    moments, source, found = random.Random(0), Store(tmp_path / "source"), set[str]()
    results = [cell(20.0 + seed % 50, seed=seed) for seed in range(60)]
    fill(source, *results)
    expected = {result.cell_id: result.summary["avg"] for result in results}
    for _ in range(4):
        first, second = (writing(source, store.root, moments.uniform(0.0, 0.3)) for _ in range(2))
        with first as one, second as two:
            while one.poll() is None or two.poll() is None:
                found = check_whole(store, expected, found)
        assert (one.returncode, two.returncode) == (-signal.SIGKILL, -signal.SIGKILL)
        found = check_whole(store, expected, found)
    assert len(found) >= 4
    fill(store, *results)
    assert check_whole(store, expected, found) == expected.keys() == store.done()


# Merging


@pytest.mark.slow
def test_merging_adds_what_is_missing_and_nothing_else(store: Store, tmp_path: Path) -> None:
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    fill(store, cell(seed=0))
    fill(first, cell(seed=0), cell(seed=1), odd())
    fill(second, cell(seed=1), simplecil())
    for where, seed in ((store, 1), (first, 7), (second, 7), (second, 0)):
        where.write_failure(failure(cell(seed=seed).config, "RuntimeError", where.root, "", 1))
    kept = path(store, "trials", cell(seed=0)).stat()
    sources = {file: file.read_bytes() for root in (first, second) for file in Path(root.root).rglob("*.parquet")}

    assert merge(store.root, first.root, second.root) == 3
    assert store.done() == {result.cell_id for result in (cell(seed=0), cell(seed=1), odd(), simplecil())}
    after = path(store, "trials", cell(seed=0)).stat()
    assert (after.st_ino, after.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert {key: row["message"] for key, row in store.failed().items()} == {cell(seed=7).cell_id: first.root}
    for name in ("trials", "stages", "accuracy", "steps"):
        own = store.load(name).filter(pc.field("cell_id") == odd().cell_id)
        assert len(own) and own.equals(first.load(name).filter(pc.field("cell_id") == odd().cell_id))
    assert all(file.read_bytes() == data for file, data in sources.items()), "a source was changed"
    assert merge(store, first, second) == 0 and merge(store, store) == 0 and merge(store) == 0
    assert merge(tmp_path / "new", store) == 4


def test_results_that_differ_are_not_merged(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    fill(store, cell(80.0))
    fill(other, cell(60.0), cell(seed=1))
    with pytest.raises(ConfigError, match=rf"cell {cell().cell_id}: avg is 75.0 in .*results' and 55.0 in .*other'"):
        merge(store, other)
    assert store.done() == {cell().cell_id} and store.load("trials")["avg"].to_pylist() == [75.0]
    with pytest.raises(ConfigError, match=r"avg is 55.0 .* and 75.0"):
        merge(tmp_path / "new", other, store)
    assert not (tmp_path / "new").exists()


def test_what_differs_between_machines_does_not_hinder_merging(store: Store, tmp_path: Path) -> None:
    other, slow = Store(tmp_path / "other"), cell()
    slow.costs["seconds"] *= 3
    slow.provenance["device"] = "cuda"
    fill(store, cell())
    fill(other, slow, cell(seed=1))
    assert merge(store, other) == 1
    assert store.load("trials")["device"].to_pylist() == ["cpu (x86_64)"] * 2


def test_a_source_that_is_no_store_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*found nothing"):
        merge(store, tmp_path / "nowhere")
    assert not Path(store.root).exists()


def test_an_unfinished_cell_is_replaced_and_not_taken(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    fill(store, cell(10.0))
    path(store, "trials", cell(10.0)).unlink()  # as a writer leaves it that was killed before the last file
    fill(other, cell(80.0), cell(seed=1))
    path(other, "trials", cell(seed=1)).unlink()
    assert merge(store, other) == 1
    assert store.load("stages")["accuracy"].to_pylist() == [80.0, 70.0] and store.done() == {cell().cell_id}


def test_a_cell_that_was_finished_in_the_meantime_is_not_overwritten(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    fill(store, cell(80.0))
    fill(other, cell(60.0))
    assert not store.copy(cell().cell_id, other) and not store.copy(cell(seed=1).cell_id, other)
    assert store.load("trials")["avg"].to_pylist() == [75.0] and len(store.done()) == 1


# Object stores


@pytest.mark.slow
def test_s3_holds_what_a_folder_holds(s3: str, store: Store) -> None:
    remote = Store("s3://bucket/some/results")
    assert remote.done() == set() and remote.failed() == {} and len(remote.load("trials")) == 0
    assert not remote.exists()
    remote.check_writable()
    remote.write_failure(failure(cell().config, "RuntimeError", "boom", "", 1))
    assert set(remote.failed()) == {cell().cell_id} and remote.done() == set()
    for where in (remote, store):
        fill(where, cell(10.0), cell(), odd(), simplecil())
    assert remote.done() == store.done() and remote.failed() == {}
    for name in SCHEMAS:
        assert load(remote.root, name).equals(store.load(name), check_metadata=True), name
    found = remote.storage.filesystem.get_file_info(fs.FileSelector("bucket/some/results", recursive=True))
    names = {info.base_name.removesuffix(".parquet") for info in found if info.is_file}
    assert names == store.done(), "something else was left there"


def test_the_endpoint_may_stand_in_the_uri(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    fill(Store(f"s3://bucket/uri?endpoint_override={s3}&scheme=http&region=us-east-1"), cell())
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3}")
    assert Store("s3://bucket/uri").done() == {cell().cell_id}


@pytest.mark.slow
def test_stores_merge_across_s3_and_folders(s3: str, store: Store, tmp_path: Path) -> None:
    fill(store, cell(), odd())
    assert merge("s3://bucket/merged", store) == 2
    fill(Store("s3://bucket/merged"), simplecil())
    assert merge(store, "s3://bucket/merged") == 1 == len(store.done()) - 2
    assert store.load("trials").equals(load("s3://bucket/merged", "trials"))


@pytest.mark.parametrize("what", ["bucket", "credentials"])
def test_an_s3_that_cannot_be_used_is_one_clear_error(s3: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, reason = "s3://nobucket/results", "NO_SUCH_BUCKET|no such bucket"
    if what == "credentials":
        root, reason = "s3://bucket/results", "ACCESS_DENIED"
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    remote = Store(root)
    for use in (remote.check_writable, remote.done, remote.failed, lambda: remote.load("steps")):
        with pytest.raises(ConfigError, match=rf"results '{root}': .*({reason})"):
            use()


def test_an_object_appears_whole_or_not_at_all(s3: str) -> None:
    remote = Store("s3://bucket/whole")
    fill(remote, cell(80.0))
    stream = remote.storage.filesystem.open_output_stream(f"{remote.storage.base}/trials/{cell().cell_id}.parquet")
    stream.write(b"PAR1" * 50)
    assert remote.load("trials")["avg"].to_pylist() == [75.0]
    another = remote.storage.filesystem.open_output_stream(
        f"{remote.storage.base}/trials/{cell(seed=1).cell_id}.parquet"
    )
    another.write(b"PAR1" * 50)
    assert remote.done() == {cell().cell_id}
    for unfinished in (stream, another):
        unfinished.close()
    assert remote.done() == {cell().cell_id, cell(seed=1).cell_id}, "they were on their way"


@pytest.mark.slow
def test_s3_writers_are_killed_and_readers_see_whole_cells(s3: str, tmp_path: Path) -> None:
    remote, source, found = Store("s3://bucket/killed"), Store(tmp_path / "source"), set[str]()
    fill(source, *(cell(seed=seed) for seed in range(40)))
    for moment in (0.05, 0.2):
        with warnings.catch_warnings(), writing(source, remote.root, moment) as writer:
            warnings.simplefilter("error")
            while writer.poll() is None:
                trials, stages = remote.load("trials"), remote.load("stages")
                assert found <= set(trials["cell_id"].to_pylist())
                found = set(trials["cell_id"].to_pylist())
                assert len(trials) == len(found) and len(stages) % 2 == 0
        assert writer.returncode == -signal.SIGKILL
        assert found <= set(remote.load("trials")["cell_id"].to_pylist()) == remote.done()


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


# Done, broken, absent


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_a_truncated_file_is_not_done_and_is_skipped_with_a_warning(store: Store, keep: int) -> None:
    whole, cut = cell(), cell(seed=1)
    fill(store, whole, cut)
    file = path(store, "trials", cut)
    file.write_bytes(file.read_bytes()[:keep])
    assert store.done() == {whole.cell_id}
    with pytest.warns(UserWarning, match=cut.cell_id):
        assert store.load("trials")["cell_id"].to_pylist() == [whole.cell_id]
    assert set(store.load("steps")["cell_id"].to_pylist()) == {whole.cell_id}


def test_a_file_broken_inside_is_skipped_with_a_warning(store: Store) -> None:
    whole, broken = cell(), cell(seed=1)
    fill(store, whole, broken)
    file = path(store, "trials", broken)
    data = file.read_bytes()
    file.write_bytes(data[:-200] + b"\xff" * 192 + data[-8:])
    with pytest.warns(UserWarning, match=broken.cell_id):
        assert store.load("trials")["cell_id"].to_pylist() == [whole.cell_id]


def test_a_crash_between_two_files_leaves_the_cell_not_done(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if target.parent.name == "trials":
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="disk gone"):
        store.write(tables(cell()))
    assert path(store, "stages", cell()).exists()
    assert store.done() == set()
    assert len(store.load("stages")) == 0, "rows of a cell that is not done are not results"
    assert [p for p in Path(store.root).rglob("*") if p.name.startswith(".")] == []

    monkeypatch.undo()
    fill(store, cell())
    assert store.done() == {cell().cell_id} and len(store.load("stages")) == 2


def test_files_of_writers_at_work_are_ignored(store: Store) -> None:
    fill(store, cell())
    Path(store.root, "trials", f".{'0' * 16}.parquet.abc.tmp").write_bytes(b"half")
    Path(store.root, "trials", ".hidden.parquet").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(store.load("trials")) == 1
    assert store.done() == {cell().cell_id}


def test_what_a_killed_writer_left_goes_when_the_next_one_starts(store: Store) -> None:
    fill(store, cell())
    old, fresh = (path(store, "trials", cell()).with_name(f".{cell().cell_id}.parquet.{n}.tmp") for n in "ab")
    for file in (old, fresh):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    fill(Store(store.root), cell(seed=1))
    assert not old.exists() and fresh.exists()


def test_nothing_is_there_and_nothing_is_made_by_reading(tmp_path: Path) -> None:
    store = Store(tmp_path / "nowhere")
    assert store.done() == set() and store.failed() == {}
    for name, schema in SCHEMAS.items():
        table = store.load(name)
        assert len(table) == 0 and table.schema.equals(schema, check_metadata=True)
    assert summary(store.load("trials")) == []
    assert not (tmp_path / "nowhere").exists()


def test_a_relative_folder_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("results")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fill(store, cell())
    assert (tmp_path / "results" / "trials").is_dir()


OLDER = """
import json, sys
from pathlib import Path
import pyarrow as pa
from zeroflow.results import schema

trials = schema.SCHEMAS["trials"]
for column in ("imports", "price", "access"):
    trials = trials.remove(trials.get_field_index(column))
schema.SCHEMAS["trials"] = trials
schema.SCHEMAS.pop("confusion", None)
from zeroflow.results import Store, load, pack

store, command = Store(sys.argv[1]), sys.argv[2]
if command == "write":
    from small_results import cell
    from zeroflow.results.rows import tables

    tables = {name: table.select(schema.SCHEMAS[name].names) for name, table in tables(cell(seed=0)).items()
              if name in schema.SCHEMAS}
    for seed in range(100, 120):
        config = cell(seed=seed).config
        own = {name: table.set_column(0, "cell_id", pa.array([config.cell_id] * len(table))) for name, table in tables.items()}
        trials = own["trials"]
        trials = trials.set_column(trials.column_names.index("seed"), "seed", pa.array([seed]))
        said = pa.array([json.dumps({**json.loads(trials["config"][0].as_py()), "seed": seed})])
        own["trials"] = trials.set_column(trials.column_names.index("config"), "config", said)
        store.write(own)
elif command == "pack":
    try:
        pack(store)
    except Exception as error:
        sys.exit(print(error))
found = load(sys.argv[1], "trials")
assert "access" not in found.column_names
print(json.dumps(sorted(zip(found["cell_id"].to_pylist(), found["seed"].to_pylist(), found["avg"].to_pylist()))))
"""


@pytest.mark.slow
def test_two_versions_may_write_into_one_store_at_once(store: Store) -> None:
    """An older one knows fewer columns and no table ``confusion``; each reads what both have written; the older one packs no column away."""

    def older(command: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(TESTS)}
        arguments = [sys.executable, "-c", OLDER, store.root, command]
        return subprocess.Popen(arguments, env=environment, text=True, stdout=subprocess.PIPE)

    def here() -> list[list[Any]]:
        rows = store.load("trials").to_pylist()
        return sorted([row["cell_id"], row["seed"], row["avg"]] for row in rows)

    with older("write") as writer:
        for seed in range(20):
            store.write(tables(cell(seed=seed, access="int8") if seed % 2 else cell(seed=seed)))
        writer.communicate()
    assert writer.returncode == 0
    expected = here()
    assert [row[1] for row in sorted(expected, key=lambda row: row[1])] == [*range(20), *range(100, 120)]
    with older("read") as reader:
        assert json.loads(reader.communicate()[0]) == expected
    with older("pack") as packer:
        assert "columns that this zeroflow does not know" in packer.communicate()[0]
    pack(store)
    assert here() == expected
    kept = {row["seed"]: row["access"] for row in store.load("trials").to_pylist()}
    assert [kept[seed] for seed in range(20)] == [None, "int8"] * 10
    with older("read") as reader:
        assert json.loads(reader.communicate()[0]) == expected


def test_a_store_of_a_newer_version_is_refused(store: Store) -> None:
    fill(store, cell())
    written = tables(cell(seed=1))
    trials = written["trials"]
    newer = pa.array([SCHEMA_VERSION + 1], pa.int32())
    written["trials"] = trials.set_column(trials.column_names.index("schema_version"), "schema_version", newer)
    store.write(written)
    for read in (store.done, lambda: store.load("trials"), lambda: store.load("stages")):
        with pytest.raises(ConfigError, match=f"schema version {SCHEMA_VERSION + 1}.*newer zeroflow"):
            read()


def test_bad_names_are_answered_with_the_nearest(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'trial'.*did you mean 'trials'"):
        load(store.root, "trial")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="found a file"):
        Store(tmp_path / "file")
    with pytest.raises(ConfigError, match="expected a folder or an object store"):
        Store("nosuch://bucket")


# Failures


def test_a_failure_is_kept_until_the_cell_is_done(store: Store) -> None:
    config = cell().config
    store.write_failure(failure(config, "MemoryError", "out of memory", "Traceback ...", 3))
    assert store.done() == set()
    row = store.failed()[config.cell_id]
    assert (row["error"], row["message"], row["traceback"]) == ("MemoryError", "out of memory", "Traceback ...")
    assert row["attempts"] == 3 and row["label"] == config.label() and row["failed_at"].tzinfo is not None
    assert TrialConfig(**json.loads(row["config"])) == config
    fill(store, cell())
    assert store.failed() == {} and len(store.load("failures")) == 0


# Summary


def test_the_interval_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    # The 97.5 % quantile of Student's t with 2 degrees of freedom, from a table; the standard deviation is 1.
    assert found.half_width == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)
    assert estimate([5.0]).half_width is None and str(estimate([5.0])) == "5.00"


def test_the_summary_averages_over_seeds_and_compares_with_simplecil(store: Store) -> None:
    fill(store, *(cell(level, seed=seed, optimizer="zo-sgd") for seed, level in enumerate((79.0, 80.0, 81.0))))
    fill(store, cell(90.0, optimizer="fo-sgd", queries=None), simplecil(70.0, seed=0))
    baseline, first_order, zeroth = summary(store.load("trials"))
    assert baseline.is_baseline and baseline.avg and baseline.avg.mean == 65.0 and baseline.vs_simplecil is None
    assert first_order.avg and first_order.avg.half_width is None and first_order.vs_simplecil == 20.0
    assert zeroth.seeds == 3 and zeroth.vs_simplecil == pytest.approx(10.0)
    assert zeroth.avg and zeroth.avg.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert (zeroth.forward_passes, zeroth.peak_memory, zeroth.seconds) == (12_000, 3.0, 4.5)
    assert list(zeroth.shown) == ["method", "optimizer", "queries"]
    assert zeroth.label == "ease zo-sgd"


def test_simplecil_leads_every_data_set_and_rows_are_sorted(store: Store) -> None:
    for dataset in ("b-set", "a-set"):
        fill(store, *(cell(dataset=dataset, optimizer="zo-sgd", queries=queries) for queries in (16, 4)))
        fill(store, cell(dataset=dataset, method="aper", optimizer="zo-sgd"), simplecil(dataset=dataset))
    rows = summary(store.load("trials"))
    assert [row.label for row in rows] == [
        f"{dataset} {rest}"
        for dataset in ("a-set", "b-set")
        for rest in ("simplecil", "aper zo-sgd q=1", "ease zo-sgd q=4", "ease zo-sgd q=16")
    ]


@pytest.mark.parametrize("others", [(), ({"method": "acil", "optimizer": None},)])
def test_options_of_a_methods_own_classifier_are_whose_they_are(store: Store, others: tuple[dict, ...]) -> None:
    """``classifier`` is null where it is the method's own."""
    shared = {"classifier_options": {"ridge": 10.0}, "queries": None}
    made = [{"method": "ranpac", "optimizer": None}, *others]
    fill(store, *(cell(**shared, **each) for each in made))
    assert f"ridge=10 ({', '.join(sorted(each['method'] for each in made))})" in render_text(
        summary(store.load("trials"))
    )


def test_keys_get_a_column_where_they_tell_rows_apart(store: Store) -> None:
    fill(store, cell(epochs=1), cell(epochs=2), cell(lr=0.5, optimizer="fo-adam", epochs=1), simplecil())
    rows = summary(store.load("trials"))
    # The learning rate follows the optimizer here; SimpleCIL has no epochs.
    assert all(list(row.shown) == ["method", "optimizer", "queries", "epochs"] for row in rows)
    fill(store, cell(epochs=1, lr=0.2), cell(epochs=1, checkpoint="none", method_options={"depth": 2}))
    shown = [row.shown for row in summary(store.load("trials"))]
    assert {row["lr"] for row in shown} == {"-", "0.01", "0.2", "0.5"}
    assert {row["checkpoint"] for row in shown} == {"-", "none"}
    assert {row["method_options"] for row in shown} == {"-", "depth=default", "depth=2"}
    assert len({tuple(row.values()) for row in shown}) == len(shown) == 6


def test_simplecil_on_another_problem_is_no_measure(store: Store) -> None:
    fill(store, cell(), simplecil(class_order_seed=7))
    assert [row.vs_simplecil for row in summary(store.load("trials"))] == [None, None]


def test_the_table_fits_a_terminal(store: Store) -> None:
    for seed, level in enumerate((79.0, 80.0, 81.0)):
        fill(store, cell(level, seed=seed, method="aper-adapter", optimizer="zo-adam-conserve", queries=4))
    fill(store, simplecil())
    text = render_text(summary(store.load("trials")))
    assert max(map(len, text.splitlines())) <= 120
    _, _, first, second, *_ = text.splitlines()
    assert first.split()[:4] == ["simplecil", "-", "-", "1"]
    assert re.search(r"zo-adam-conserve +4 +3 +75\.00 ± 2\.48 .* \+10\.00 +700 +12,000 +3\.0 +4\.5$", second)


def test_markdown_keeps_its_columns_whatever_the_names(store: Store) -> None:
    fill(store, cell(method="a|b"), simplecil())
    lines = [line for line in render_markdown(summary(store.load("trials"))).splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_an_empty_table_renders() -> None:
    assert "Avg" in render_text([]) and "Avg" in render_markdown([])


@pytest.mark.slow
def test_results_are_read_without_torch() -> None:
    program = (
        "import sys, zeroflow.results.report; assert not {'torch', 'timm', 'ray', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
