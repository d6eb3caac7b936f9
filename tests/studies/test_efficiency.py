"""What steps cost: work counted in forward passes, memory, and the command that measures both without data or Ray."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zeroflow.optim
from zeroflow import ConfigError, TrialConfig, run_trial
from zeroflow.methods import Method, MiniBatch, methods
from zeroflow.models.tuning import Adapters
from zeroflow.optim import create_optimizer, list_optimizers
from zeroflow.results import efficiency
from zeroflow.studies.efficiency import FIRST_TASK, PAPER, Setting, measure, parse_optimizers

pytestmark = pytest.mark.slow  # models of twelve blocks

# Forward passes of a step, and its work: written down by hand from the formulas of the methods' papers.
COSTS = {
    ("fo-sgd", 1): (1, 3), ("fo-adam", 1): (1, 3), ("fo-sgd-checkpoint", 1): (1, 4),
    ("zo-sgd", 1): (2, 2), ("zo-sgd", 4): (8, 8), ("zo-sgd-sign", 1): (2, 2), ("zo-sgd-sign", 3): (6, 6), ("zo-adam", 2): (4, 4),
    ("zo-sgd-conserve", 1): (5, 5), ("zo-adam-conserve", 4): (11, 11), ("forward-grad", 1): (1, 2),
    ("forward-grad", 4): (4, 8), ("zo-rge", 4): (5, 5), ("zo-cars", 1): (4, 4), ("zo-svrg", 2): (8, 8),
}  # fmt: skip
EWC = {"method_options": {"fisher": "backpropagation", "fisher_per_class": 5}}
SMALL = {"dataset": "some-drawings", "tasks": 4, "transform": "plain", "batch_size": 16, "method": "aper-adapter"}


@pytest.fixture(autouse=True)
def _data(some_drawings: str) -> None: ...


def steps_of(name: str, queries: int, count: int, **options: object) -> zeroflow.optim.ThreeStepOptimizer:
    """An optimizer after so many steps on a line through five points."""
    model, x = torch.nn.Linear(3, 1), torch.linspace(-1, 1, 15).view(5, 3)
    optimizer = create_optimizer(name, model, lr=1e-3, queries=queries, **options)
    for _ in range(count):
        optimizer.step(lambda: (model(x) - 1).square().mean())
    return optimizer


@pytest.mark.parametrize(("name", "queries"), COSTS)
def test_the_work_of_a_step_is_that_of_the_methods_formula(name: str, queries: int) -> None:
    forwards, work = COSTS[name, queries]
    info = zeroflow.optim.optimizers.get(name)
    assert (info.forwards(queries), info.equivalents(queries)) == (forwards, work)
    optimizer = steps_of(name, queries, 3)
    snapshot = 2 * queries if name == "zo-svrg" else 0
    assert (optimizer.forwards, optimizer.equivalents) == (3 * forwards + snapshot, 3 * work + snapshot)


def test_work_beyond_the_formula_and_of_hybrid_steps_is_counted_and_resumed() -> None:
    hybrid = steps_of("zo-sgd", 2, 5, hybrid=3)
    assert (hybrid.forwards, hybrid.equivalents) == (3 * 1 + 2 * 4, 3 * 3 + 2 * 4)
    resumed = steps_of("zo-sgd", 2, 0, hybrid=3)
    resumed.load_state_dict(hybrid.state_dict())
    assert resumed.equivalents == 17
    counted = steps_of("zo-per-example", 1, 1)
    assert counted.equivalents == counted.forwards == 2 + 1  # one more finds out that there is one loss for all


def test_every_optimizer_says_what_it_works() -> None:
    for info in list_optimizers(details=True):
        assert info.equivalents(4) >= info.forwards(4) >= 1, info.name


def test_the_text_of_a_cost_gives_its_number() -> None:
    for info in list_optimizers(details=True):
        formula = str(info.cost).split(",")[0].split(" (")[0]
        for queries in (1, 5):
            terms = [term.removesuffix("q") or "1" for term in formula.split(" + ")]
            counts = [queries if term.endswith("q") else 1 for term in formula.split(" + ")]
            assert sum(int(t) * c for t, c in zip(terms, counts, strict=True)) == info.forwards(queries), info.name
    texts = {
        name: str(zeroflow.optim.optimizers.get(name).cost)
        for name in ("zo-sgd-conserve", "zo-cars", "fo-sgd", "zo-svrg")
    }
    assert texts == {
        "zo-sgd-conserve": "2q + 3",
        "zo-cars": "4",
        "fo-sgd": "1, and a backward pass",
        "zo-svrg": "4q (and 2q a mini-batch at each snapshot)",
    }


@pytest.mark.slow
def test_a_trial_reports_its_work(tiny_vit: dict[str, Any]) -> None:
    steps = 2 * 4  # epochs; 5 classes of 12 drawings in mini-batches of 16
    for values, forwards, work in (
        ({"optimizer": "zo-sgd", "queries": 4}, 8 * steps, 8 * steps),
        ({"optimizer": "fo-sgd"}, steps, 3 * steps),
        ({"optimizer": "zo-sgd", "hybrid_epochs": 1}, 4 * 1 + 4 * 2, 4 * 3 + 4 * 2),
        # Two tasks, after each the Fisher information of 25 drawings: 25 / 16 and 3 * 25 / 16 mini-batches, rounded up.
        ({**EWC, "method": "ewc", "optimizer": "fo-sgd"}, 2 * (steps + 2), 2 * (3 * steps + 5)),
    ):
        summary = run_trial(
            TrialConfig.from_dict({**SMALL, **tiny_vit, "epochs": 2, "stop_after": 2, **values})
        ).summary
        assert (summary["forward_passes"], summary["forward_equivalents"]) == (forwards, work)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *itertools.product(["finetune", "replay", "lwf", "generative-replay", "joint"], ["fo-sgd", "zo-sgd"]),
        *itertools.product(["lwf", "generative-replay"], ["zo-svrg"]),  # also those of a snapshot
    ],
)
def test_the_passes_that_a_trial_reports_went_through_the_backbone(
    method: str, optimizer: str, tiny_vit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those for old answers and for replayed samples; replayed features pass through nothing."""
    build = methods.get(method).build
    seen = {"training": False, "batch": 0, "passes": 0.0}
    begin, prepare, freeze, forward = build.begin_task, build.prepare, build.freeze, Adapters.forward

    def beginning(*args: Any, **kwargs: Any) -> None:
        begin(*args, **kwargs)
        seen["training"] = True

    def freezing(self: Method) -> None:
        seen["training"] = False
        freeze(self)

    def preparing(self: Method, batch: MiniBatch) -> Any:
        seen["batch"] = len(batch.images)
        return prepare(self, batch)

    def passing(*args: Any, **kwargs: Any) -> torch.Tensor:
        features = forward(*args, **kwargs)
        if seen["training"]:
            # Inside a step a snapshot takes others; there each call is of one mini-batch.
            seen["passes"] += 1 if optimizer == "zo-svrg" else len(features) / seen["batch"]
        return features

    monkeypatch.setattr(build, "begin_task", beginning)
    monkeypatch.setattr(build, "prepare", preparing)
    monkeypatch.setattr(build, "freeze", freezing)
    monkeypatch.setattr(Adapters, "forward", passing)
    summary = run_trial(
        TrialConfig.from_dict(
            {**SMALL, **tiny_vit, "method": method, "optimizer": optimizer, "epochs": 2, "stop_after": 3}
        )
    ).summary
    assert summary["forward_passes"] == seen["passes"] > 0
    # A gradient costs two passes more; the frozen model of lwf has none, nor has the head of generative replay.
    steps = 2 * (4 + 4 + 4) if method != "joint" else 2 * (4 + 8 + 12)
    with_gradient = {"replay": 2 * steps - 8, "generative-replay": 8}.get(method, steps)
    expected = summary["forward_passes"] + (2 * with_gradient if optimizer == "fo-sgd" else 0)
    assert summary["forward_equivalents"] == expected


