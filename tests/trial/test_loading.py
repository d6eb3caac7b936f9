"""Mini-batches made ahead of their steps: whoever makes them, and whenever, a trial's bits are the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import Stopped

import zeroflow
from zeroflow import ConfigError, Placement, TrialConfig, run_trial
from zeroflow.data.dataset import ArraySamples, ImageDataset, load_dataset
from zeroflow.data.scenario import View
from zeroflow.grid.grid_file import parse_grid
from zeroflow.grid.plan import check_data
from zeroflow.methods import Method, methods
from zeroflow.models.factory import create_backbone
from zeroflow.trial.loading import Loader

SMALL = {
    "dataset": "some-drawings", "tasks": 10, "stop_after": 3, "epochs": 2, "batch_size": 10, "optimizer": "zo-sgd", "lr": 1e-3,
}  # fmt: skip
STEPS = 3 * 2 * 3  # three tasks, two epochs of 24 drawings in mini-batches of 10, the last one smaller


@pytest.fixture
def small(some_drawings: str, tiny_vit: dict[str, Any]) -> dict[str, Any]:
    """Settings of a cell that takes a quarter of a second."""
    return {**SMALL, **tiny_vit}


def loaders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("zeroflow-loader")]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the threads that made training images; afterwards none of them is left."""
    names: list[str] = []
    original = View.training_batch

    def noted(self, positions, generator):
        names.append(threading.current_thread().name)
        return original(self, positions, generator)

    monkeypatch.setattr(View, "training_batch", noted)
    yield names
    assert not loaders()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("ease", {}),
        ("ease", {"optimizer": "fo-sgd"}),
        ("ease", {"optimizer": "zo-svrg", "optimizer_options": {"snapshot_every": 2}}),
        ("replay", {"transform": "pilot"}),
        ("generative-replay", {}),
    ],
)
def test_threads_that_make_mini_batches_change_no_bit(method: str, more: dict, small: dict, made: list[str]) -> None:
    config = TrialConfig.from_dict({**small, "method": method, **more})
    alone = run_trial(config, Placement(loader_threads=0))
    assert len(alone.steps) == STEPS and set(made) == {"MainThread"}
    for threads in (1, 3):
        made.clear()
        torch.rand(3)
        other = run_trial(config, Placement(loader_threads=threads))
        assert [step.loss for step in other.steps] == [step.loss for step in alone.steps]
        np.testing.assert_array_equal(other.accuracy_matrix, alone.accuracy_matrix)
        assert other.summary["peak_memory_bytes"] == alone.summary["peak_memory_bytes"]
        ahead = [name for name in made if name.startswith("zeroflow-loader")]
        assert len(ahead) == (STEPS + 12 if method == "replay" else STEPS)
        assert len(made) == len(ahead) or "snapshot_every" in str(more)


def test_by_default_a_busy_cpu_makes_each_mini_batch_when_it_is_needed_and_a_gpu_gets_four_threads(monkeypatch) -> None:
    assert Placement().loaders() == (4 if torch.cuda.is_available() else 0)
    monkeypatch.setattr(Placement, "torch_device", lambda self: torch.device("cuda"))
    assert Placement().loaders() == 4 and Placement(loader_threads=0).loaders() == 0


