"""What is done, broken, absent or failed in a store, and what is said of it."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from everything import fill
from small_results import cell, path

from zeroflow.errors import ConfigError
from zeroflow.results import SCHEMA_VERSION, SCHEMAS, Store, load
from zeroflow.results.copying import copy_cell
from zeroflow.results.rows import failure, tables
from zeroflow.results.summary import summary
from zeroflow.trial.config import TrialConfig

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


@pytest.mark.parametrize("place", [6, 40, 0.3, 0.5, 0.7, -150, -6])
def test_a_file_broken_inside_is_not_done_and_is_skipped_with_a_warning(
    place: float, store: Store, tmp_path: Path
) -> None:
    """One byte of it is another one: in the checksum, in the row, in a column, in the footer."""
    whole, broken = cell(), cell(seed=1)
    fill(store, whole, broken)
    good = Store(tmp_path / "good")
    fill(good, broken)
    file = path(store, "trials", broken)
    data = bytearray(file.read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 0x01
    file.write_bytes(data)
    for reader in (store, Store(store.root)):
        assert reader.done() == {whole.cell_id} and not reader.has(broken.cell_id) and reader.has(whole.cell_id)
        with pytest.warns(UserWarning, match=broken.cell_id):
            assert reader.load("trials")["cell_id"].to_pylist() == [whole.cell_id]
        assert set(reader.load("steps")["cell_id"].to_pylist()) == {whole.cell_id}
    assert copy_cell(store, broken.cell_id, good), "a good copy takes its place"
    assert store.done() == {whole.cell_id, broken.cell_id} and len(store.load("trials")) == 2


def test_a_file_without_a_row_is_not_done(store: Store) -> None:
    fill(store, cell())
    pq.write_table(SCHEMAS["trials"].empty_table(), path(store, "trials", cell()))
    assert store.done() == set() and not store.has(cell().cell_id)


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