def test_the_values_trained_are_those_of_the_task_that_trains_the_most(tiny_vit: dict[str, Any]) -> None:
    """Generative replay trains all in the first task, and its head alone in the others."""
    own = {**SMALL, **tiny_vit, "method": "generative-replay", "optimizer": "zo-sgd", "epochs": 1}
    first, all_three = (
        run_trial(TrialConfig.from_dict({**own, "stop_after": tasks})).summary["trainable_parameters"]
        for tasks in (1, 3)
    )
    assert first == all_three > 5 * 32 * 3 + 1, "more than the head of the last task"


def test_an_optimizer_names_all_that_it_keeps() -> None:
    d = 4
    vectors = {"fo-sgd": 1, "zo-sgd": 1, "zo-svrg": 2, "zo-adam": 3}  # the masters; a snapshot; two moments
    for name, count in vectors.items():
        held = steps_of(name, 1, 2).held()
        assert sum(tensor.numel() for tensor in held if tensor.ndim) == count * d, name
    held = steps_of("zo-sgd", 1, 2, momentum=0.9, history=0.5, sparsity=0.25).held()
    assert sum(tensor.numel() for tensor in held) == 4 * d  # momentum, history, mask


@pytest.fixture(scope="module")
def measured() -> dict[str, object]:
    return measure(Setting("quickdraw_vit", batch_size=16, steps=1, device="cpu"))


