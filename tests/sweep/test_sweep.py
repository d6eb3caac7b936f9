"""Grids, plans, and a real sweep: Ray Tune, Ray Train, Parquet on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from places import ROOT

import zeroflow.results
from zeroflow.cli import main
from zeroflow.errors import ConfigError
from zeroflow.grid.cell_placement import CellPlacement
from zeroflow.grid.grid_file import load_grid, parse_grid, parse_override
from zeroflow.grid.labels import labels
from zeroflow.grid.placement import cells_that_fit
from zeroflow.grid.plan import make_plan
from zeroflow.results.store import Store
from zeroflow.sweep.driver import run_sweep
from zeroflow.trial.config import TrialConfig

SMALL_GRID = """
name: small
base: {checkpoint: none, image_size: 7, tasks: 20, stop_after: 2, epochs: 1, batch_size: 100}
grid:
  - {method: simplecil}
  - {method: aper-adapter, optimizer: [fo-sgd, zo-sgd], seed: [0, 1]}
settings:
  - {when: {optimizer: zo-sgd}, set: {lr: 1e-4, eps: 1e-2}}
placement: {gpus_per_worker: 0, max_concurrent: 2}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_cheapest_cells_begin_first_among_those_that_need_as_much(tmp_path: Path) -> None:
    from zeroflow.sweep.messages import SweepContext
    from zeroflow.sweep.queue import CellQueue

    grid = parse_grid(
        {
            "name": "mixed",
            "base": {"checkpoint": "none", "image_size": 14, "epochs": 2},
            "grid": [
                {"method": "ease", "optimizer": ["fo-sgd", "zo-sgd"], "lr": 0.1, "queries": [2]},
                {"method": "ease", "optimizer": "zo-sgd", "lr": 0.1, "queries": 1, "epochs": [9, 1]},
                {"method": "simplecil"},
            ],
            "placement": {"gpus_per_worker": 0},
        },
        where="mixed.yaml",
    )
    queue = CellQueue(grid.cells, grid.placement, lambda: [{"CPU": 2.0}], Store(tmp_path), SweepContext(str(tmp_path)))
    began = [(job.config.optimizer, job.config.queries, job.config.epochs) for job in queue.waiting]
    assert began == [(None, None, None), ("zo-sgd", 1, 1), ("fo-sgd", None, 2), ("zo-sgd", 2, 2), ("zo-sgd", 1, 9)]


def in_this_process(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["sweep", *map(str, arguments)], catch_exceptions=False)


def test_a_line_of_progress_names_the_options_that_tell_its_cell_from_others() -> None:
    sizes = (4, 64, 16)  # 64 is the default, which a configuration does not hold
    made = [{"method_options": {"bottleneck": size}} for size in sizes] + [{"method": "simplecil"}]
    cells = [TrialConfig.from_dict(each) for each in made]
    *lines, alone = labels(cells).values()
    assert lines == [f"{cell.label()} bottleneck={size}" for cell, size in zip(cells, sizes, strict=False)]
    assert alone == cells[-1].label()


def test_a_grid_is_the_product_of_its_lists_each_cell_once(tmp_path) -> None:
    grid = load_grid(write(tmp_path / "small.yaml", SMALL_GRID))
    assert len(grid.cells) == 5
    zo = [c for c in grid.cells if c.optimizer == "zo-sgd"]
    assert [(c.lr, c.eps, c.seed) for c in zo] == [(1e-4, 1e-2, 0), (1e-4, 1e-2, 1)]
    # SimpleCIL is not trained: one cell whatever the optimizers and seeds.
    crossed = parse_grid(
        {"grid": [{"method": ["simplecil", "ease"], "optimizer": ["fo-sgd", "zo-sgd"], "seed": [0, 1]}]}
    )
    assert len(crossed.cells) == 5
    # Queries multiply only what has queries.
    queried = parse_grid({"grid": [{"optimizer": ["fo-sgd", "zo-sgd"], "queries": [1, 2, 4]}]})
    assert len(queried.cells) == 4


