"""Runs on landscapes of two losses: known minima, real paths, the plane, what is stored, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from zeroflow import Placement
from zeroflow.cli import main
from zeroflow.data import ArraySamples, load_dataset
from zeroflow.errors import ConfigError
from zeroflow.models.factory import create_backbone
from zeroflow.results import Store, figures, load, merge, rows
from zeroflow.studies.landscapes import Adapter, Run, TwoParameters
from zeroflow.studies.trajectories import NINE, Study, adapter_study, study
from zeroflow.trial.config import TrialConfig

pytestmark = pytest.mark.slow  # studies of hundreds of steps

SMALL = {
    "dataset": "some-drawings", "transform": "plain", "image_size": 14, "tasks": 2, "batch_size": 24, "epochs": 2,
    "method": "finetune", "method_options": {"bottleneck": 4, "scale": 1.0, "dropout": 0.0},
}  # fmt: skip


def cells(*names: str, **changed: object) -> list[TrialConfig]:
    return [TrialConfig.from_dict({**SMALL, "optimizer": name, "lr": 0.2, **changed}) for name in names]


def test_the_minima_of_two_parameters_are_where_they_are_said_to_be() -> None:
    landscape = TwoParameters()
    rng = np.random.default_rng(0)
    for task, name in enumerate(("old optimum", "new optimum")):
        landscape.put(landscape.marks[name])
        here = landscape.point()
        assert (here.loss_old, here.loss_new)[task] == 0
        for x, y in rng.uniform(-4, 4, (200, 2)):
            there = landscape.at(x, y)
            assert (there.loss_old, there.loss_new)[task] > 0
    landscape.put(landscape.marks["balance"])
    least = sum(landscape.losses())
    assert all(sum(landscape.losses()) > least for x, y in rng.uniform(-4, 4, (200, 2)) if landscape.at(x, y))


@pytest.mark.slow
def test_backpropagation_and_forward_passes_learn_one_task_forget_it_for_the_next_and_balance_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TwoParameters, "side", 3)
    found = study(TwoParameters(), NINE)
    ends = {}
    for run, objective, task, _, point in found.looks:
        ends[run.optimizer, run.queries, objective, task] = point
    for run in NINE:
        old = ends[run.optimizer, run.queries, "old-then-new", 0]
        new = ends[run.optimizer, run.queries, "old-then-new", 1]
        both = ends[run.optimizer, run.queries, "both", None]
        assert old.loss_old < 1 < old.loss_new, run
        assert new.loss_new < 0.7 and new.loss_old > 2, run
        assert both.loss_old + both.loss_new < 2.9, run
    exact = ends["fo-adam", None, "old-then-new", 1]
    assert (exact.x, exact.y) == (pytest.approx(2, abs=0.01), pytest.approx(0, abs=0.01))
    assert len({point for *_, point in found.looks}) > len(NINE) * 100, "paths of different optimizers are different"


@pytest.mark.slow
def test_a_path_of_gradient_descent_is_that_of_an_independent_one() -> None:
    """Plain arithmetic with derivatives taken by hand."""
    found = study(TwoParameters(), [Run("fo-sgd", 0.05)])
    x, y, path = -0.5, -2.0, []
    for step in range(400):
        path.append((x, y))
        bent, away = y - 1 + x * x / 4, x - (-2.0, 2.0)[step // 200]
        root = np.sqrt(1 + away**2 + 9 * bent**2)
        x, y = x - 0.05 * (away + 9 * bent * x / 2) / root, y - 0.05 * 9 * bent / root
    path.append((x, y))
    seen = {step: point for _, objective, _, step, point in found.looks if objective == "old-then-new"}
    assert [*seen] == [*range(0, 400, 2), 400]
    np.testing.assert_allclose([(p.x, p.y) for p in seen.values()], [path[step] for step in seen], atol=1e-12)


@pytest.fixture(scope="module")
def adapter(some_drawings: str) -> Iterator[Study]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adapter, "side", 3)
        patch.setattr(Adapter, "patience", 3)
        yield adapter_study(cells("fo-sgd", "zo-sgd", epochs=1, batch_size=60), Placement(device="cpu"))


@pytest.mark.slow
def test_an_adapter_is_shown_on_the_plane_through_the_start_and_both_optima(adapter: Study) -> None:
    start, old, new = (adapter.marks[name] for name in ("start", "old optimum", "new optimum"))
    assert (start.x, start.y, start.distance) == (0, 0, 0)
    assert old.x > 0 and old.y == pytest.approx(0, abs=1e-5) and new.y > 0
    assert max(old.distance, new.distance) < 1e-4 * old.x, "they span the plane"
    assert old.loss_old < start.loss_old and new.loss_new < start.loss_new
    assert old.loss_old < new.loss_old and new.loss_new < old.loss_new, "each is the best for its own task"
    assert {round(p.x, 9) for p in adapter.surface} == {round(p.x, 9) for p in adapter.surface[: Adapter.side]}
    xs, ys = ([getattr(p, axis) for p in adapter.surface] for axis in "xy")
    for point in (*(look[-1] for look in adapter.looks), *adapter.marks.values()):
        assert min(xs) < point.x < max(xs) and min(ys) < point.y < max(ys), "the surface is around all that was seen"


def test_paths_on_an_adapter_start_together_and_leave_the_plane(adapter: Study) -> None:
    firsts = [point for _, _, _, step, point in adapter.looks if step == 0]
    assert len(firsts) == 4 and {(p.x, p.y, p.distance) for p in firsts} == {(0, 0, 0)}
    ends = {(run.optimizer, objective): point for run, objective, _, _, point in adapter.looks}
    assert all(end.distance > 0 for end in ends.values())
    sequence = [look for look in adapter.looks if look[0].optimizer == "fo-sgd" and look[1] == "old-then-new"]
    learned = next(point for _, _, task, _, point in sequence if task == 1)
    assert learned.loss_old < firsts[0].loss_old
    assert ends["fo-sgd", "old-then-new"].loss_new < learned.loss_new
    assert ends["fo-sgd", "both"].loss_old + ends["fo-sgd", "both"].loss_new < firsts[0].loss_old + firsts[0].loss_new


@pytest.mark.slow
def test_the_losses_at_the_start_are_those_of_class_means(adapter: Study, some_drawings: str) -> None:
    """Computed anew from the backbone: an adapter at its start changes no feature."""
    data, backbone = load_dataset(some_drawings), create_backbone("quickdraw_vit", image_size=14).eval()
    assert isinstance(data.train, ArraySamples)
    order = np.random.RandomState(1993).permutation(20)
    smaller = F.interpolate(data.train.pixels.float() / 255, (14, 14), mode="bilinear", antialias=True)
    with torch.no_grad():
        by_class = [backbone(smaller[data.train.labels == label].expand(-1, 3, -1, -1)) for label in order]
    features = F.normalize(torch.stack(by_class), dim=2)
    means = F.normalize(torch.stack(by_class).mean(1), dim=1)
    losses = F.cross_entropy(
        10 * (features @ means.T).reshape(240, 20), torch.arange(20).repeat_interleave(12), reduction="none"
    )
    chosen = np.unique(np.linspace(0, 119, 100).astype(int))
    start = adapter.marks["start"]
    assert start.loss_old == pytest.approx(float(losses[:120][chosen].mean()), abs=1e-5)
    assert start.loss_new == pytest.approx(float(losses[120:][chosen].mean()), abs=1e-5)


def test_what_is_stored_is_what_was_seen_and_merges(adapter: Study, tmp_path: Path) -> None:
    Store(tmp_path / "a").write_landscape(*rows.landscape(adapter))
    assert merge(tmp_path / "b", tmp_path / "a") == 0
    for folder in ("a", "b"):
        looks, surface = (load(tmp_path / folder, name).to_pylist() for name in ("trajectories", "surfaces"))
        assert [(row["optimizer"], row["objective"], row["step"], row["x"]) for row in looks] == [
            (run.optimizer, objective, step, point.x) for run, objective, _, step, point in adapter.looks
        ]
        assert [row["point"] for row in surface[-3:]] == ["start", "old optimum", "new optimum"]
        assert json.loads(surface[0]["config"])["patience"] == Adapter.patience
        assert {row["landscape_id"] for row in (*looks, *surface)} == {adapter.landscape_id}


@pytest.mark.slow
def test_the_same_study_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwoParameters, "steps", 20)
    monkeypatch.setattr(TwoParameters, "side", 3)
    runs = [Run("zo-adam", 0.1, 1e-3, 2), Run("forward-grad", 0.05, None, 1)]
    assert study(TwoParameters(), runs).looks == study(TwoParameters(), runs).looks


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("base: {method: ease}\ngrid: [{optimizer: fo-sgd}]", "method='ease'.*expected 'finetune'"),
        ("base: {method: finetune}\ngrid: [{optimizer: zo-sgd}]", "a first-order optimizer"),
        (
            "base: {method: finetune}\ngrid: [{optimizer: fo-sgd, epochs: [1, 2]}]",
            "epochs=1 in one cell and 2 in another",
        ),
        ("base: {method: finetune, stop_after: 1}\ngrid: [{optimizer: fo-sgd}]", "at least two tasks"),
        ("base: {method: finetune, method_options: {tune: none}}\ngrid: [{optimizer: fo-sgd}]", "something to tune"),
        ("base: {method: finetune, method_options: {imprint: false}}\ngrid: [{optimizer: fo-sgd}]", "imprint=False"),
    ],
)
def test_cells_that_share_no_landscape_are_refused_before_any_work(grid: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(grid)
    arguments = ["trajectories", "--grid", str(tmp_path / "grid.yaml"), "--results", str(tmp_path / "out")]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 2 and "Traceback" not in found.output
    assert re.search(said, " ".join(found.output.split())), found.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"optimizer": "es-cma", "lr": 1.0, "eps": 0.1, "queries": 4},
            "es-cma: .* trained components need a covariance",
        ),
        ({"method_options": {"subspace": 1}}, "the start and both optima lie on a line"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_any_run(
    change: dict[str, Any], said: str, tiny_vit: dict[str, Any], some_drawings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = {**tiny_vit, "dataset": some_drawings, "tasks": 10, "stop_after": 2, "method": "finetune", "epochs": 1}
    first = TrialConfig.from_dict(
        {**cell, "optimizer": "fo-sgd", "lr": 0.1, **({} if "optimizer" in change else change)}
    )
    cells = [first, TrialConfig.from_dict({**cell, "optimizer": "fo-sgd", "lr": 0.1, **change})]
    ran: list[Any] = []
    monkeypatch.setattr(Adapter, "learn", lambda *_: ran.append(1))
    with pytest.raises(ConfigError, match=said):
        adapter_study(cells, Placement())
    assert not ran


def test_runs_that_differ_in_their_rate_alone_are_all_drawn_and_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwoParameters, "steps", 4)
    monkeypatch.setattr(TwoParameters, "side", 3)
    runs = [Run("fo-sgd", 0.05), Run("fo-sgd", 0.01), Run("fo-sgd", 0.01, seed=1), Run("zo-sgd", 0.05, 1e-3, 1)]
    runs.append(Run("fo-sgd", 0.01, options={"momentum": 0.9}))
    looks, points = rows.landscape(study(TwoParameters(), runs))
    (surface,) = figures.surfaces(points)
    drawn = figures.draw_trajectories(surface, figures.trajectories(looks), objective="both")
    names = [trace.name for trace in drawn.data if trace.type == "scatter" and trace.mode == "lines+markers"]
    assert sorted(names) == ["fo-sgd lr=0.01", "fo-sgd lr=0.01 momentum=0.9", "fo-sgd lr=0.05", "zo-sgd q=1"]
