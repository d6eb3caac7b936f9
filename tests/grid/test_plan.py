"""Plans and their estimates, against numbers worked out by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from places import ROOT

from zeroflow.cli import main
from zeroflow.grid.cell_placement import CellPlacement
from zeroflow.grid.cost_estimate import CostEstimate, estimate_costs
from zeroflow.grid.grid_file import load_grid, parse_grid
from zeroflow.grid.plan import make_plan
from zeroflow.results import Store
from zeroflow.results.rows import failure, tables
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import TrialResult

ZO = {"optimizer": "zo-sgd"}  # ease on quickdraw100 in ten tasks, ten epochs, batches of 48


def finish(
    store: Store,
    values: dict[str, Any],
    fixed: float = 10.0,
    training: float | None = 40.0,
    passes: int = 2000,
    workers: int = 1,
    device: str = "cpu (x86_64)",
) -> None:
    """Write a cell that took ``fixed + training`` seconds; by default 1000 steps with two forward passes each."""
    result = TrialResult(
        config=TrialConfig.from_dict(values),
        accuracy_matrix=np.array([[50.0]]),
        task_incremental=np.array([[50.0]]),
        domain_incremental=np.array([[50.0]]),
        test_samples=np.array([10]),
        task_classes=np.array([2]),
        class_order=np.arange(2),
        class_names=["cat", "dog"],
        steps=[],
        probes=[],
        costs={"forward_passes": passes, "seconds": fixed + (training or 0.0), "training_seconds": training},
        provenance={"device": device, "finished_at": datetime.now(UTC)},
    )
    store.write(tables(result, workers=workers))


def of(store: Store, values: dict[str, Any], **placement: Any) -> CostEstimate:
    """The estimate of one cell."""
    place = CellPlacement(**placement)
    return estimate_costs([TrialConfig.from_dict(values)], store.load("trials"), lambda config: place)


# Estimates of cells


@pytest.mark.parametrize(
    ("change", "seconds", "passes"),
    [
        ({"seed": 1, "lr": 0.5}, 50, 2000),  # the same work
        ({"epochs": 20}, 10 + 80, 4000),
        ({"queries": 4}, 10 + 160, 8000),
        ({"optimizer": "zo-sgd-conserve"}, 10 + 100, 5000),  # five passes a step
        ({"optimizer": "fo-sgd"}, 10 + 60, 1000),  # one pass, but the work of three
        ({"hybrid_epochs": 5}, 10 + 50, 1500),  # (5 * 2 + 5 * 3) / 20 of the work
        ({"batch_size": 24}, 50, 4000),
        ({"validation": 0.5}, 10 + 20, 1000),
    ],
)
def test_seconds_and_passes_scale_with_the_work(
    store: Store, change: dict[str, Any], seconds: float, passes: int
) -> None:
    finish(store, ZO)
    found = of(store, ZO | change)
    assert (found.seconds, found.forward_passes) == (pytest.approx(seconds), passes)


@pytest.mark.parametrize(
    "values",
    [
        ZO | {"queries": 8, "hybrid_epochs": 3, "validation": 0.1},
        {"optimizer": "zo-svrg", "optimizer_options": {"snapshot_every": 7}},
        {"optimizer": "fo-adam", "method_options": {"bottleneck": 8}},
        {"method": "simplecil"},
    ],
)
def test_a_cell_like_a_finished_one_costs_the_same(store: Store, values: dict[str, Any]) -> None:
    untrained = values.get("method") == "simplecil"
    finish(store, values, 7.0, 0.0 if untrained else 33.3, 0 if untrained else 12_345)
    found = of(store, values | {"seed": 5})
    assert (found.seconds, found.forward_passes) == (
        pytest.approx(7.0 if untrained else 40.3),
        0 if untrained else 12_345,
    )


def test_the_most_similar_cells_are_asked(store: Store) -> None:
    finish(store, ZO | {"seed": 0}, 10, 40)
    finish(store, ZO | {"seed": 1}, 20, 60)
    finish(store, ZO | {"epochs": 20}, 0, 1000, 4000)
    finish(store, {"optimizer": "zo-adam"}, 0, 4000)
    assert of(store, ZO | {"seed": 2}).seconds == pytest.approx(15 + 50)
    # Of other epochs: the mean over all three of zo-sgd, 2, 3 and 25 seconds a unit, 10 seconds fixed.
    assert of(store, ZO | {"epochs": 5}).seconds == pytest.approx(10 + 10 * (2 + 3 + 25) / 3)


def test_without_a_like_cell_there_is_no_estimate(store: Store) -> None:
    assert of(store, ZO).seconds is None
    finish(store, ZO)
    for other in (
        {"method": "aper-adapter"},
        {"tasks": 5},
        {"dataset": "quickdraw100-marker"},
        {"image_size": 56},
        {"base_classes": 10, "tasks": 6},
        {"base_classes": 19},
        {"increments": [10] * 8 + [5, 15]},
        {"stop_after": 3},
    ):
        found = of(store, ZO | other)
        assert (found.seconds, found.forward_passes, found.without_basis) == (None, 0, 1), other


def test_streams_of_unequal_tasks_are_estimated_from_their_own_kind(store: Store) -> None:
    finish(store, ZO)
    finish(store, ZO | {"increments": [10, 10, 80]}, 1, 2, 700)
    finish(store, ZO | {"base_classes": 50, "tasks": 6}, 3, 4, 900)
    finish(store, ZO | {"increments": [10, 10, 80], "stop_after": 2}, 5, 6, 200)
    for stream, seconds, passes in (
        ({}, 50, 2000),
        ({"increments": [10, 10, 80]}, 3, 700),
        ({"increments": [50, 10, 10, 10, 10, 10]}, 7, 900),
        ({"increments": [10, 10, 80], "stop_after": 2}, 11, 200),
    ):
        found = of(store, ZO | stream | {"seed": 1})
        assert (found.seconds, found.forward_passes) == (pytest.approx(seconds), passes), stream
        assert of(store, ZO | stream | {"epochs": 20}).forward_passes == 2 * passes


def test_an_optimizer_beyond_its_formula_counts_for_itself_alone(store: Store) -> None:
    finish(store, {"optimizer": "zo-svrg"}, passes=5000)  # 4000 by the formula, and snapshots
    finish(store, ZO)
    assert of(store, {"optimizer": "zo-svrg", "epochs": 20}).forward_passes == 10_000
    assert of(store, {"optimizer": "zo-adam"}).forward_passes == 2000


@pytest.mark.parametrize(
    "exact", [{"optimizer_options": {"hybrid": 200}}, {"later": {"task": 2, "optimizer_options": {"hybrid": 200}}}]
)
def test_steps_with_the_exact_gradient_say_nothing_about_cells_without(store: Store, exact: dict[str, Any]) -> None:
    """Such a cell makes fewer passes than its formula, and another number of seconds for each of them."""
    finish(store, ZO | exact, 10, 400, 1800)
    alone = of(store, ZO)  # better than nothing, and said to be an estimate
    assert alone.seconds is not None and alone.forward_passes == 1800 and not alone.exact_passes
    finish(store, ZO)
    for other, seconds, passes in (
        ({"seed": 1}, 50, 2000),
        ({"class_order_seed": 3}, 50, 2000),
        ({"queries": 4}, 10 + 160, 8000),
        ({"optimizer": "zo-sgd-conserve"}, 10 + 100, 5000),
        ({"optimizer": "fo-sgd"}, 10 + 60, 1000),
        ({"optimizer_options": {"momentum": 0.5}}, 50, 2000),
    ):
        found = of(store, ZO | other)
        assert (found.seconds, found.forward_passes) == (pytest.approx(seconds), passes), other
    own = of(store, ZO | exact | {"seed": 1})
    assert (own.seconds, own.forward_passes, own.exact_passes) == (pytest.approx(410), 1800, True)


def test_workers_share_the_forward_passes_of_a_step(store: Store) -> None:
    finish(store, ZO | {"queries": 4}, 10, 40, 8000, workers=4)  # two of eight passes each
    assert of(store, ZO | {"queries": 4}, workers_per_trial=4).seconds == pytest.approx(50)
    alone, five = of(store, ZO | {"queries": 4}), of(store, ZO | {"queries": 4}, workers_per_trial=5)
    assert (alone.seconds, alone.worker_seconds) == (pytest.approx(170), pytest.approx(170))
    assert (five.seconds, five.worker_seconds) == (pytest.approx(50), pytest.approx(250)), "someone still has two"
    assert of(store, {"optimizer": "fo-sgd"}, workers_per_trial=4).seconds == of(store, {"optimizer": "fo-sgd"}).seconds


@pytest.mark.parametrize("unknown", [None, 0.0])
def test_where_no_step_was_timed_all_of_a_cell_may_be_training(store: Store, unknown: float | None) -> None:
    finish(store, ZO | {"epochs": 2}, 30, unknown)
    assert of(store, ZO | {"epochs": 2, "seed": 1}).seconds == pytest.approx(30)
    assert of(store, ZO | {"epochs": 20}).seconds == pytest.approx(300)


def test_a_cell_that_trained_for_longer_than_it_took_tells_of_its_passes_alone(store: Store) -> None:
    """Earlier versions lost the time before an interruption."""
    finish(store, ZO, -20, 30)
    assert of(store, ZO | {"seed": 1}).seconds is None
    finish(store, ZO | {"queries": 2}, 10, 30, 4000)
    found = of(store, ZO | {"seed": 1})
    assert found.seconds == pytest.approx(10 + 15) and found.forward_passes == 2000 and found.exact_passes


# Their errors


def test_errors_are_those_of_leaving_one_out(store: Store) -> None:
    for seed, training in enumerate([30, 40, 50]):
        finish(store, ZO | {"seed": seed}, 10, training)
    error = of(store, ZO | {"seed": 3}).error
    # 55 for 40, 50 for 50, 45 for 60.
    assert error is not None and error.cells == 3
    assert (error.median, error.ninth_decile) == (pytest.approx(0.25), pytest.approx(0.25 + 0.8 * 0.125))


def test_every_earlier_cell_counts_once_in_the_errors(store: Store) -> None:
    """Of cells that are estimated from their own kind and others from all kinds together."""
    for seed, training in enumerate([30, 40, 50]):
        finish(store, ZO | {"seed": seed}, 10, training)
    wanted = [TrialConfig.from_dict(ZO | change) for change in ({"seed": 3}, {"queries": 16})]
    alone, both = (
        estimate_costs(cells, store.load("trials"), lambda config: CellPlacement()).error
        for cells in (wanted[:1], wanted)
    )
    assert alone == both and alone is not None and alone.cells == 3


def test_errors_scale_by_work_and_leave_out_what_has_no_like(store: Store) -> None:
    finish(store, {"method": "simplecil"}, 5, 0, 0)
    assert of(store, {"method": "simplecil", "seed": 1}).error is None
    finish(store, ZO, 10, 40)
    finish(store, ZO | {"queries": 2}, 20, 100)
    error = of(store, ZO | {"queries": 3}).error
    # 20 + 100 / 2 = 70 for 50, and 10 + 2 * 40 = 90 for 120.
    assert error is not None and error.cells == 2
    assert error.median == pytest.approx((70 / 50 - 1 + 1 - 90 / 120) / 2)


def test_cells_of_other_kinds_say_nothing_about_an_estimate(store: Store) -> None:
    finish(store, ZO, 10, 90)
    finish(store, ZO | {"seed": 1}, 10, 1990)
    for seed in range(40):
        finish(store, {"method": "ranpac", "seed": seed}, 3, 0, 0)
    error = of(store, ZO | {"seed": 2}).error
    assert error is not None and error.cells == 2 and error.median == pytest.approx((19 + 0.95) / 2)


def test_an_estimate_from_other_kinds_has_the_error_of_such_estimates(store: Store) -> None:
    """Seeds of one optimizer are alike; a new one is estimated from the others, which are far apart."""
    for seed in range(3):
        finish(store, {"optimizer": "zo-adam", "seed": seed}, 0, 100)
        finish(store, {"optimizer": "zo-sgd", "seed": seed}, 0, 200)
    error = of(store, {"optimizer": "zo-sgd-sign"}).error
    assert error is not None and error.cells == 6 and error.median == pytest.approx((1.0 + 0.5) / 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.5, "eps": 0.1}, " 2,000"),
        ({"queries": 4}, "about 8,000"),
        ({"method_options": {"bottleneck": 8}}, "about 2,000"),
    ],
)
def test_forward_passes_that_are_an_estimate_are_said_to_be_one(
    store: Store, change: dict[str, Any], said: str
) -> None:
    finish(store, ZO)
    assert f"{said} forward passes" in of(store, ZO | {"seed": 1} | change).describe()


# Plans


MIXED = {"name": "mixed", "grid": [{**ZO, "seed": [0, 1, 2]}, {"method": "simplecil"}]}


def test_cells_without_basis_are_counted_and_the_rest_is_estimated(store: Store) -> None:
    empty = make_plan(parse_grid(MIXED), store, None)
    assert empty.seconds is None and "estimate: none yet" in empty.describe(None)
    finish(store, ZO)
    plan = make_plan(parse_grid(MIXED), store, None)
    assert (len(plan.done), len(plan.missing), plan.seconds) == (1, 3, 100.0)
    assert (plan.estimate.cells, plan.estimate.without_basis, plan.estimate.error) == (2, 1, None)
    line = plan.describe(None).splitlines()[-1]
    assert line == (
        "estimate from earlier cells: 0.03 hours of one cell at a time, 4,000 forward passes, "
        "without 1 of 3 cells that are like no finished one"
    )
    finish(store, ZO | {"seed": 1})
    finish(store, ZO | {"seed": 2}, 10, 50)
    finish(store, {"method": "simplecil"}, 5, 0, 0)
    assert make_plan(parse_grid(MIXED), store, None).estimate == CostEstimate(0.0, 0.0, 0, True, 0.0, 0.0, 0, 0, None)
    more = make_plan(parse_grid(MIXED, {"seed": 3}), store, None)
    # 55 for 50 twice, 50 for 60.
    assert more.describe(None).endswith(
        "; the hours of earlier cells like these would have been off by 10 % in the median (90 % of them by less than 15 %, 3 cells)"
    )


def test_what_hours_cost(store: Store) -> None:
    finish(store, ZO, 0, 3600)
    cpus = of(store, ZO, cpus_per_worker=4, workers_per_trial=2)
    assert (cpus.seconds, cpus.gpu_hours, cpus.cpu_hours) == (1800, 0.0, 4.0)
    gpus = of(store, ZO, gpus_per_worker=0.25, cpus_per_worker=4)
    assert (gpus.gpu_hours, gpus.cpu_hours, gpus.cost(2.0)) == (0.25, 0.0, 0.5)
    finish(store, ZO | {"seed": 1}, 0, 3600, device="NVIDIA H100 80GB HBM3")
    assert of(store, ZO).gpu_hours == 1.0 and of(store, ZO, gpus_per_worker=0).cpu_hours == 1.0
    assert "1.00 hours of one cell at a time, 2,000 forward passes, 3.50 for 1.00 GPU-hours at 3.5" in of(
        store, ZO
    ).describe(3.5)


def test_the_command_prints_the_cost_and_the_json_all_of_it(store: Store, tmp_path: Path) -> None:
    finish(store, ZO, 0, 3600)
    grid = tmp_path / "mixed.yaml"
    grid.write_text(json.dumps(MIXED))
    command = ["plan", "--grid", str(grid), "--results", store.root, "--price-per-hour", "1.5"]
    assert "3.00 for 2.00 CPU-hours at 1.5" in CliRunner().invoke(main, command).output
    found = json.loads(CliRunner().invoke(main, [*command, "--json"]).output)
    assert found.keys() == {"done", "failed", "missing", "unavailable", "seconds", "estimate"}
    assert found["seconds"] == 7200 and len(found["missing"]) == 3
    assert found["estimate"] == {
        "seconds": 7200,
        "worker_seconds": 7200,
        "forward_passes": 4000,
        "exact_passes": True,
        "gpu_hours": 0,
        "cpu_hours": 2,
        "cells": 2,
        "without_basis": 1,
        "error": None,
        "price_per_hour": 1.5,
        "cost": 3.0,
    }
    assert CliRunner().invoke(main, [*command, "--price-per-hour", "-1"]).exit_code == 2


def test_failed_cells_that_run_again_and_workers_of_the_command_line_are_in_the_estimate(
    store: Store, tmp_path: Path
) -> None:
    finish(store, ZO | {"queries": 4}, 0, 3600, 100)
    grid = tmp_path / "failed.yaml"
    grid.write_text(json.dumps({"grid": [{**ZO, "queries": 4, "seed": [0, 1, 2, 3]}]}))
    for seed in (1, 2):
        store.write_failure(failure(TrialConfig.from_dict(ZO | {"queries": 4, "seed": seed}), "X", "boom", "", 1))
    command = ["sweep", "--grid", str(grid), "--results", store.root, "--dry-run"]
    assert "1.00 hours of one cell at a time, 100 forward" in CliRunner().invoke(main, command).output
    again = CliRunner().invoke(main, [*command, "--retry-failed", "--workers-per-trial", "4"]).output
    assert "workers a cell: 3 cells on 4\n" in again and "0.75 hours of one cell at a time, 300 forward" in again


# Ids


@pytest.mark.slow
def test_ids_are_those_of_the_committed_results() -> None:
    rows = 0
    for folder in sorted((ROOT / "results").glob("*/trials")):
        for row in Store(folder.parent).load("trials").to_pylist():
            assert TrialConfig(**json.loads(row["config"])).cell_id == row["cell_id"], (folder, row["config"])
            rows += 1
    assert rows > 100
    for name in ("quick", "adapters", "optimizers"):
        cells = load_grid(ROOT / "sweeps" / f"{name}.yaml").cells
        assert {config.cell_id for config in cells} == Store(ROOT / "results" / name).done()


def test_an_id_once_asked_for_is_no_part_of_a_configuration() -> None:
    asked, fresh = (TrialConfig.from_dict(ZO) for _ in range(2))
    kept = asked.cell_id
    assert asked == fresh and repr(asked) == repr(fresh) and dataclasses.asdict(asked) == dataclasses.asdict(fresh)
    assert dataclasses.replace(asked, seed=1).cell_id == TrialConfig.from_dict(ZO | {"seed": 1}).cell_id != kept
    assert pickle.loads(pickle.dumps(asked)).cell_id == copy.copy(asked).cell_id == fresh.cell_id == kept