@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_grid_file_of_the_project_is_right(file: Path) -> None:
    assert load_grid(file).cells


def test_overrides_win_over_everything(tmp_path) -> None:
    file = write(tmp_path / "small.yaml", SMALL_GRID)
    overrides = dict(map(parse_override, ["lr=5e-4", "seed=[3, 4, 5]", "method_options.bottleneck=4"]))
    grid = load_grid(file, overrides)
    trained = [c for c in grid.cells if c.optimizer]
    assert {c.lr for c in trained} == {5e-4}
    assert {c.seed for c in trained} == {3, 4, 5}
    assert all(c.method_options == {"bottleneck": 4} for c in trained)


def test_rules_see_defaults_and_dotted_keys_and_never_beat_the_command_line() -> None:
    content = {
        "base": {"method_options.bottleneck": 8},
        "grid": [{"optimizer": "fo-sgd", "optimizer_options.momentum": 0.9}, {"method": "simplecil"}],
        "settings": [
            {"when": {"method": "ease"}, "set": {"epochs": 3}},
            {"when": {"optimizer_options.momentum": 0.9}, "set": {"lr": 0.7, "method_options": {"bottleneck": 16}}},
        ],
    }
    plain, frozen = parse_grid(content).cells
    assert (plain.epochs, plain.lr, plain.method_options["bottleneck"]) == (3, 0.7, 16)
    assert not frozen.method_options, "an option that all cells share is dropped where a method has no such thing"
    plain, frozen = parse_grid(content, {"method_options.bottleneck": 4, "lr": 0.1}).cells
    assert (plain.lr, plain.method_options["bottleneck"]) == (0.1, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: [{metod: ease}]", "grid.0.*did you mean 'method'"),
        ("grid: [{method: [ease, eaze]}]", "did you mean 'ease'"),
        ("grid: [{optimizer: []}]", "the list is empty"),
        ("grid: []", "expected a list"),
        ("gird: [{method: ease}]", "did you mean 'grid'"),
        ("grid: [{tasks: 3}]", "do not divide into 3"),
        ("grid: [{method: ease, method: ease}]", "given twice"),
        ("grid: [{method: ease]", "not valid YAML"),
        ("grid: [{method: ease}]\nplacement: {worker: 2}", "workers_per_trial"),
        ("grid: [{method: ease}]\nplacement: {cpus_per_worker: 0}", "cpus_per_worker=0"),
        ("grid: [{method: ease}]\nsettings: [{if: {}}]", "when"),
        ("grid: [{method: !!python/object/apply:os.system ['true']}]", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("grid: [{method: ease}]\nsettings: 5", "settings: expected a list"),
        ("grid: [{method: ease}]\nsettings: [{when: {optimizer: zo-sdg}, set: {lr: 1}}]", "did you mean 'zo-sgd'"),
        ("grid: [{method: ease}]\nsettings: [{when: 1, set: {lr: 1}}]", "when: expected a mapping"),
        ("grid: [{method: ease}]\nbase: {method_options.alfa: 1}", "base: unknown option.*did you mean 'alpha'"),
        ("grid: [{method: simplecil, method_options.alpha: 1}]", "alpha"),
        ("grid: [{[a]: x}]", "not valid YAML"),
        ("name: ../elsewhere\ngrid: [{method: ease}]", "name='../elsewhere': expected letters"),
        ("name: [a]\ngrid: [{method: ease}]", r"name=\['a'\]: expected letters"),
        ('name: "a\\0b"\ngrid: [{method: ease}]', "name='a.*: expected letters"),
        ("grid: [{method: ease}]\ndata_dir: 5", "data_dir"),
        ("grid: [{method: ease}]\nplacement: {gpus_per_worker: 1.5}", "bad.yaml.*gpus_per_worker=1.5"),
        (
            "grid: [{method: ease}]\nplacement: {data_shards: 2}",
            "data_shards=2: expected a divisor of workers_per_trial=1",
        ),
        (
            "grid: [{method: ease}]\nplacement: {rules: [{when: {method: eaze}, set: {cpus_per_worker: 1}}]}",
            "did you mean 'ease'",
        ),
        (
            "grid: [{method: ease}]\nplacement: {rules: [{when: {method: ease}, set: {cpu_per_worker: 1}}]}",
            "'cpus_per_worker'",
        ),
        ("grid: [{method: ease}]\nplacement: {out_of_memory: {evaluation_batch: 4}}", "out_of_memory: expected a list"),
        ('settings_from: ["\\uD800"]\ngrid: [{method: ease}]', "settings_from: .*is no file name"),
        (
            "grid: [{optimizer: zo-sgd, optimizer_options.sparsity: 1" + "0" * 400 + "}]",
            "sparsity=10+ for .*expected a number",
        ),
        ("grid: [{method: ease}]\nplacement: {out_of_memory: [{evaluation_batch: 0}]}", "evaluation_batch=0"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_written(tmp_path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_grid(write(tmp_path / "bad.yaml", text))


def test_the_command_line_refuses_with_one_message_and_writes_nothing(tmp_path) -> None:
    file = write(tmp_path / "bad.yaml", "grid: [{method: ease, optimizer: zo-sdg}]")
    run = in_this_process("--grid", file, "--results", tmp_path / "out")
    assert run.exit_code == 2
    assert "bad.yaml: grid[0]: unknown optimizer 'zo-sdg'; did you mean 'zo-sgd'" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_cannot_be_read_stops_the_sweep_before_it_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"not a checkpoint")
    file = write(tmp_path / "grid.yaml", "grid: [{method: simplecil, checkpoint: weights.pth}]")
    run = in_this_process("--grid", file, "--results", tmp_path / "out")
    assert run.exit_code == 2
    assert "weights.pth: cannot be read" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_the_default_grid_lists_what_has_no_data_here(tmp_path) -> None:
    run = in_this_process("--dry-run", "--results", tmp_path / "out", "--data-dir", tmp_path / "data")
    assert run.exit_code == 0, run.output
    assert "cifar100" in run.stdout and str(tmp_path / "data") in run.stdout
    assert "quickdraw100-marker aper-adapter zo-sgd q=32" in run.stdout
    assert not (tmp_path / "out").exists()


def test_cells_at_a_time_follow_from_the_nodes() -> None:
    def count(nodes, **placement) -> int:
        return cells_that_fit(CellPlacement(**{"gpus_per_worker": 0, **placement}), nodes)

    assert count([{"CPU": 2}]) == 2
    assert count([{"CPU": 2}], workers_per_trial=2) == 1
    assert count([{"CPU": 3}, {"CPU": 3}], cpus_per_worker=2) == 2
    assert count([{"CPU": 16, "GPU": 4}], gpus_per_worker=0.5, cpus_per_worker=1) == 8
    assert count([{"CPU": 16, "GPU": 4}], gpus_per_worker=0.6) == 4, "a share never spans two GPUs"
    assert count([{"CPU": 16, "GPU": 4}], gpus_per_worker=2) == 2
    assert count([{"CPU": 16, "memory": 10 * 2**30}], memory_per_worker=4) == 2
    with pytest.raises(ConfigError, match=r"2 worker\(s\) with 4 CPU\(s\).*2 CPU\(s\), 0 GPU\(s\)"):
        count([{"CPU": 2}], workers_per_trial=2, cpus_per_worker=4)
    with pytest.raises(ConfigError, match=r"64 GiB of memory each; the nodes have .*10 GiB of memory"):
        count([{"CPU": 16, "memory": 10 * 2**30}], memory_per_worker=64)


def test_placement_follows_rules_and_a_cell_gets_no_more_workers_than_it_can_use() -> None:
    grid = parse_grid(
        {
            "base": {"batch_size": 8},
            "grid": [
                {"method": "simplecil"},
                {"optimizer": "fo-sgd"},
                {"optimizer": ["zo-sgd", "forward-grad"], "queries": [1, 8]},
            ],
            "placement": {
                "gpus_per_worker": 0,
                "rules": [
                    {"when": {"optimizer": ["zo-sgd", "forward-grad", "fo-sgd"]}, "set": {"workers_per_trial": 4}},
                    {"when": {"queries": ">= 8"}, "set": {"workers_per_trial": 6, "cpus_per_worker": 2}},
                ],
                "out_of_memory": [{"evaluation_batch": 8}, {"memory_per_worker": 3}],
            },
        }
    )
    cells = {(c.optimizer, c.queries): c for c in grid.cells}
    of = {key: grid.placement.of(config) for key, config in cells.items()}
    assert {key: placement.workers_per_trial for key, placement in of.items()} == {
        (None, None): 1,  # no training: nothing to share
        ("fo-sgd", None): 1,  # one evaluation
        ("zo-sgd", 1): 2,  # both sides of a query
        ("forward-grad", 1): 1,
        ("zo-sgd", 8): 6,
        ("forward-grad", 8): 6,
    }
    assert of["zo-sgd", 8].cpus_per_worker == 2 and of["zo-sgd", 1].cpus_per_worker == 1
    config = cells["zo-sgd", 8]
    tried = [grid.placement.of(config, tries) for tries in range(4)]
    assert [(t.evaluation_batch, t.memory_per_worker) for t in tried] == [(64, None), (8, None), (8, 3), (8, 3)]
    # Slices of a mini-batch give first-order cells something to share.
    sliced = parse_grid(
        {
            "grid": [{"optimizer": ["fo-sgd", "zo-sgd"], "batch_size": 8}],
            "placement": {"workers_per_trial": 6, "data_shards": 3},
        }
    )
    assert [sliced.placement.of(c).workers_per_trial for c in sliced.cells] == [3, 6]
    with pytest.raises(ConfigError, match="data_shards=3: more than the 2 samples"):
        sliced.placement.of(next(iter(parse_grid({"grid": [{"batch_size": 2}]}).cells)))


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_sweep_writes_parquet_and_never_runs_a_cell_twice(tmp_path, sweep_here, monkeypatch) -> None:
    file, out = write(tmp_path / "small.yaml", SMALL_GRID), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        run = sweep_here("sweep", "--grid", file, "--results", "out")  # a relative path, on purpose
    assert run.exit_code == 0, run.output
    assert "5 of 5 cells done" in run.stdout and "[5/5" in run.stdout
    trials = zeroflow.results.load(out, "trials")
    assert sorted(trials["cell_id"].to_pylist()) == sorted(c.cell_id for c in load_grid(file).cells)
    assert zeroflow.results.load(out, "stages").num_rows == 5 * 2
    assert zeroflow.results.load(out, "accuracy").num_rows == 5 * 3
    assert zeroflow.results.load(out, "steps").num_rows == 4 * 4
    assert (out / "report.html").stat().st_size > 100_000

    # A cell's bits do not depend on who ran it: the same cell in this process.
    config = next(c for c in load_grid(file).cells if c.optimizer == "zo-sgd")
    here = zeroflow.run_trial(config)
    row = next(r for r in trials.to_pylist() if r["cell_id"] == config.cell_id)
    assert (row["avg"], row["last"], row["final_loss"]) == tuple(here.summary[k] for k in ("avg", "last", "final_loss"))

    written = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    again = sweep_here("sweep", "--grid", file, "--results", out)
    assert again.exit_code == 0 and "5 done, 0 failed, 0 to run" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == written

    # A value added to the grid runs the new cells only.
    more = sweep_here("sweep", "--grid", file, "--results", out, "--set", "seed=[0,1,2]", "--max-concurrent", "1")
    assert more.exit_code == 0, more.output
    assert "5 done, 0 failed, 2 to run" in more.stdout
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert zeroflow.results.load(out, "trials").num_rows == 7


@pytest.mark.ray
@pytest.mark.slow
def test_a_failed_cell_is_recorded_and_the_rest_goes_on(tmp_path, sweep_here) -> None:
    text = SMALL_GRID.replace("lr: 1e-4, eps: 1e-2", "lr: 1e30")
    file, out = write(tmp_path / "small.yaml", text), tmp_path / "out"
    command = ("sweep", "--grid", file, "--results", out, "--no-report", "--set", "seed=0")
    run = sweep_here(*command)
    assert run.exit_code == 1
    assert "FAILED: NonFiniteLoss" in run.stdout
    grid = load_grid(file, {"seed": 0})
    plan = make_plan(grid, Store(out), None)
    assert len(plan.done) == 2 and [c.optimizer for c in plan.failed] == ["zo-sgd"]
    failure = zeroflow.results.load(out, "failures").to_pylist()[0]
    assert "NonFiniteLoss" in failure["traceback"]

    # Left alone it stays failed; asked for it runs again and fails again, still counted once; also where the clock was set back.
    assert "0 to run" in sweep_here(*command).stdout
    (record,) = (out / "failures").iterdir()
    os.utime(record, (time.time() + 3 * 3600,) * 2)
    again = sweep_here(*command, "--retry-failed")
    assert again.exit_code == 1 and "FAILED: NonFiniteLoss" in again.stdout
    assert zeroflow.results.load(out, "failures").num_rows == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "shards"), [(3, 1), pytest.param(4, 2, marks=pytest.mark.long)])
def test_any_number_of_ray_train_workers_gives_the_bits_of_one(
    workers: int, shards: int, tmp_path, ray_here: None
) -> None:
    file = write(
        tmp_path / "small.yaml",
        "base: {checkpoint: none, image_size: 7, tasks: 20, stop_after: 2, epochs: 1, batch_size: 100, method: aper-adapter, queries: 4}\n"
        "grid: [{optimizer: [zo-sgd-conserve, zo-per-example]}]\n"
        "placement: {gpus_per_worker: 0}\n",
    )
    grid = load_grid(file)
    forced = {"workers_per_trial": workers, "data_shards": shards}
    placement = dataclasses.replace(grid.placement, forced=forced, max_concurrent=1)
    end = run_sweep(grid.cells, Store(tmp_path / "out"), placement)
    assert end.failed == 0 and end.stopped is None, end
    steps = zeroflow.results.load(tmp_path / "out", "steps").sort_by("step").to_pylist()
    rows = {row["cell_id"]: row for row in zeroflow.results.load(tmp_path / "out", "trials").to_pylist()}
    for config in grid.cells:
        here, row = zeroflow.run_trial(config), rows[config.cell_id]
        assert (row["workers"], row["data_shards"]) == (workers, shards)
        assert row["forward_passes"] == here.summary["forward_passes"]
        losses = [step["loss"] for step in steps if step["cell_id"] == row["cell_id"]]
        expected = [step.loss for step in here.steps]
        if shards == 1:
            assert losses == expected and (row["avg"], row["last"]) == (here.summary["avg"], here.summary["last"])
        else:  # slices of a mini-batch change the rounding of its mean, in float32
            assert losses == pytest.approx(expected, rel=1e-4), row["optimizer"]
            assert losses != expected, "nothing was cut"


@pytest.mark.ray
@pytest.mark.slow
def test_a_grid_that_no_node_can_hold_fails_at_once_with_the_numbers(tmp_path, sweep_here) -> None:
    file = write(
        tmp_path / "small.yaml", SMALL_GRID.replace("gpus_per_worker: 0", "gpus_per_worker: 0, cpus_per_worker: 999")
    )
    run = sweep_here("sweep", "--grid", file, "--results", tmp_path / "out")
    assert run.exit_code == 2
    assert "999 CPU(s)" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_the_plan_as_json(tmp_path) -> None:
    file = write(tmp_path / "small.yaml", SMALL_GRID)
    run = CliRunner().invoke(main, ["plan", "--grid", str(file), "--results", str(tmp_path / "o"), "--json"])
    assert run.exit_code == 0, run.output
    assert len(json.loads(run.stdout)["missing"]) == 5