@pytest.mark.slow
def test_the_setting_of_table_2_is_measured(measured: dict[str, object]) -> None:
    rows = {(row["optimizer"], row["queries"]): row for row in measured["rows"]}
    asked = [(name, None if name.startswith("fo-") else queries) for name, queries in PAPER]
    assert list(rows) == asked
    for (name, queries), row in rows.items():
        assert (row["forward_passes"], row["forward_equivalents"]) == COSTS[name, queries or 1]
        # Six blocks' adapters of width 64, a cosine head of ten classes and its factor.
        assert row["trainable_parameters"] == 6 * (2 * 192 * 64 + 64 + 192) + 10 * 192 + 1
        assert row["seconds_per_step"] > 0 and row["in_forwards"] > 0
        epochs = {name: -(-images // 16) * row["seconds_per_step"] for name, images in FIRST_TASK.items()}
        assert row["seconds_per_epoch"] == pytest.approx(epochs)
    memory = {key: row["peak_memory_bytes"] for key, row in rows.items()}
    plain, d = measured["forward_memory_bytes"], 4 * rows["zo-sgd", 1]["trainable_parameters"]
    assert measured["model_bytes"] < plain < memory["zo-sgd", 1] < 0.9 * memory["fo-sgd-checkpoint", None]
    assert memory["fo-sgd-checkpoint", None] < 0.85 * memory["fo-sgd", None]
    # Beyond a plain forward pass: the masters, a direction, the estimate, and buffers that live for a moment.
    assert memory["zo-sgd", 1] - plain < 4 * d
    assert abs(memory["zo-sgd", 4] - memory["zo-sgd", 1]) <= d


def test_an_epoch_with_snapshots_has_their_forward_passes() -> None:
    result = measure(Setting("quickdraw_vit", batch_size=16, steps=1, device="cpu"), [("zo-svrg", 1)])
    (row,) = result["rows"]
    # 313 steps: at the first and every 50th two passes over all mini-batches; by itself a step has four.
    snapshots = 7 * 2 * 313 * result["forward_seconds"]
    assert row["forward_passes"] == 4
    assert row["seconds_per_epoch"]["cifar100"] == pytest.approx(313 * row["seconds_per_step"] + snapshots)


def test_published_ratios_stand_beside_the_measured_ones(measured: dict[str, object]) -> None:
    found = {(r.row["optimizer"], r.row["queries"]): r for r in efficiency.ratios(measured)}
    zo = found["zo-sgd", 1]
    assert zo.saved == pytest.approx(12.08 / 2.41) and zo.time == pytest.approx((8.3 / 16.1, 66.8 / 109.6))
    rows = {(row["optimizer"], row["queries"]): row for row in measured["rows"]}
    first, own = rows["fo-sgd", None], rows["zo-sgd", 1]
    assert zo.saved_here == first["peak_memory_bytes"] / own["peak_memory_bytes"]
    model = measured["model_bytes"]
    assert zo.saved_beyond == (first["peak_memory_bytes"] - model) / (own["peak_memory_bytes"] - model)
    assert zo.time_here == own["in_forwards"] / first["in_forwards"]
    assert found["fo-sgd-checkpoint", None].saved is None


@pytest.mark.slow
def test_a_device_too_small_for_one_optimizer_measures_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from zeroflow.optim.estimators import Backpropagation

    def refuse(self: object, objective: object, queries: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Backpropagation, "estimate", refuse)
    result = measure(Setting("quickdraw_vit", batch_size=2, steps=1, device="cpu"), [("fo-sgd", 1), ("zo-sgd", 1)])
    large, small = result["rows"]
    assert large["peak_memory_bytes"] is None and large["seconds_per_epoch"]["cub"] is None
    assert large["forward_equivalents"] == 3 and small["peak_memory_bytes"] > 0
    assert efficiency.efficiency_table(result).lines[0].cells[2].text == "-"


@pytest.mark.slow
def test_the_command_needs_no_ray_and_writes_what_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "table2.json"
    program = (
        "import sys; sys.modules['ray'] = None\n"  # importing it is an error
        "from zeroflow.cli import main\n"
        "main(sys.argv[1:])"
    )
    options = ["--backbone", "quickdraw_vit", "--batch-size", "2", "--steps", "1", "--device", "cpu", "--optimizers"]
    command = [sys.executable, "-c", program, "efficiency", *options, "zo-sgd, zo-sgd:4", "--json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    result = json.loads(file.read_text())
    assert [(row["queries"], row["forward_passes"]) for row in result["rows"]] == [(1, 2), (4, 8)]
    assert (
        result["command"] == "zeroflow efficiency --backbone quickdraw_vit --batch-size 2 --device cpu --threads 1 "
        "--optimizers zo-sgd,zo-sgd:4 --steps 1"
    )
    keys = {
        "git_commit",
        "git_dirty",
        "device",
        "torch_version",
        "timm_version",
        "python_version",
        "threads",
        "finished_at",
    }
    assert keys | {"assumptions", "image_size", "batch_size", "model_bytes", "forward_seconds"} <= result.keys()
    assert result["image_size"] == 28
    assert "5.01" in run.stdout and str(file) in run.stdout  # memory of first order over ZO-SGD's in the paper


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'zo-sdg'; did you mean 'zo-sgd'.*'zo-sgd:0': expected NAME or NAME:QUERIES"
    ):
        parse_optimizers("fo-sgd,zo-sdg,zo-sgd:0")
    assert parse_optimizers("zo-sgd:4,fo-sgd, zo-fzoo") == [("zo-sgd", 4), ("fo-sgd", 1), ("zo-fzoo", 8)]
    with pytest.raises(ConfigError, match="device='cuda5'"):
        measure(Setting("quickdraw_vit", device="cuda5"))
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "zeroflow.cli", "efficiency", "--json", str(tmp_path / "file" / "x.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and "cannot be written" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.slow
def test_memory_counts_the_mini_batch_and_what_the_optimizer_keeps() -> None:
    """A longer history is one more vector; an image more is an image more: on a CPU as on a GPU."""
    config = {**SMALL, "optimizer": "zo-sgd", "epochs": 1, "tasks": 2}
    plain, history = (
        run_trial(TrialConfig.from_dict({**config, "optimizer_options": options})).summary
        for options in ({}, {"history": 0.5})
    )
    more = history["peak_memory_bytes"] - plain["peak_memory_bytes"]
    assert more == pytest.approx(4 * plain["trainable_parameters"], rel=0.01)
    assert np.isfinite(plain["peak_memory_bytes"])
