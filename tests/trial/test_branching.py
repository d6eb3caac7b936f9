"""A cell that changes its settings at a task: the same bits however it gets there, and one id for one meaning."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import assert_same_bits
from places import TESTS

from zeroflow import Placement, TrialConfig, TrialResult, run_trial
from zeroflow.errors import ConfigError
from zeroflow.grid.cost_estimate import Finished
from zeroflow.grid.grid_file import parse_grid
from zeroflow.grid.search_plan import plan_search
from zeroflow.methods.finetune import FineTuning
from zeroflow.optim import GradientBanned
from zeroflow.results import Store, rows

BASE = {
    "tasks": 10,
    "stop_after": 4,
    "epochs": 2,
    "batch_size": 12,
    "method": "finetune",
    "method_options": {"tune": "ssf"},
}


@pytest.fixture
def cell(some_drawings: str, tiny_vit: dict):
    def made(**changes) -> TrialConfig:
        return TrialConfig.from_dict({**tiny_vit, **BASE, "dataset": some_drawings, "optimizer": "zo-sgd", **changes})

    return made


def _steps(result: TrialResult, task: int) -> list[tuple]:
    return [(step.epoch, step.loss, step.lr) for step in result.steps if step.task == task]


@pytest.mark.slow
def test_a_branch_is_its_two_parts(cell) -> None:
    """Before the task it is the one cell to the bit; from it on it trains with the other settings and starts from there."""
    plain, other = cell(), {"optimizer": "fo-adam", "lr": 0.002, "epochs": 3, "batch_size": 6}
    whole, branch = run_trial(plain), run_trial(cell(later={"task": 3, **other}))
    np.testing.assert_array_equal(branch.accuracy_matrix[:2], whole.accuracy_matrix[:2])
    for task in (0, 1):
        assert _steps(branch, task) == _steps(whole, task) and len(_steps(whole, task)) == 4
    for task in (2, 3):
        assert len(_steps(branch, task)) == 3 * 4 and _steps(branch, task)[0][2] == 0.002
    # Two queries a pass of 2 x 4 steps, then one forward pass of 2 x 12; a backward pass counts two more.
    assert branch.summary["forward_passes"] == 2 * 8 + 24
    assert branch.summary["forward_equivalents"] == 2 * 8 + 3 * 24


@pytest.mark.slow
@pytest.mark.parametrize("method", ["replay", "ewc", "ease", "lwf"])
def test_a_branch_from_a_kept_task_has_the_bits_of_one_that_was_trained_whole(
    method: str, cell, tmp_path: Path
) -> None:
    own = {"method": method, "method_options": {}, "lr": 1e-3}
    config = cell(**own, stop_after=5, later={"task": 3, "queries": 3})
    whole = run_trial(config)
    run_trial(cell(**own, stop_after=3), Placement(keep_tasks=True), tasks_folder=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*/*.pt")) == ["1.pt", "2.pt", "3.pt"]
    seen: list[int] = []
    branch = run_trial(config, tasks_folder=tmp_path, on_stage=lambda stage, *_: seen.append(stage))
    assert seen == [2, 3, 4], "the first two tasks were not trained again"
    assert_same_bits(branch, whole)


def test_a_branch_keeps_the_task_that_it_branches_from_for_its_siblings(cell, tmp_path: Path) -> None:
    run_trial(cell(later={"task": 3, "queries": 3}), tasks_folder=tmp_path)
    assert [path.name for path in tmp_path.glob("*/*.pt")] == ["2.pt"]
    seen: list[int] = []
    run_trial(cell(later={"task": 3, "lr": 0.5}), tasks_folder=tmp_path, on_stage=lambda stage, *_: seen.append(stage))
    assert seen == [2, 3]
    seen.clear()
    run_trial(
        cell(seed=1, later={"task": 3, "lr": 0.5}),
        tasks_folder=tmp_path,
        on_stage=lambda stage, *_: seen.append(stage),
    )
    assert seen == [0, 1, 2, 3], "another seed is another stream"


def test_what_is_computed_after_the_branch_is_never_kept_as_the_plain_cells(cell, tmp_path: Path) -> None:
    run_trial(cell(later={"task": 2, "lr": 0.5}), Placement(keep_tasks=True), tasks_folder=tmp_path)
    assert [path.name for path in tmp_path.glob("*/*.pt")] == ["1.pt"]


def test_an_interrupted_branch_goes_on_with_its_own_settings(cell, tmp_path: Path) -> None:
    config = cell(later={"task": 2, "optimizer": "fo-sgd", "lr": 0.01})
    whole = run_trial(config)

    def stop(stage: int, *_: object) -> None:
        if stage == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(config, folder=tmp_path, on_stage=stop)
    assert_same_bits(run_trial(config, folder=tmp_path), whole)


def test_forward_passes_alone_are_held_to_that_before_first_order(cell, monkeypatch) -> None:
    """A mixed cell bans gradients in the tasks that are to do without, whoever asks for them."""

    def cheating(self, batch):
        with torch.enable_grad():
            return float((torch.ones((), requires_grad=True) * 2).detach())

    monkeypatch.setattr(FineTuning, "loss", cheating)
    with pytest.raises(GradientBanned):
        run_trial(cell(later={"task": 2, "optimizer": "fo-sgd"}))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"later": {}}, {}),
        ({"later": {"task": 3}}, {}),
        ({"later": {"task": 3, "queries": 1, "schedule": "cosine"}}, {}),
        ({"later": {"task": 3, "lr": 0.5}}, {"later": {"lr": 0.5, "task": 3, "epochs": 2}}),
        ({"later": {"task": 3, "optimizer": "fo-sgd"}}, {"later": {"task": 3, "optimizer": "fo-sgd", "queries": 7}}),
        ({"later": {"task": 3, "optimizer": "zo-sgd", "lr": 0.5}}, {"later": {"task": 3, "lr": 0.5}}),
        ({"method": "simplecil", "method_options": {}, "later": {"task": 3, "lr": 0.5}}, {"method": "simplecil", "method_options": {}}),
    ],
)  # fmt: skip
def test_what_means_the_same_has_one_id(changes: dict, same: dict, cell) -> None:
    assert cell(**changes).cell_id == cell(**same).cell_id
    again = TrialConfig.from_dict(json.loads(json.dumps(vars(cell(**changes)), default=lambda value: None)) | {})
    assert again.cell_id == cell(**same).cell_id


def test_another_optimizer_brings_its_own_settings(cell) -> None:
    own = cell(
        lr=0.5, eps=0.25, queries=3, optimizer_options={"momentum": 0.5}, later={"task": 2, "optimizer": "fo-adam"}
    )
    usual = cell(optimizer="fo-adam")
    assert (own.at(0).lr, own.at(0).queries, own.at(0).optimizer) == (0.5, 3, "zo-sgd")
    for key in ("optimizer", "lr", "eps", "queries", "optimizer_options"):
        assert getattr(own.at(1), key) == getattr(usual, key), key


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"lr": 1.0}, r"later.task=None: expected 2\.\.4"),
        ({"task": 1, "lr": 1.0}, r"later.task=1: expected 2\.\.4"),
        ({"task": 5, "lr": 1.0}, r"later.task=5: expected 2\.\.4"),
        ({"task": True, "lr": 1.0}, r"later.task=True"),
        ({"task": 2, "learning_rate": 1.0}, "later: unknown key 'learning_rate'"),
        ({"task": 2, "seed": 1}, "later: unknown key 'seed'"),
        ({"task": 2, "optimizer": "zo-sgdd"}, "later: unknown optimizer 'zo-sgdd'; did you mean 'zo-sgd'"),
        ({"task": 2, "lr": "fast"}, "later: lr='fast': expected a number > 0"),
        ({"task": 2, "optimizer_options": {"momentun": 1}}, "later: .*did you mean 'momentum'"),
        ([3], "later=.*expected a mapping"),
    ],
)
def test_a_wrong_branch_is_refused_before_any_work(later, message: str, cell) -> None:
    with pytest.raises(ConfigError, match=message):
        cell(later=later)


def test_a_grid_branches_along_an_axis_and_tells_the_cells_apart(
    tmp_path: Path, tiny_vit: dict, some_drawings: str
) -> None:
    grid = parse_grid(
        {
            "base": {**tiny_vit, **BASE, "dataset": some_drawings, "later": {"task": 3}},
            "grid": [
                {"optimizer": "zo-sgd", "later.optimizer": ["zo-sgd", "zo-adam", "fo-adam"], "later.lr": [0.01, 0.02]}
            ],
            "placement": {"keep_tasks": True},
        }
    )
    assert len(grid.cells) == 6 and all(grid.placement.of(config).keep_tasks for config in grid.cells)
    store = Store(tmp_path)
    for config in grid.cells[:2]:
        store.write(rows.tables(run_trial(config)))
    kept = store.load("trials").to_pylist()
    assert {json.loads(row["later"])["lr"] for row in kept} == {0.01, 0.02}
    from zeroflow.results.summary import summary

    names = [row.label for row in summary(store.load("trials"))]
    assert sorted(names) == ["finetune zo-sgd from task 3: lr=0.01", "finetune zo-sgd from task 3: lr=0.02"]


@pytest.mark.slow
def test_what_a_branch_will_cost_is_known_from_finished_cells(cell, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(rows.tables(run_trial(cell())))
    finished = Finished(store.load("trials"))
    branch = cell(later={"task": 3, "queries": 4})
    assert finished.forward_passes(vars(branch)) == run_trial(branch).summary["forward_passes"]


def test_a_search_chooses_for_the_first_tasks_settings(
    cell, tmp_path: Path, tiny_vit: dict, some_drawings: str
) -> None:
    """A try runs the first task alone, where a branch and the cell it leaves are one."""
    grid = parse_grid(
        {
            "base": {**tiny_vit, **BASE, "dataset": some_drawings, "optimizer": "zo-sgd"},
            "grid": [{"later": [{}, {"task": 3, "queries": 4}]}],
            "search": {"forward_passes": 100000, "lr": [0.001, 0.01]},
        }
    )
    (search,) = plan_search(grid, None).searches
    assert len(search.cells) == 2 and not any(candidate.cells[0].later for candidate in search.candidates)


@pytest.mark.ray
def test_a_sweep_goes_on_from_the_tasks_that_another_has_kept(tmp_path: Path, sweep_here) -> None:
    """And what it writes is what a cell trained whole has."""
    base = {"tasks": 50, "stop_after": 3, "validation": 0.9, "epochs": 1, "method": "finetune", "optimizer": "zo-sgd"}
    place = {"max_concurrent": 1, "keep_tasks": True}

    def sweep(grid: dict) -> None:
        file = tmp_path / "grid.yaml"
        file.write_text(json.dumps({"base": base, "grid": [grid], "placement": place}))
        run = sweep_here("sweep", "--grid", file, "--results", tmp_path / "results")
        assert run.exit_code == 0, run.output

    sweep({"seed": 0})
    kept = sorted((tmp_path / "results" / "tasks").glob("*/*/*.pt"))
    assert [path.name for path in kept] == ["1.pt", "2.pt", "3.pt"]
    sweep({"later": [{"task": 3, "queries": 3}]})
    assert sorted((tmp_path / "results" / "tasks").glob("*/*/*.pt")) == kept
    config = TrialConfig.from_dict({**base, "later": {"task": 3, "queries": 3}})
    found = Store(tmp_path / "results").load("accuracy").to_pylist()
    whole = rows.tables(run_trial(config))["accuracy"].to_pylist()
    assert [row for row in found if row["cell_id"] == config.cell_id] == whole


def test_naming_the_optimizer_that_is_in_use_already_changes_nothing_of_it(cell) -> None:
    """So that it can be one of the values of an axis."""
    own = {"lr": 0.5, "eps": 0.25, "queries": 3, "optimizer_options": {"momentum": 0.5}}
    same = cell(**own, later={"task": 2, "optimizer": "zo-sgd", "epochs": 5})
    assert same.cell_id == cell(**own, later={"task": 2, "epochs": 5}).cell_id
    assert cell(**own, later={"task": 2, "optimizer": "zo-sgd"}).cell_id == cell(**own).cell_id


def test_every_step_says_how_many_queries_it_had(cell) -> None:
    for first, later, wanted in (("zo-sgd", {"queries": 4}, (1, 4)), ("fo-sgd", {"optimizer": "zo-sgd"}, (None, 1))):
        result = run_trial(cell(optimizer=first, stop_after=2, later={"task": 2, **later}))
        steps = rows.tables(result)["steps"].to_pylist()
        assert [{step["queries"] for step in steps if step["task"] == task} for task in (0, 1)] == [{q} for q in wanted]


def _folder(root: Path, classes: int, images: int, first: int = 0) -> None:
    from PIL import Image

    shutil.rmtree(root, ignore_errors=True)
    for part, count in (("train", images), ("test", 3)):
        for label in range(classes):
            (root / part / f"class{label}").mkdir(parents=True)
            for number in range(count):
                colour = (40 * label + first, 9 * number, 200 * (part == "train"))
                Image.new("RGB", (14, 14), colour).save(root / part / f"class{label}" / f"{number}.png")


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["images", "more images", "more classes"])
def test_tasks_that_were_kept_with_other_data_are_not_gone_on_with(
    changed: str, tiny_vit: dict, tmp_path: Path
) -> None:
    """Neither is an interrupted cell: its number would be of two data sets."""
    data = tmp_path / "data" / "own"
    place = Placement(str(tmp_path / "data"))

    def made(**later) -> TrialConfig:
        own = {"dataset": "folder:own", "tasks": 2, "stop_after": None, "lr": 0.1}
        return TrialConfig.from_dict({**tiny_vit, **BASE, "optimizer": "zo-sgd", **own, "later": {"task": 2, **later}})

    def stop(stage: int, *_: object) -> None:
        raise KeyboardInterrupt

    _folder(data, 4, 4)
    run_trial(made(lr=0.2), place, tasks_folder=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        run_trial(made(lr=0.3), place, folder=tmp_path / "unfinished", on_stage=stop)
    sizes = {"images": (4, 4, 7), "more images": (4, 5, 0), "more classes": (6, 4, 0)}
    _folder(data, *sizes[changed])
    whole = run_trial(made(lr=0.3), place)
    assert_same_bits(run_trial(made(lr=0.3), place, tasks_folder=tmp_path / "kept"), whole)
    assert_same_bits(run_trial(made(lr=0.3), place, folder=tmp_path / "unfinished"), whole)


OWN = """
from zeroflow.methods.finetune import FineTuning
from zeroflow.methods.method import register_method

