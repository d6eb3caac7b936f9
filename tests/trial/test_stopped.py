"""A cell that stops, by itself, in another's place or by force, is the beginning of the whole one and goes on to its bits."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cells import Stopped
from places import TESTS

import zeroflow.data
import zeroflow.methods
import zeroflow.models.backbone
import zeroflow.optim
import zeroflow.results
from zeroflow import ConfigError, TrialConfig, run_trial
from zeroflow.results import rows
from zeroflow.trial.trial import Trial

SMALL = {"dataset": "some-drawings", "tasks": 4, "epochs": 2, "batch_size": 16}
pytestmark = pytest.mark.usefixtures("some_drawings")


@pytest.mark.slow
def test_a_stream_that_stops_early_is_the_beginning_of_the_whole_one(tiny_vit: dict) -> None:
    config = {**SMALL, **tiny_vit, "method": "ease", "optimizer": "zo-sgd", "epochs": 1}
    whole, part = (run_trial(TrialConfig.from_dict({**config, "stop_after": n})) for n in (None, 2))
    for name in ("accuracy_matrix", "task_incremental", "domain_incremental"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:2, :2])
    assert [step.loss for step in part.steps] == [step.loss for step in whole.steps[: len(part.steps)]]
    assert part.summary["forward_passes"] == whole.summary["forward_passes"] / 2
    stages = rows.tables(part)["stages"].to_pylist()
    assert [row["classes_seen"] for row in stages] == [5, 10] and [row["n"] for row in stages] == [25, 50]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["zo-sgd", "zo-per-example", "zo-adam-conserve"])
def test_peak_memory_is_the_same_after_an_interruption(optimizer: str, tiny_vit: dict, tmp_path: Path) -> None:
    class Stopped(Exception): ...

    def on_progress(what: str, done: int, total: int) -> None:
        if done:
            raise Stopped

    config = TrialConfig.from_dict(
        {**SMALL, **tiny_vit, "method": "aper-adapter", "optimizer": optimizer, "stop_after": 1, "batch_size": 25}
    )
    with pytest.raises(Stopped):
        run_trial(config, folder=tmp_path, on_progress=on_progress)
    found, whole = run_trial(config, folder=tmp_path), run_trial(config)
    assert any(step.seconds is None for step in found.steps)
    assert found.summary["peak_memory_bytes"] == whole.summary["peak_memory_bytes"]


@pytest.mark.slow
def test_a_hybrid_trial_begins_as_first_order_and_goes_on_without(tiny_vit: dict) -> None:
    common = {**SMALL, **tiny_vit, "method": "aper-adapter", "epochs": 3, "schedule": "constant"}
    first_order = run_trial(TrialConfig.from_dict({**common, "optimizer": "fo-sgd", "lr": 0.1}))
    hybrid = run_trial(
        TrialConfig.from_dict(
            {**common, "optimizer": "zo-sgd", "lr": 1e-3, "hybrid_epochs": 2, "optimizer_options": {"hybrid_lr": 0.1}}
        )
    )
    losses, reference = ([step.loss for step in result.steps] for result in (hybrid, first_order))
    assert losses[:8] == reference[:8] and losses[8:] != reference[8:]
    assert hybrid.summary["forward_passes"] == 8 + 2 * 4
    assert TrialConfig.from_dict({**common, "optimizer": "fo-sgd", "hybrid_epochs": 2}).hybrid_epochs == 0
    both = {"hybrid_epochs": 2, "optimizer_options": {"hybrid_lr": 0.1}}
    assert TrialConfig.from_dict({**common, "optimizer": "fo-sgd", **both}).cell_id == (
        TrialConfig.from_dict({**common, "optimizer": "fo-sgd"}).cell_id
    ), "every step is exact, at lr"
    with pytest.raises(ConfigError, match=r"hybrid_epochs=2: optimizer_options.hybrid=5 says it in steps"):
        TrialConfig.from_dict({**common, "optimizer": "zo-sgd", "hybrid_epochs": 2, "optimizer_options": {"hybrid": 5}})
    with pytest.raises(ConfigError, match="hybrid_epochs=4: expected an integer from 0 to epochs=3"):
        TrialConfig.from_dict({**common, "optimizer": "zo-sgd", "hybrid_epochs": 4})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optimizer", "more"),
    [
        ("aper-adapter", "zo-sgd", {"queries": 2}),
        ("ease", "zo-sgd", {"queries": 2}),
        ("ease", "zo-per-example", {}),
        ("ease", "zo-adam-conserve", {}),
        ("ease", "zo-svrg", {"optimizer_options": {"history": 0.3, "snapshot_every": 3}}),
        ("ease", "fo-sgd", {"lr": 0.1, "optimizer_options": {"momentum": 0.9}}),
        ("ease", "zo-sgd", {"hybrid_epochs": 1, "optimizer_options": {"hybrid_lr": 0.1}}),
    ],
)
def test_an_interrupted_trial_goes_on_to_the_same_bits(
    method: str, optimizer: str, more: dict, tiny_vit: dict, tmp_path, monkeypatch
) -> None:
    """Stopped at every 17th loss, again and again: nothing but the step or epoch in flight is computed twice."""
    config = TrialConfig.from_dict({**SMALL, **tiny_vit, "tasks": 2, "method": method, "optimizer": optimizer, **more})
    calls = 0
    cls = zeroflow.methods.methods.get(method).build
    original = cls.losses

    def counted(self, inputs):
        nonlocal calls, left
        calls, left = calls + 1, left - 1
        if left < 0:
            raise Stopped
        return original(self, inputs)

    monkeypatch.setattr(cls, "losses", counted)
    left = 10**9
    whole = run_trial(config)
    needed, calls = calls, 0
    for _ in range(50):
        left = 17
        try:
            result = run_trial(config, folder=tmp_path / "unfinished")
            break
        except Stopped:
            continue
    for name in ("accuracy_matrix", "task_incremental", "domain_incremental"):
        np.testing.assert_array_equal(getattr(result, name), getattr(whole, name))
    assert [(s.task, s.epoch, s.step, s.loss, s.lr) for s in result.steps] == [
        (s.task, s.epoch, s.step, s.loss, s.lr) for s in whole.steps
    ]
    assert result.summary["forward_passes"] == whole.summary["forward_passes"]
    twice = calls - needed
    # The step in flight at each stop; an epoch of 8 steps where steps are first-order.
    assert twice <= (calls // 17 + 1) * (8 if optimizer == "fo-sgd" or "hybrid_epochs" in more else 9)


@pytest.mark.parametrize("optimizer", ["zo-sgd", "fo-sgd"])
def test_an_interrupted_cell_has_taken_the_time_of_both_its_parts(
    optimizer: str, tiny_vit: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock on which nothing but a loss takes time, a second; the steps whose memory is measured have none of their own."""
    config = TrialConfig.from_dict(
        {**SMALL, **tiny_vit, "tasks": 2, "stop_after": 1, "method": "aper-adapter", "optimizer": optimizer}
    )
    now = 0.0
    cls = zeroflow.methods.methods.get("aper-adapter").build
    original, finish = cls.losses, Trial.finish_task

    def slow(self, inputs):
        nonlocal now
        now += 1.0
        return original(self, inputs)

    def stopped(self, task) -> None:
        raise Stopped

    monkeypatch.setattr(cls, "losses", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    whole = run_trial(config).summary
    monkeypatch.setattr(Trial, "finish_task", stopped)
    with pytest.raises(Stopped):
        run_trial(config, folder=tmp_path / "unfinished")
    monkeypatch.setattr(Trial, "finish_task", finish)
    now += 1000.0
    resumed = run_trial(config, folder=tmp_path / "unfinished").summary
    losses = {"zo-sgd": 2, "fo-sgd": 1}[optimizer] * 2 * 8  # two epochs of 120 drawings in mini-batches of 16
    assert whole["training_seconds"] == resumed["training_seconds"] == losses
    assert whole["seconds"] == resumed["seconds"] == losses
    assert resumed["seconds_per_epoch"] == losses / 2


def test_seconds_that_nothing_was_timed_of_are_unknown(tiny_vit: dict) -> None:
    """One step a task: its memory is measured, which takes time of its own."""
    values = {
        **SMALL,
        **tiny_vit,
        "tasks": 2,
        "epochs": 1,
        "batch_size": 120,
        "method": "aper-adapter",
        "optimizer": "zo-sgd",
    }
    found = run_trial(TrialConfig.from_dict(values)).summary
    assert found["training_seconds"] is None and found["seconds_per_epoch"] is None
    assert found["seconds"] > 0 and found["forward_passes"] == 2


@pytest.mark.slow
def test_what_was_judged_before_an_interruption_stays_judged_in_every_setting(tmp_path) -> None:
    config = TrialConfig.from_dict({"dataset": "some-drawings", "method": "simplecil", "tasks": 4})

    def stop(stage: int, accuracy: np.ndarray, samples: np.ndarray) -> None:
        if stage == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run_trial(config, folder=tmp_path / "unfinished", on_stage=stop)
    result, whole = run_trial(config, folder=tmp_path / "unfinished"), run_trial(config)
    for name in ("accuracy_matrix", "task_incremental", "domain_incremental"):
        np.testing.assert_array_equal(getattr(result, name), getattr(whole, name))
    assert (whole.task_incremental[2, :3] > whole.accuracy_matrix[2, :3]).all()


@pytest.mark.slow
def test_a_killed_process_loses_one_step_at_most(tmp_path) -> None:
    """SIGKILL at a random moment of a real process; the next one gets through."""
    cell = {**SMALL, "method": "ease", "optimizer": "zo-sgd", "epochs": 4}
    program = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}]
import conftest
conftest.some_drawings.__wrapped__()
from cells import Stopped
from zeroflow import TrialConfig, run_trial
config = TrialConfig.from_dict({cell!r})
result = run_trial(config, folder=sys.argv[1], on_stage=lambda *_: print("stage", flush=True))
print("END", result.accuracy_matrix.tobytes().hex(), [s.loss for s in result.steps])
"""
    whole = run_trial(TrialConfig.from_dict(cell))
    rng, folder, outputs = np.random.default_rng(0), tmp_path / "unfinished", []
    for kill in (True, False):
        process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
        until = _bytes(folder) + rng.integers(100, 700)
        while kill and process.poll() is None and _bytes(folder) < until:
            time.sleep(0.005)
        if kill:
            process.kill()
        outputs.append(process.communicate()[0])
    assert ["END" in output for output in outputs] == [False, True]
    expected = f"END {whole.accuracy_matrix.tobytes().hex()} {[s.loss for s in whole.steps]}"
    assert outputs[-1].splitlines()[-1] == expected


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("task-*.losses")) if folder.exists() else 0
