"""Power cuts at every operation on the disk: finished cells stay finished, others lose no more than the documents say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from power_cut import Disk, restore

import zeroflow.results
from zeroflow import TrialConfig, TrialResult, run_trial
from zeroflow.optim import LocalExecutor, journal
from zeroflow.results import rows
from zeroflow.results.store import Store


@pytest.fixture
def config(tiny_vit: dict[str, Any], some_drawings: str) -> TrialConfig:
    return TrialConfig.from_dict(
        {
            "dataset": some_drawings,
            "method": "ease",
            "optimizer": "zo-adam",
            "tasks": 2,
            "epochs": 1,
            "batch_size": 40,
            **tiny_vit,
        }
    )


def work(config: TrialConfig, root: Path) -> TrialResult | None:
    """What a sweep's worker does with a cell; None if it is done."""
    store, folder = Store(root / "results"), root / "unfinished" / config.cell_id
    if store.has(config.cell_id):
        return None
    result = run_trial(config, folder=folder)
    store.write(rows.tables(result))
    return result


def losses(root: Path) -> list[float]:
    return [row["loss"] for row in zeroflow.results.load(root / "results", "steps").sort_by("step").to_pylist()]


@pytest.mark.slow
def test_a_power_cut_at_any_moment_leaves_a_finished_cell_finished_and_another_one_its_steps(
    config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SYNC_SECONDS", 0.0)  # every step is promised, but for the last one
    evaluated, once = [0], LocalExecutor.map
    states: list[tuple[int, dict[str, bytes]]] = []

    def counted(*arguments: Any, **how: Any) -> Any:
        evaluated[0] += 1
        if evaluated[0] > 1 and not states:
            disk.mark()  # the evaluations of another step are safe
        return once(*arguments, **how)

    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root)
    monkeypatch.setattr(LocalExecutor, "map", counted)
    with disk.listening():
        whole = work(config, root)
        assert whole is not None and evaluated[0] == len(whole.steps) == 6
        disk.mark()
        finished = disk.marks
        shutil.rmtree(root / "unfinished")
    states += disk.states
    assert len(states) > 60, "every operation was heard of"
    expected = [step.loss for step in whole.steps]
    tried: set[Any] = set()
    for number, (marks, state) in enumerate(states):
        key = (marks, tuple(sorted(state.items())))
        if key in tried:
            continue
        tried.add(key)
        copy, evaluated[0] = tmp_path / str(number), 0
        copy.mkdir()
        restore(state, copy)
        found = work(config, copy)
        assert losses(copy) == expected
        if marks == finished:
            assert found is None, "a finished cell was computed again"
        else:
            assert evaluated[0] <= len(expected) - marks, f"of {marks} steps some were lost"
        shutil.rmtree(copy)


@pytest.mark.parametrize("damage", ["zeros", "garbage", "half"])
def test_a_log_is_replayed_up_to_what_a_power_cut_tore(damage: str, tmp_path: Path) -> None:
    log = journal.Journal(tmp_path / "log")
    for step in range(5):
        log.map(2, lambda index, step=step: (step + index / 4,))
    log.close()
    data = (tmp_path / "log").read_bytes()
    third = data[64:96]
    torn = {"zeros": bytes(32), "garbage": third[:8] + bytes(range(16)) + third[24:], "half": third[:16] + bytes(16)}
    (tmp_path / "log").write_bytes(data[:64] + torn[damage] + data[96:])
    again = journal.Journal(tmp_path / "log")
    found = [again.map(2, lambda index: (9.0 + index,)) for _ in range(3)]
    assert found == [[(0.0,), (0.25,)], [(1.0,), (1.25,)], [(9.0,), (10.0,)]]
    assert (tmp_path / "log").read_bytes()[:64] == data[:64] and len((tmp_path / "log").read_bytes()) == 96