def test_replayed_steps_make_no_images(
    small: dict, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrialConfig.from_dict({**small, "method": "ease", "epochs": 4, "stop_after": 1})
    original, left = methods.get("ease").build.losses, 13  # in the middle of the seventh of twelve steps

    def counted(self, inputs):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped
        return original(self, inputs)

    monkeypatch.setattr(methods.get("ease").build, "losses", counted)
    place = Placement(loader_threads=2)
    with pytest.raises(Stopped):
        run_trial(config, place, folder=tmp_path / "unfinished")
    assert not loaders(), "threads end with their trial, however it ends"
    made.clear()
    left = 1000
    result = run_trial(config, place, folder=tmp_path / "unfinished")
    assert len(result.steps) == 12 and len(made) == 6
    assert [step.loss for step in result.steps] == [step.loss for step in run_trial(config).steps]


def test_making_images_is_no_part_of_a_step(small: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that leaps by a thousand seconds whenever images are looked up."""
    late, original, clock = 0.0, ArraySamples.images, time.perf_counter

    def slow(self, indices):
        nonlocal late
        late += 1000.0
        return original(self, indices)

    monkeypatch.setattr(ArraySamples, "images", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late)
    steps = run_trial(TrialConfig.from_dict({**small, "method": "replay"}), Placement(loader_threads=0)).steps
    assert late > 1000 * STEPS
    assert sum(step.seconds is None for step in steps) == 3 and all((step.seconds or 0) < 1000 for step in steps)


def test_an_image_that_cannot_be_made_ends_the_trial_at_its_step(small: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = View.training_batch, 0

    def broken(self, positions, generator):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ConfigError("damaged.png: not an image")
        return original(self, positions, generator)

    monkeypatch.setattr(View, "training_batch", broken)
    with pytest.raises(ConfigError, match=r"damaged\.png"):
        run_trial(TrialConfig.from_dict({**small, "method": "ease"}), Placement(loader_threads=2))
    assert not loaders()


def test_a_loader_begins_anywhere_and_runs_no_further_ahead_than_its_threads() -> None:
    drawn: list[tuple[int, int]] = []

    def maker(epoch: int, number: int, positions: np.ndarray):
        drawn.append((epoch, number))
        assert threading.current_thread() is threading.main_thread(), "what is drawn is drawn by the consumer"
        return lambda: (epoch, number, positions.tolist())

    loader = Loader(lambda epoch: np.arange(5) + 10 * epoch, 3, 2, maker, 2)
    assert not drawn
    assert loader.due(1, 1) == (1, 1, [12, 13])
    assert drawn == [(1, 1), (1, 2), (2, 0)]
    assert [loader.due(*place) for place in ((1, 2), (2, 0))] == [(1, 2, [14]), (2, 0, [20, 21])]
    loader.close()
    assert not loaders() and drawn[-1] == (2, 2)


@pytest.mark.parametrize("name", [name for name, info in methods.items() if info.build.replay is not Method.replay])
def test_what_is_replayed_does_not_depend_on_what_a_task_trains(name: str, tiny_vit: dict) -> None:
    """So it may be drawn ahead."""
    method = methods.get(name).build(create_backbone(tiny_vit["backbone"], checkpoint="none"))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 14, 14, generator=generator)
    for classes in (range(2), range(2, 4)):
        batches = [(images, torch.arange(8) % 2 + classes.start)]
        method.begin_task(classes, generator, batches)
        if not classes.start:
            method.freeze()
            method.end_task(batches)
    before = method.replay(5, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for value in method.trainable().values():
            value.fill_(7.0)
    after = method.replay(5, torch.Generator().manual_seed(1))
    assert before is not None and after is not None and torch.equal(before[0], after[0])
    assert after[1] is None or torch.equal(before[1], after[1])


# Where a placement is told


def test_bad_placements_are_refused() -> None:
    for key in ("loader_threads", "cache_bytes"):
        with pytest.raises(ConfigError, match=f"{key}=-1: expected an integer >= 0"):
            Placement(**{key: -1})
        for value in (-1, 0.5, True):
            content = {"grid": [{"method": "ease"}], "placement": {key: value}}
            with pytest.raises(ConfigError, match=rf"placement\.{key}={value!r}: expected an integer >= 0"):
                parse_grid(content)


@pytest.mark.slow
def test_a_grid_file_tells_them_and_rules_change_them(
    small: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rules = [{"when": {"method": "finetune"}, "set": {"loader_threads": 6, "cache_bytes": 0}}]
    grid = parse_grid(
        {
            "base": small,
            "grid": [{"method": ["ease", "finetune"]}],
            "placement": {"loader_threads": 2, "cache_bytes": 7, "rules": rules},
        }
    )
    placed = {config.method: grid.placement.of(config) for config in grid.cells}
    found = {name: (place.loader_threads, place.cache_bytes) for name, place in placed.items()}
    assert found == {"ease": (2, 7), "finetune": (6, 0)}

    class Enough(Exception):
        """All is seen."""

    def look(config, place, **_):
        assert (place.loader_threads, place.cache_bytes) == found[config.method]
        raise Enough

    from zeroflow.sweep.cell import compute
    from zeroflow.sweep.messages import CellFailed, CellTask, SweepContext

    monkeypatch.setattr(zeroflow, "run_trial", look)
    for config in grid.cells:
        outcome = compute(CellTask(config, placed[config.method], SweepContext(str(tmp_path))), None)
        assert isinstance(outcome, CellFailed) and outcome.error == "Enough"

    opened: list[int] = []

    def open_it(name: str, root: str | None, cache_bytes: int) -> ImageDataset:
        opened.append(cache_bytes)
        return load_dataset(name, root, cache_bytes=cache_bytes)

    monkeypatch.setattr("zeroflow.grid.plan.load_dataset", open_it)
    check_data(grid.cells, None, grid.placement)
    assert opened == [0], "the least that any cell of a data set is given"
