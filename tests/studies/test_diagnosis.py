"""What is said of training that does not move, against what is known exactly."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from pyarrow import parquet as pq

from zeroflow import ConfigError, TrialConfig, run_trial
from zeroflow.cli import main
from zeroflow.methods import MiniBatch
from zeroflow.optim import LocalExecutor
from zeroflow.results import Store, rows
from zeroflow.studies.diagnosis import diagnose
from zeroflow.trial.placement import Placement
from zeroflow.trial.trial import Trial


@pytest.fixture
def cell(tiny_vit: dict[str, Any], some_drawings: str) -> dict[str, Any]:
    return {
        "dataset": some_drawings,
        "tasks": 4,
        "epochs": 1,
        "batch_size": 15,
        "dtype": "float64",
        "method": "aper-adapter",
        "optimizer": "zo-sgd",
        "eps": 1e-4,
        "lr": 0.01,
        **tiny_vit,
    }


def exact(config: TrialConfig, batches: int) -> tuple[float, float]:
    """Length of the gradient, and of what a mini-batch's has beside it, by backpropagation."""
    trial = Trial(config, Placement(), LocalExecutor())
    trial.open()
    task = trial.scenario.tasks[0]
    parameters = list(trial.begin_task(task).values())
    made, trial.method.training = trial.batches(task), True
    gradients = []
    for number in range(batches):
        parts = made.make_training(0, number, made.order(0)[number * made.batch_size :][: made.batch_size])()
        images, labels, *_ = parts
        loss = trial.method.loss(trial.method.prepare(MiniBatch(images.double(), labels)))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    stacked = torch.stack(gradients)
    noise = stacked.sub(stacked.mean(0)).square().sum(1).sum() / (batches - 1)
    return float(stacked.mean(0).square().sum() - noise / batches), float(noise)


def test_a_mini_batch_of_a_whole_task_has_no_noise(cell: dict[str, Any]) -> None:
    """Whether it has room for just the task or for more."""
    config = {**cell, "method_options": {"dropout": 0.0}}
    just, more = (
        diagnose(TrialConfig.from_dict({**config, "batch_size": size}), directions=3, batches=4) for size in (60, 100)
    )
    assert just.batch_noise == more.batch_noise == 0.0
    assert (just.gradient, just.largest_lr) == (more.gradient, more.largest_lr) and just.gradient > 0


def test_a_loss_that_never_changed_does_not_move(cell: dict[str, Any]) -> None:
    config = TrialConfig.from_dict(cell)
    for stored, said in (
        ([0.25] * 30, "does not move beyond its noise (0.0 standard errors down)"),
        ([0.25] * 15 + [0.5] * 15, "rises (inf standard errors up)"),
        ([0.5] * 15 + [0.25] * 15, "falls (inf standard errors down)"),
    ):
        found = diagnose(config, losses=stored, directions=2, batches=2)
        assert said in found.sentences(config)[0]


def test_slopes_along_tangents_have_no_eps_and_half_the_passes(cell: dict[str, Any]) -> None:
    found = {
        name: (config, diagnose(config, directions=3, batches=2))
        for name in ("forward-grad", "zo-sgd")
        for config in [TrialConfig.from_dict({**cell, "optimizer": name, "method_options": {"dropout": 0.0}})]
    }
    said = {name: " ".join(result.sentences(config)) for name, (config, result) in found.items()}
    assert "eps=" in said["zo-sgd"] and "eps=" not in said["forward-grad"]
    ours, theirs = (found[name][1].passes_for_one_percent for name in ("forward-grad", "zo-sgd"))
    assert ours is not None and theirs is not None and theirs == pytest.approx(2 * ours, rel=0.2)


def test_passes_of_a_step_are_the_optimizers_own(cell: dict[str, Any]) -> None:
    """With one-sided differences q + 1, with two-sided ones 2 q; of an estimate that is not looked at those of zo-sgd."""
    found = {}
    for name in ("zo-rge", "zo-sgd", "zo-per-example"):
        config = {**cell, "optimizer": name, "queries": 4, "method_options": {"dropout": 0.0}}
        found[name] = diagnose(TrialConfig.from_dict(config), directions=3, batches=2).passes_for_one_percent
    assert found["zo-sgd"] and found["zo-rge"] == pytest.approx(found["zo-sgd"] * 5 / 8)
    assert found["zo-per-example"] == pytest.approx(found["zo-sgd"])


def test_the_bound_on_the_rate_is_that_of_a_bowl(cell: dict[str, Any]) -> None:
    """L = h |x|^2 / 2 in d dimensions: a step falls on average below 2 / (h (1 + (d + 1) / q)), whose trace is h d.

    With few values and 64 queries that is not 64 times as much as with one.
    """
    few = {**cell, "method": "aper-input-filter", "method_options": {}, "batch_size": 60}
    found = {q: diagnose(TrialConfig.from_dict({**few, "queries": q}), directions=20, batches=2) for q in (1, 4, 64)}
    for queries, one in found.items():
        h, d = one.curvature / one.parameters, one.parameters
        assert one.batch_noise == 0 and one.largest_lr == pytest.approx(2 / (h * (1 + (d + 1) / queries)))


