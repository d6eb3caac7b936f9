"""Packed stores: everything reads as before, and work goes on from there."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from everything import cell, everything
from places import ROOT
from small_results import check_equal, contents, loose

from zeroflow.cli import main
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import parse_grid
from zeroflow.grid.plan import make_plan
from zeroflow.results import SCHEMAS, Store, load, merge, pack
from zeroflow.results.report import write_report
from zeroflow.results.rows import failure, tables
from zeroflow.results.storage import File

COMMITTED = ("quick", "families_quickdraw", "trajectories", "table1_quickdraw_search")


def fill(store: Store, *seeds: int) -> None:
    for seed in seeds:
        store.write(tables(cell(probes=seed % 2 == 0, seed=seed)))


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
    assert not store.has(third.cell_id) and store.failure(third.cell_id) is not None
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
