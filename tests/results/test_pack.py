"""Packed stores: everything reads as before, nothing is lost on the way, and work goes on from there."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from everything import cell, everything
from places import ROOT

from zeroflow.cli import main
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import parse_grid
from zeroflow.grid.plan import make_plan
from zeroflow.results import SCHEMA_VERSION, SCHEMAS, Store, load, merge, pack
from zeroflow.results.report import write_report
from zeroflow.results.rows import failure, tables
from zeroflow.results.storage import File, Folder

COMMITTED = ("quick", "families_quickdraw", "trajectories", "table1_quickdraw_search")


def contents(store: Store | str | Path) -> dict[str, pa.Table]:
    return {name: load(store, name) for name in SCHEMAS}


def check_equal(found: dict[str, pa.Table], expected: dict[str, pa.Table]) -> None:
    for name, table in expected.items():
        assert found[name].equals(table, check_metadata=True), name


def fill(store: Store, *seeds: int) -> None:
    for seed in seeds:
        store.write(tables(cell(probes=seed % 2 == 0, seed=seed)))


def loose(store: Store) -> list[str]:
    files = Path(store.root).rglob("*.parquet")
    return sorted(str(file.relative_to(store.root)) for file in files if file.name != "packed.parquet")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


# Reading


@pytest.mark.slow
def test_every_table_is_the_same_before_and_after(store: Store) -> None:
    everything(store)
    store.write_failure(failure(cell(seed=77).config, "RuntimeError", "boom", "", 1))
    expected, failed = contents(store), store.failed()
    packed = pack(store)
    assert packed.files > 50 and packed.cells == len(store.done()) == len(expected["trials"])
    assert {Path(file).parent.name for file in loose(store)} == {"failures"}, "they come and go"
    for reader in (store, Store(store.root)):
        check_equal(contents(reader), expected)
        assert reader.done() == set(expected["trials"]["cell_id"].to_pylist()) and reader.failed() == failed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_any_mixture_of_packed_and_loose_reads_the_same(store: Store, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    fill(store, *range(9))
    expected, kept = contents(store), tmp_path / "kept"
    shutil.copytree(store.root, kept)
    mixed = Store(tmp_path / "mixed")
    for _ in range(chance.randint(1, 3)):  # any cells come, in any order, and are packed
        fill(mixed, *chance.sample(range(9), chance.randint(1, 9)))
        pack(mixed)
    for file in chance.sample(loose(store), chance.randint(0, len(loose(store)))):  # any file lies there a second time
        path = Path(mixed.root, file)
        if Path(mixed.root, "trials", path.name).exists() or path.stem in mixed.done():
            path.parent.mkdir(exist_ok=True)
            shutil.copy(kept / file, path)
    fill(mixed, *range(9))
    for _ in range(2):
        check_equal(contents(mixed), expected)
        assert mixed.done() == store.done()
        for table in ("trials", "probes", "steps"):
            some = set(chance.sample(sorted(store.done()), 5))
            wanted = expected[table].filter(pc.is_in(expected[table]["cell_id"], pa.array(sorted(some))))
            assert load(mixed, table, cells=some).equals(wanted), "only the cells asked for"
        assert mixed.load("steps", ["loss"])["loss"].equals(expected["steps"]["loss"])
        assert mixed.row("trials", max(some)) == store.row("trials", max(some))
        pack(mixed)
    assert loose(mixed) == []


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_results_are_packed_and_read_by_other_tools(name: str) -> None:
    import duckdb
    import polars

    files = [file for file in (ROOT / "results" / name).rglob("*.parquet")]
    assert files and {file.name for file in files} == {"packed.parquet"}
    for table in sorted({file.parent for file in files}):
        expected = load(ROOT / "results" / name, table.name)
        counts = [
            len(pd.read_parquet(table)),
            len(polars.read_parquet(f"{table}/*.parquet")),
            len(duckdb.sql(f"SELECT * FROM '{table}/*.parquet'").fetchall()),
        ]
        assert counts == [len(expected)] * 3 and len(expected) > 0


def test_other_tools_read_packed_and_loose_files_together(store: Store) -> None:
    import duckdb
    import polars

    fill(store, 0, 1)
    pack(store)
    fill(store, 2)
    for table in ("trials", "accuracy"):
        expected = store.load(table).to_pylist()
        files = f"{store.root}/{table}/*.parquet"
        for found in (
            pa.Table.from_pandas(pd.read_parquet(f"{store.root}/{table}"), preserve_index=False),
            duckdb.sql(f"SELECT * FROM '{files}'").to_arrow_table(),
            polars.read_parquet(files).to_arrow(),
        ):
            rows = found.cast(SCHEMAS[table]).to_pylist()
            key = "stage" if table == "accuracy" else "seed"
            assert sorted(rows, key=lambda row: (row["cell_id"], row[key], row.get("task"))) == expected


def test_cells_do_not_straddle_row_groups_and_few_groups_are_read_for_few_cells(store: Store) -> None:
    steps = pa.table(
        {
            name: pa.nulls(40_000, field.type)
            for name, field in zip(SCHEMAS["steps"].names, SCHEMAS["steps"], strict=True)
        }
    )
    for seed in range(5):
        own = tables(cell(seed=seed))
        ids = pa.array([cell(seed=seed).cell_id] * len(steps))
        long = steps.set_column(0, SCHEMAS["steps"].field(0), ids).cast(SCHEMAS["steps"])
        store.write({**own, "steps": long})
    pack(store)
    file = pq.ParquetFile(Path(store.root, "steps", "packed.parquet"))
    groups = [
        set(file.read_row_group(i, columns=["cell_id"])["cell_id"].to_pylist()) for i in range(file.num_row_groups)
    ]
    assert len(groups) == 3 and sum(map(len, groups)) == 5, "each in one"
    assert len(load(store, "steps", cells=[cell(seed=3).cell_id])) == 40_000


@pytest.mark.slow
def test_the_report_is_the_same(store: Store, tmp_path: Path) -> None:
    fill(store, 0, 1)
    before = write_report(store, tmp_path / "before.html").read_text()
    pack(store)
    assert write_report(store, tmp_path / "after.html").read_text() == before


def test_a_file_of_an_older_version_is_packed_with_null_for_what_it_lacks(store: Store) -> None:
    fill(store, 0, 1)
    old = Path(store.root, "trials", f"{cell(seed=0).cell_id}.parquet")
    pq.write_table(pq.read_table(old).drop_columns(["data_shards", "price"]), old)
    expected = contents(store)
    pack(store)
    check_equal(contents(store), expected)


# Work goes on


def test_a_sweep_goes_on_from_a_packed_store(store: Store) -> None:
    grid = parse_grid({"grid": [{"method": ["ease"], "optimizer": ["zo-sgd"], "seed": [0, 1, 2]}]})
    first, second, third = grid.cells
    for config in (first, second):
        store.write(tables(dataclasses.replace(cell(), config=config)))
    store.write_failure(failure(third, "RuntimeError", "boom", "", 1))
    pack(store)
    plan = make_plan(grid, Store(store.root), None)
    assert {c.cell_id for c in plan.done} == {first.cell_id, second.cell_id}
    assert [c.cell_id for c in plan.failed] == [third.cell_id] and store.has(first.cell_id)
    assert not store.has(third.cell_id) and store.failed_at(third.cell_id) is not None
    store.write(tables(dataclasses.replace(cell(), config=third)))
    assert not store.failed() and store.has(third.cell_id) and len(store.done()) == 3
    assert pack(store).cells == 3 and loose(store) == []


def test_a_cell_written_again_counts_once_and_is_packed_again(store: Store) -> None:
    fill(store, 0, 1)
    pack(store)
    expected = contents(store)
    fill(store, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(contents(store), expected)
    assert pack(store).cells == 2
    check_equal(contents(store), expected)


def test_a_cell_with_another_result_is_named_and_nothing_is_packed(store: Store) -> None:
    fill(store, 0, 1)
    pack(store)
    store.write(tables(cell(60.0, seed=0)))
    store.write(tables(cell(seed=2)))
    before = loose(store)
    named = (
        rf"cell {cell(seed=0).cell_id}: avg is 75.0 in .*packed.parquet and 55.0 in .*{cell(seed=0).cell_id}.parquet"
    )
    with pytest.warns(UserWarning, match=named):
        assert sorted(store.load("trials")["avg"].to_pylist()) == [55.0, 75.0, 75.0]
    with pytest.raises(ConfigError, match=rf"{named}; nothing was packed"):
        pack(store)
    assert loose(store) == before


def test_rows_of_an_unfinished_cell_stay_as_they_are(store: Store) -> None:
    fill(store, 0, 1)
    Path(store.root, "trials", f"{cell(seed=1).cell_id}.parquet").unlink()
    before = [file for file in loose(store) if cell(seed=1).cell_id in file]
    pack(store)
    assert loose(store) == before and len(before) >= 3
    assert set(store.load("stages")["cell_id"].to_pylist()) == {cell(seed=0).cell_id}


def test_what_cannot_be_read_is_left_with_a_warning(store: Store) -> None:
    fill(store, 0, 1)
    broken = Path(store.root, "stages", f"{cell(seed=1).cell_id}.parquet")
    broken.write_bytes(broken.read_bytes()[:-30])
    with pytest.warns(UserWarning, match=f"not packed.*{broken.name}"):
        pack(store)
    assert loose(store) == [f"stages/{broken.name}"]


def test_a_later_search_replaces_the_packed_one(store: Store) -> None:
    found = load(ROOT / "results" / "table1_quickdraw_search", "searches")
    one = found.filter(pc.field("search_id") == found["search_id"][0].as_py())
    store.write_search(one)
    pack(store)
    shorter = one.slice(0, len(one) - 1)
    store.write_search(shorter)
    assert store.load("searches").equals(shorter)
    pack(store)
    assert store.load("searches").equals(shorter) and loose(store) == []


@pytest.mark.slow
def test_merging_does_not_mind_what_is_packed(store: Store, tmp_path: Path) -> None:
    everything(store)
    expected, target = contents(store), Store(tmp_path / "target")
    fill(target, 0)
    kept = target.done()
    pack(target)
    pack(store)
    assert merge(target, store) == len(store.done())
    assert target.done() == kept | store.done()
    for name, table in expected.items():
        key = {"searches": "search_id", "trajectories": "landscape_id", "surfaces": "landscape_id"}.get(name, "cell_id")
        own = target.load(name)
        assert own.filter(pc.is_in(own[key], pc.unique(table[key]))).equals(table), name
    assert merge(target, store) == 0
    store.write(tables(cell(10.0, seed=0)))
    with pytest.raises(ConfigError, match="nothing was merged"):
        merge(target, store)


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


# Object stores, the command


@pytest.mark.slow
def test_a_bucket_is_packed_like_a_folder(s3: str, store: Store) -> None:
    remote = Store("s3://bucket/packed")
    for where in (remote, store):
        fill(where, 0, 1, 2)
    expected = contents(store)
    assert pack(remote).cells == 3
    names = {file.name for table in SCHEMAS for file in remote.storage.list(table)}
    assert {name.rpartition("/")[2] for name in names if not name.startswith("failures")} == {"packed.parquet"}
    fill(remote, 91)
    fill(store, 91)
    check_equal(contents(remote.root), contents(store))
    assert pack(remote).files == 5 and Store(remote.root).done() == store.done()
    check_equal(contents(remote.root), contents(store))
    assert len(load(remote, "steps", cells=store.done())) == len(contents(store)["steps"]) > len(expected["steps"])
    assert isinstance(remote.storage.stat("trials/packed.parquet"), File)


def test_the_command_packs_and_status_goes_on(store: Store) -> None:
    fill(store, 0, 1, 2)
    run = CliRunner()
    before = run.invoke(main, ["status", store.root]).stdout
    found = run.invoke(main, ["pack", store.root])
    assert found.exit_code == 0 and "17 files packed into" in found.stdout and "3 cells done" in found.stdout
    assert run.invoke(main, ["status", store.root]).stdout == before
    again = json.loads(run.invoke(main, ["pack", store.root, "--json"]).stdout)
    assert (again["files"], again["cells"]) == (0, 3)
    refused = run.invoke(main, ["pack", str(Path(store.root).parent)])
    assert refused.exit_code != 0


@pytest.mark.slow
def test_the_benchmark_of_packing_runs(tmp_path: Path) -> None:
    sizes = ["--cells", "12", "--s3-cells", "10", "--rounds", "1", "--output", str(tmp_path / "packing.json")]
    command = [sys.executable, str(ROOT / "benchmarks" / "packing.py"), *sizes]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    stores = json.loads((tmp_path / "packing.json").read_text())["stores"]
    assert [(store["where"], store["cells"], store["loose_files"]) for store in stores] == [
        ("folder", 12, 48),
        ("S3", 10, 40),
    ]