def test_a_rate_is_held_against_the_bound_of_plain_steps_by_cells_with_plain_steps_alone(cell: dict[str, Any]) -> None:
    config = TrialConfig.from_dict({**cell, "method_options": {"dropout": 0.0}})
    found = dataclasses.replace(diagnose(config, directions=2, batches=2), largest_lr=0.5)
    for changed, plain in (
        ({}, True),
        ({"optimizer": "zo-rge"}, True),
        ({"optimizer_options": {"momentum": 0.0, "max_skipped": 3}}, True),
        ({"optimizer_options": {"momentum": 0.9}}, False),
        ({"optimizer_options": {"history": 0.2}}, False),
        ({"optimizer_options": {"combine": "span"}}, False),
        ({"hybrid_epochs": 1}, False),
        ({"optimizer": "zo-adam"}, False),
        ({"optimizer": "zo-sgd-sign"}, False),
        ({"optimizer": "zo-sgd-conserve"}, False),
        ({"optimizer": "zo-cge"}, False),
    ):
        (said,) = (s for s in found.sentences(dataclasses.replace(config, **changed)) if s.startswith("Learning rate"))
        assert ("this cell has 0.01" in said) == plain, changed


def test_rounding_is_that_of_the_cells_own_precision(cell: dict[str, Any]) -> None:
    """At an eps of 1e-7 float32's losses are noise; float64's slopes are those at ten times and a tenth of it."""
    for dtype, verdict in (("float64", "fine"), ("float32", "in rounding noise")):
        config = TrialConfig.from_dict({**cell, "dtype": dtype, "eps": 1e-7, "method_options": {"dropout": 0.0}})
        assert diagnose(config, directions=3, batches=2).eps_is == verdict


@pytest.mark.slow
def test_gradient_noise_and_cosine_are_those_of_backpropagation(cell: dict[str, Any]) -> None:
    config = TrialConfig.from_dict({**cell, "method_options": {"dropout": 0.0}})
    found = diagnose(config, directions=400, batches=4)
    length2, noise2 = exact(config, 4)
    assert found.gradient**2 == pytest.approx(max(length2, 0), rel=0.25, abs=0.05 * noise2)
    assert found.batch_noise**2 == pytest.approx(noise2, rel=0.25)
    share = found.gradient**2 / (found.gradient**2 + found.batch_noise**2)
    assert found.cosine == pytest.approx(math.sqrt(share / (found.parameters + 2)))


@pytest.mark.slow
def test_an_exact_gradient_is_no_estimate_of_one_direction(cell: dict[str, Any]) -> None:
    config = TrialConfig.from_dict({**cell, "method_options": {"dropout": 0.0}, "optimizer": "fo-sgd", "eps": None})
    found = diagnose(config, directions=200, batches=4)
    length2, noise2 = exact(config, 4)
    assert found.cosine == pytest.approx(math.sqrt(max(length2, 0) / (length2 + noise2)), rel=0.25)
    assert found.largest_lr is None and found.passes_for_one_percent is None
    said = " ".join(found.sentences(config))
    assert "the gradient of a mini-batch" in said and "direction(s)" not in said and "1 %" not in said
    other = TrialConfig.from_dict({**cell, "optimizer": "zo-per-example"})
    assert "zo-per-example is not looked at; zo-sgd in its place" in " ".join(
        diagnose(other, directions=2, batches=2).sentences(other)
    )


@pytest.mark.parametrize(("eps", "dtype", "verdict"), [
    (1e-4, "float64", "fine"), (1e-9, "float32", "in rounding noise"), (1.0, "float64", "beyond curvature"),
])  # fmt: skip
def test_an_eps_that_is_too_small_or_too_large_is_called_so(
    eps: float, dtype: str, verdict: str, cell: dict[str, Any]
) -> None:
    found = diagnose(TrialConfig.from_dict({**cell, "eps": eps, "dtype": dtype}), directions=8, batches=2)
    assert found.eps_is == verdict


@pytest.mark.slow
def test_the_command_reads_a_stored_cell_and_refuses_what_it_cannot_look_at(
    cell: dict[str, Any], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    trained, untrained = (
        TrialConfig.from_dict({**cell, **more}) for more in ({}, {"method": "simplecil", "optimizer": None})
    )
    for config in (trained, untrained):
        store.write(rows.tables(run_trial(config)))
    run = CliRunner().invoke(main, ["diagnose", str(tmp_path), trained.cell_id[:6], "--directions", "4"])
    assert run.exit_code == 0, run.output
    assert "eps=0.0001 is fine" in run.output and "Learning rate:" in run.output
    asked = CliRunner().invoke(main, ["diagnose", str(tmp_path), trained.cell_id, "--directions", "4", "--json"])
    assert json.loads(asked.output)["cell_id"] == trained.cell_id
    file = tmp_path / "steps" / f"{trained.cell_id}.parquet"
    steps = pa.concat_tables([pq.ParquetFile(file).read()] * 20)
    skipped = pa.array([None, *steps["loss"].to_pylist()[1:]], pa.float64())
    pq.write_table(steps.set_column(steps.column_names.index("loss"), "loss", skipped), file)
    again = CliRunner().invoke(main, ["diagnose", str(tmp_path), trained.cell_id, "--directions", "4"])
    assert again.exit_code == 0 and "the loss of the first task" in again.output, again.output
    for id_, said in ((untrained.cell_id, "trains nothing"), ("zz", "unknown cell")):
        refused = CliRunner().invoke(main, ["diagnose", str(tmp_path), id_])
        assert refused.exit_code == 2 and said in refused.output, refused.output


def test_a_black_box_is_not_asked() -> None:
    config = TrialConfig.from_dict({
        "method": "aper-input-filter", "optimizer": "zo-sgd", "access": "black-box", "image_size": 28,
    })  # fmt: skip
    with pytest.raises(ConfigError, match="expected a backbone that is on this machine"):
        diagnose(config)
