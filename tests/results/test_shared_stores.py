"""Stores that several use: readers and writers at once, stores that are merged, and object stores."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from everything import fill
from places import TESTS
from pyarrow import fs
from small_results import cell, odd, path, simplecil, writing

from zeroflow.errors import ConfigError
from zeroflow.results import SCHEMAS, Store, load, merge, pack, parquet
from zeroflow.results.copying import copy_cell
from zeroflow.results.rows import failure, tables

# Readers and writers at once


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
    assert not copy_cell(store, cell().cell_id, other) and not copy_cell(store, cell(seed=1).cell_id, other)
    assert store.load("trials")["avg"].to_pylist() == [75.0] and len(store.done()) == 1


def test_a_store_that_was_copied_while_it_was_written_says_so_and_is_completed(store: Store, tmp_path: Path) -> None:
    """``cp -r`` takes the tables by name, trials last: cells that finish meanwhile are copied without the others."""
    copied = Store(tmp_path / "copied")
    for each in (store, copied):
        fill(each, cell(80.0), cell(90.0, seed=1))
    for table in ("stages", "accuracy", "steps"):
        path(copied, table, cell(seed=1)).unlink()
    with pytest.warns(
        UserWarning, match=f"have no rows in stages: {cell(seed=1).cell_id}; .* merge the original into it"
    ):
        assert set(copied.load("stages")["cell_id"].to_pylist()) == {cell().cell_id}
    assert merge(tmp_path / "both", copied, store) == 2 and merge(copied, store) == 0
    for each in (Store(tmp_path / "both"), copied):
        for table in ("trials", "stages", "accuracy", "steps"):
            assert each.load(table).equals(store.load(table)), table


def test_what_is_damaged_in_one_store_is_taken_from_another(store: Store, tmp_path: Path) -> None:
    damaged = Store(tmp_path / "damaged")
    for each in (store, damaged):
        fill(each, cell(80.0), cell(90.0, seed=1))
    for table in ("stages", "steps"):
        file = path(damaged, table, cell())
        file.write_bytes(file.read_bytes()[:-20])
    assert merge(tmp_path / "both", damaged, store) == 2 and merge(damaged, store) == 0
    for each in (Store(tmp_path / "both"), damaged):
        for table in ("trials", "stages", "steps"):
            assert each.load(table).equals(store.load(table)), table


@pytest.mark.parametrize("change", ["damaged", "contradicts"])
def test_of_a_packed_cell_whose_own_file_is_bad_the_packed_rows_are_merged(
    store: Store, tmp_path: Path, change: str
) -> None:
    fill(store, cell(80.0), cell(90.0, seed=1))
    file = path(store, "trials", cell())
    data, whole = file.read_bytes(), store.load("trials")
    pack(store)
    if change == "damaged":
        file.write_bytes(data[:-20])
    else:
        rows = pq.read_table(pa.BufferReader(data))
        where = rows.schema.get_field_index("lr")
        pq.write_table(rows.set_column(where, "lr", pa.array([0.5])), file)
    with pytest.warns(UserWarning, match=cell().cell_id):
        assert merge(tmp_path / "both", store) == 2
    assert load(tmp_path / "both", "trials").equals(whole)


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
    written = {each.cell_id: parquet.encode("trials", tables(each)["trials"]) for each in (cell(), cell(seed=1))}
    streams = [
        remote.storage.filesystem.open_output_stream(f"{remote.storage.base}/trials/{name}.parquet") for name in written
    ]
    for stream, data in zip(streams, written.values(), strict=True):
        stream.write(data)
    assert remote.load("trials")["avg"].to_pylist() == [75.0]
    assert remote.done() == {cell().cell_id}
    for stream in streams:
        stream.close()
    assert remote.done() == set(written), "they were on their way"


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


# Several versions


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