@register_method("my-scaled", "finetune with a loss of its own")
class Scaled(FineTuning):
    def losses(self, inputs):
        return {factor} * super().losses(inputs)
"""

PROCESS_OF_EACH = """
import json, os, pathlib, sys
import conftest, zeroflow, zeroflow.methods.finetune, zeroflow.trial.trial

folder = pathlib.Path(sys.argv[1])
conftest.some_drawings.__wrapped__(), conftest.tiny_vit.__wrapped__()
config, versions = json.loads((folder / "versions.json").read_text())
for text, kept in versions:
    (folder / "mine.py").write_text(text)
    if not os.fork():
        zeroflow.import_file(folder / "mine.py")
        result = zeroflow.run_trial(zeroflow.TrialConfig.from_dict(config), tasks_folder=folder / "kept" if kept else None)
        print(json.dumps([step.loss for step in result.steps]), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
"""Forked from one that has imported all but the file."""


@pytest.mark.slow
def test_tasks_that_other_code_of_ones_own_trained_are_not_gone_on_with(tiny_vit: dict, tmp_path: Path) -> None:
    """In a process of each version, as people work: the file is changed, and the script is started again."""
    own = {
        **tiny_vit,
        **BASE,
        "dataset": "some-drawings",
        "method": "my-scaled",
        "method_options": {},
        "optimizer": "fo-sgd",
        "lr": 0.1,
        "stop_after": 2,
    }
    config = {**own, "later": {"task": 2, "lr": 0.2}}
    versions = [(OWN.format(factor=factor), kept) for factor, kept in ((1.0, True), (0.5, True), (0.5, False))]
    (tmp_path / "versions.json").write_text(json.dumps([config, versions]))
    run = subprocess.run(
        [sys.executable, "-c", PROCESS_OF_EACH, str(tmp_path)], capture_output=True, text=True, cwd=TESTS, timeout=200
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert found[1] == found[2] != found[0]


@pytest.mark.slow
def test_a_kept_task_of_equal_tasks_is_no_beginning_of_unequal_ones(cell, tmp_path: Path) -> None:
    """The same classes up to there; of one of them the domain-incremental accuracy has no meaning."""
    own = {"tasks": 3, "increments": [2, 2, 16]}
    run_trial(cell(**own, stop_after=None, later={"task": 2, "lr": 0.3}), tasks_folder=tmp_path)
    config = cell(**own, stop_after=2, later={"task": 2, "lr": 0.2})
    assert_same_bits(run_trial(config, tasks_folder=tmp_path), run_trial(config))


def test_a_mini_batch_too_small_for_the_loss_is_refused_after_a_branch_too(
    cell, tiny_vit: dict, tmp_path: Path
) -> None:
    own = {"loss": "class-means", "method_options": {"tune": "full"}, "batch_size": 8}
    with pytest.raises(ConfigError, match=r"batch_size=2: loss='class-means' .* expected at least 4"):
        cell(**own, later={"task": 2, "batch_size": 2})
    unequal = {"tasks": 3, "increments": [4, 8, 8], "stop_after": None}
    with pytest.raises(ConfigError, match=r"batch_size=8: .* expected at least 16"):
        cell(**own, **unequal, later={"task": 2, "lr": 0.1})
    assert cell(**own, **unequal, later={"task": 2, "batch_size": 16}).at(1).batch_size == 16
    _folder(tmp_path / "own", 4, 4)
    values = {**tiny_vit, **BASE, **own, "optimizer": "zo-sgd", "dataset": "folder:own", "tasks": 2, "stop_after": None}
    config = TrialConfig.from_dict({**values, "later": {"task": 2, "batch_size": 2}})
    with pytest.raises(ConfigError, match=r"batch_size=2: loss='class-means' .* expected at least 4"):
        run_trial(config, Placement(str(tmp_path)))
