"""Packing loses nothing: not by death at any step, beside readers and writers, or of what it does not know."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from everything import cell
from small_results import check_equal, contents, loose

from zeroflow.errors import ConfigError
from zeroflow.results import SCHEMA_VERSION, Store, pack
from zeroflow.results.rows import tables
from zeroflow.results.storage import Folder


def fill(store: Store, *seeds: int) -> None:
    for seed in seeds:
        store.write(tables(cell(probes=seed % 2 == 0, seed=seed)))


# Safety


class Died(Exception):
    """The process, in the middle."""


class Dying(Folder):
    """A folder whose changes end with the ``last`` one: the next is not made, or is but nobody hears of it."""

    def __init__(self, root: str, last: int, *, heard: bool) -> None:
        super().__init__(root)
        self.left, self.heard, self.lock = last, heard, threading.Lock()

    def spend(self) -> None:
        with self.lock:
            self.left -= 1
            if self.left < 0:
                raise Died

    def write(self, name: str, data: bytes) -> None:
        if not self.heard:
            super().write(name, data)
        self.spend()
        super().write(name, data)

    def delete(self, name: str) -> None:
        if not self.heard:
            super().delete(name)
        self.spend()
        super().delete(name)

    def sync(self, folder: str) -> None:
        self.spend()
        super().sync(folder)


@pytest.mark.slow
@pytest.mark.parametrize("heard", [True, False])
def test_death_at_any_step_loses_nothing(store: Store, tmp_path: Path, heard: bool) -> None:
    fill(store, 0, 1)
    pack(store)
    fill(store, 1, 2)
    expected, steps = contents(store), 0
    while True:
        copy = tmp_path / f"{heard}-{steps}"
        shutil.copytree(store.root, copy)
        try:
            pack(Store(Dying(str(copy), steps, heard=heard)))
            break
        except Died:
            pass
        check_equal(contents(copy), expected)
        assert Store(copy).done() == store.done()
        assert pack(copy).cells == 3, "the next one goes on"
        check_equal(contents(copy), expected)
        assert loose(Store(copy)) == []
        steps += 1
    assert steps > 15


@pytest.mark.slow
def test_readers_do_not_notice_packing(store: Store) -> None:
    fill(store, *range(20))
    expected, over, seen = contents(store), threading.Event(), []

    def read() -> None:
        while not over.is_set():
            reader = Store(store.root)
            seen.append([reader.load(name).equals(expected[name]) for name in ("trials", "steps", "probes")])

    thread = threading.Thread(target=read)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thread.start()
        for seed in range(20):
            pack(store)
            fill(store, seed)
        over.set()
        thread.join()
    assert len(seen) > 2 and all(all(each) for each in seen)


class Torn(Folder):
    """A folder whose disk keeps less than it was given."""

    def write(self, name: str, data: bytes) -> None:
        super().write(name, data[: len(data) // 2] if name.endswith("packed.parquet") else data)


def test_nothing_is_removed_if_the_packed_file_is_not_what_was_written(store: Store) -> None:
    fill(store, 0, 1)
    before = loose(store)
    with pytest.raises(ConfigError, match=r"packed\.parquet"):
        pack(Store(Torn(store.root)))
    assert loose(store) == before


class Rewriting(Folder):
    """A folder in which a cell is written anew while it is packed."""

    def sync(self, folder: str) -> None:
        if folder == "stages":
            super().write(f"stages/{cell(seed=0).cell_id}.parquet", b"PAR1 another writer's PAR1")
        super().sync(folder)


def test_a_file_that_was_written_anew_meanwhile_stays(store: Store) -> None:
    fill(store, 0, 1)
    pack(Store(Rewriting(store.root)))
    assert loose(store) == [f"stages/{cell(seed=0).cell_id}.parquet"]


@pytest.mark.parametrize("damage", ["cut", "inside", "foreign", "unsorted", "empty"])
def test_a_damaged_packed_file_is_one_error_that_names_it(store: Store, damage: str) -> None:
    fill(store, 0, 1, 2)
    pack(store)
    file = Path(store.root, "trials", "packed.parquet")
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "inside":
        file.write_bytes(data[:2000] + bytes(byte ^ 0x55 for byte in data[2000:6000]) + data[6000:])
    elif damage == "foreign":
        pq.write_table(pa.table({"a": [1]}), file)
    else:
        rows = store.load("trials").take([2, 0, 1])
        pq.write_table(rows, file, row_group_size=1)
    fill(Store(store.root), 3)
    for use in (lambda: Store(store.root).load("trials"), lambda: pack(store.root)):
        with pytest.raises(ConfigError, match=r"results '.*': trials/packed.parquet cannot be read: .*zeroflow pack"):
            use()


def test_what_a_newer_version_wrote_is_not_packed(store: Store) -> None:
    fill(store, 0, 1)
    file = Path(store.root, "stages", f"{cell(seed=0).cell_id}.parquet")
    pq.write_table(pq.read_table(file).append_column("from_the_future", pa.array(["x", "y"])), file)
    with pytest.raises(ConfigError, match=rf"{file.name} has columns .*: from_the_future; nothing was lost"):
        pack(store)
    assert f"stages/{file.name}" in loose(store)
    trials = tables(cell(seed=2))["trials"]
    newer = trials.set_column(1, trials.schema.field(1), pa.array([SCHEMA_VERSION + 1], pa.int32()))
    Path(store.root, "trials", "packed.parquet").unlink(missing_ok=True)
    pq.write_table(newer, Path(store.root, "trials", "packed.parquet"))
    for use in (store.done, lambda: store.load("stages"), lambda: pack(store)):
        with pytest.raises(ConfigError, match=f"schema version {SCHEMA_VERSION + 1}"):
            use()


# Refused while somebody is at work


CLAIMING = """
import sys
from zeroflow.results import Store
claims = Store(sys.argv[1]).claims()
print(claims.take(sys.argv[2]), flush=True)
sys.stdin.read()
"""


def test_a_store_with_claims_is_not_packed(store: Store) -> None:
    fill(store, 0)
    command = [sys.executable, "-c", CLAIMING, store.root, cell(seed=5).cell_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"True\n"
        with pytest.raises(ConfigError, match="claimed by a sweep"):
            pack(store)
        other.kill()
    assert len(loose(store)) == 6 and pack(store).cells == 1
    assert all(store.claims().take(cell(seed=seed).cell_id) for seed in (0, 5)), "given back"


def test_a_store_that_a_sweep_is_at_work_on_is_not_packed(store: Store) -> None:
    fill(store, 0)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {
        "state": "running",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "written_at": now,
        "started_at": now,
    }
    store.put_file("sweeps/a.json", json.dumps({**record, "grid": "quick"}).encode())
    with pytest.raises(ConfigError, match=r"the sweep of quick .* is at work"):
        pack(store)
    store.put_file("sweeps/a.json", json.dumps({**record, "grid": "quick", "state": "finished"}).encode())
    assert pack(store).cells == 1


@pytest.mark.slow
def test_claims_in_an_object_store_keep_it_from_being_packed(s3: str) -> None:
    remote = Store("s3://bucket/claimed")
    fill(remote, 0)
    claims = remote.claims()
    assert claims.take(cell(seed=5).cell_id)
    with pytest.raises(ConfigError, match="claimed by a sweep"):
        pack(remote)
    claims.close()
    holder, other = remote.claims(), remote.claims()
    assert holder.take_all() and not other.take(cell().cell_id) and not other.take_all()
    holder.close()
    assert other.take(cell().cell_id)
    other.close()
    assert pack(remote).cells == 1


def test_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a store to pack, found nothing"):
        pack(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
