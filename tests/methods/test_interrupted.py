"""Every method goes on where it was interrupted, to the bits of an uninterrupted trial."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cells import Stopped, assert_same_bits

from zeroflow import TrialConfig, run_trial
from zeroflow.methods import methods

STATEFUL = ("replay", "generative-replay", "lwf", "ewc", "l2-sp", "shared-adapter", "adapter-per-task")


CASES = [
    *((name, {}, optimizer) for name in STATEFUL for optimizer in ("zo-adam", "fo-adam")),
    ("finetune", {"tune": "full"}, "zo-adam"),
    ("joint", {}, "fo-adam"),
    ("replay", {"selection": "herding", "buffer": 9}, "zo-adam"),
    ("generative-replay", {"covariance": "diagonal"}, "zo-adam"),
    ("lwf", {"tune": "vpt-deep"}, "zo-adam"),
    ("ewc", {"tune": "ssf"}, "zo-adam"),
    ("ewc", {"fisher": "backpropagation"}, "fo-adam"),
    ("ease", {"frozen_space": True, "beta": 0.5}, "zo-adam"),
    ("aper-vpt-shallow", {}, "zo-adam"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "optimizer"), CASES, ids=lambda value: str(value))
def test_a_method_goes_on_to_the_same_bits(
    name: str, options: dict, optimizer: str, some_drawings: str, tiny_vit: dict, tmp_path: Path, monkeypatch
) -> None:
    """Stopped within every task, and between the work at its end and the checkpoint of it."""
    build = methods.get(name).build
    small = {
        **tiny_vit,
        "dataset": some_drawings,
        "tasks": 10,
        "stop_after": 3,
        "epochs": 2,
        "batch_size": 10,
        "lr": 1e-3,
    }
    config = TrialConfig.from_dict({**small, "optimizer": optimizer, "method": name, "method_options": options})
    losses, end_task, left, finished = build.losses, build.end_task, 10**9, 0
    stops: set[tuple[str, int]] = set()
    # Less than a task has, more than an epoch: steps of first order are saved by epoch.
    enough = 9 if optimizer == "zo-adam" or name == "joint" else 5

    def stop_once(place: str) -> None:
        if left < 10**6 and (place, finished) not in stops:
            stops.add((place, finished))
            raise Stopped

    def counted(self, inputs):
        nonlocal left
        left -= 1
        if left < 0:
            stops.add(("loss", finished))
            raise Stopped
        return losses(self, inputs)

    def ended(self, batches):
        end_task(self, batches)
        stop_once("end")

    def on_stage(stage: int, *_: object) -> None:
        nonlocal finished
        finished = stage + 1

    monkeypatch.setattr(build, "losses", counted)
    monkeypatch.setattr(build, "end_task", ended)
    whole = run_trial(config)
    for _ in range(60):
        left = enough
        torch.rand(1)  # another process has drawn other numbers
        try:
            found = run_trial(config, folder=tmp_path, on_stage=on_stage)
            break
        except Stopped:
            continue
    assert_same_bits(found, whole)
    assert {finished for place, finished in stops if place == "end"} == {0, 1, 2}
    first = 1 if name == "joint" else 0
    assert [finished for place, finished in sorted(stops) if place == "loss"] == (
        [0] if name[:4] == "aper" else [*range(first, 3)]
    )
