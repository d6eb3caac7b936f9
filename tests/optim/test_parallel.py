"""Processes that share the queries of a step, its mini-batch, or both: real ones, which meet over gloo.

One group of processes is started for each number of them, and does everything that is asked of so many.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import TESTS
from processes import (
    FORWARD_PASS,
    NAMES,
    TOLERANCE,
    TRIAL,
    all_names,
    equal_parts,
    examples,
    network,
    process,
    train,
    trials,
    vector,
    with_buffers,
)

from zeroflow import ConfigError, TrialConfig, run_trial
from zeroflow.optim import Journal, LocalExecutor, Slice

pytestmark = pytest.mark.slow  # processes of their own
PRELOADED = ["conftest", "processes", "cmaes", "timm", "torch._dynamo", "torch._decomp.decompositions_for_jvp"]
"""What the processes import, or what they ask of the package does when it first needs it."""


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[list[dict[str, Any]], Path]]:
    """``group(size)``: what each of so many processes found, and the folder they wrote in."""
    known: dict[int, tuple[list[dict[str, Any]], Path]] = {}
    multiprocessing.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:  # what it does not find it leaves out without a word
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
        forkserver.ensure_running()

    def found(size: int) -> tuple[list[dict[str, Any]], Path]:
        if size not in known:
            folder = tmp_path_factory.mktemp(f"of{size}")
            # Forked from one process that has imported all of it and done nothing else.
            torch.multiprocessing.start_processes(process, (size, str(folder)), nprocs=size, start_method="forkserver")
            known[size] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)], folder
        return known[size]

    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return all_names(LocalExecutor())


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert torch.equal(vector(first), vector(second))
    assert first["losses"] == second["losses"] and first["forwards"] == second["forwards"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long), 4])
def test_the_bits_do_not_depend_on_how_many_share_the_queries(size: int, group: Any, alone: dict[str, Any]) -> None:
    buffers = with_buffers(LocalExecutor())
    for found in group(size)[0]:
        for name in NAMES:
            same(found["queries"][name], alone[name])
        for name in buffers:
            same(found["queries, buffers"][name], buffers[name])


@pytest.mark.parametrize("size", [2, 4])
def test_a_mini_batch_may_be_shared_and_gives_the_same_to_rounding(
    size: int, group: Any, alone: dict[str, Any]
) -> None:
    for found in group(size)[0]:
        for name in NAMES:
            shared = found["data"][name]
            torch.testing.assert_close(vector(shared), vector(alone[name]), rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(shared["losses"], alone[name]["losses"], rtol=0, atol=TOLERANCE)
            assert shared["forwards"] == alone[name]["forwards"]


def test_shards_are_added_up_in_their_order(group: Any) -> None:
    """(1 + 1e16) - 1e16 is 0 in float64, and 1 in any order that begins with the other two."""
    assert all(found["sums"] == [(0.0, 0.0), (0.0, 4.0)] for found in group(4)[0])


def test_two_by_two_processes_have_the_bits_of_one_by_two_also_in_buffers(group: Any) -> None:
    (reference, *_), _ = group(2)
    for found in [*group(2)[0], *group(4)[0]]:
        for kind in ("data", "data, buffers"):
            for name in reference[kind]:
                same(found[kind][name], reference[kind][name])


@pytest.mark.parametrize("name", ["zo-sgd", "fo-sgd"])
def test_buffers_become_the_shards_weighted_mean(name: str, group: Any) -> None:
    """Two steps of batch norm on 4 and 3 of 7 examples, with the network standing still."""
    mean = torch.zeros(5, dtype=torch.float64)
    for number in range(2):
        hidden = network()[0](examples(7, number)[0]).detach()
        mean = 0.9 * mean + 0.1 * (4 / 7 * hidden[:4].mean(0) + 3 / 7 * hidden[4:].mean(0))
    for found in group(2)[0]:
        state = found["statistics"][name]["state"]
        torch.testing.assert_close(state["1.running_mean"], mean, rtol=0, atol=1e-12)
        assert int(state["1.num_batches_tracked"]) == 2
        assert int(state["2.seen"]) == 8, "an integer is the first shard's own"


def test_what_is_exchanged_does_not_depend_on_the_number_of_parameters(group: Any) -> None:
    for found in group(2)[0]:
        for name in ("zo-sgd", "zo-adam", "forward-grad"):
            small, large = found["traffic"][f"{name} 5"], found["traffic"][f"{name} 500"]
            assert small == large
            assert small == {"all_gather": [11], "all_reduce": []}  # 10 losses, or 5 with their slopes, and a flag
        assert len(found["traffic"]["fo-sgd 5"]["all_reduce"]) == 2
        assert found["traffic"]["fo-sgd 5"]["all_reduce"][1] == 4 * 5 + 5 + 5 * 3 + 3


def test_processes_that_would_drift_apart_are_told(group: Any) -> None:
    first, second = (found["refused"] for found in group(2)[0])
    for found in (first, second):
        assert (
            found["wrapped"].startswith("TypeError: params: DistributedDataParallel") and ".module" in found["wrapped"]
        )
        assert found["sharded"].startswith("TypeError: params: FullyShardedDataParallel keeps a part")
        assert found["copied"].startswith("TypeError: params: DistributedDataParallel")
        for when in ("alone", "late"):
            assert "2 processes, and this optimizer has no executor: each process trains by itself" in found[when]
        assert "nothing" not in found and "one mini-batch" not in found
    assert "differs from process 0 in its exact gradient" in second["mini-batches"] and "mini-batches" not in first
    for what in ("parameters", "seed"):
        assert (
            what not in first and "ValueError: process 1 differs from process 0 in its parameters, seed" in second[what]
        )


@pytest.mark.parametrize("kind", ["failures", "failures of queries"])
def test_an_evaluation_that_fails_in_one_process_fails_in_all(kind: str, group: Any) -> None:
    first, second = (found[kind] for found in group(2)[0])
    forward_pass = {"zo-sgd", "zo-per-example", "forward-grad"}
    assert first.keys() == (forward_pass if kind != "failures" else {*forward_pass, "fo-sgd"})
    assert all(message == "KeyError: 'simulator failed'" for message in second.values())
    assert all("failed" in message and message.startswith("PeerError") for message in first.values())


def test_closures_that_do_not_say_their_part_count_alike(group: Any) -> None:
    expected = equal_parts(LocalExecutor())
    for found in group(2)[0]:
        for name, reference in expected.items():
            shared = found["equal parts"][name]
            torch.testing.assert_close(vector(shared), vector(reference), rtol=0, atol=TOLERANCE)
            assert shared["forwards"] == reference["forwards"]


def test_a_parameter_moves_if_any_shard_has_a_gradient_for_it(group: Any) -> None:
    for found in group(2)[0]:
        parts = found["parts in use"]
        assert torch.allclose(parts["a"], torch.tensor(1 - 0.1 * (1 + 0.5), dtype=torch.float64))
        assert torch.allclose(parts["b"], torch.tensor(1 - 0.1 * (0.5 + 0.5), dtype=torch.float64))
        assert torch.equal(parts["c"], torch.ones(3, dtype=torch.float64))


def test_a_log_of_several_processes_is_replayed_by_one_without_a_forward_pass(group: Any) -> None:
    found, folder = group(2)
    for name in FORWARD_PASS:
        same(found[1]["logged"][name], found[0]["data"][name])
        journal = Journal(folder / f"{name}.losses")
        model, reached = network(), found[0]["logged"][name]
        model.forward = lambda *_: pytest.fail("a replay makes no forward pass")
        replayed = train(name, journal, model)
        same(replayed, reached)
        assert not journal.replaying


@pytest.mark.slow
def test_a_trial_on_two_shards_is_near_that_of_one_process(group: Any, some_drawings: str) -> None:
    """In float32: a loss's rounding, about 1e-7, is divided by eps = 1e-3 in each slope, and multiplied by lr."""
    expected = trials(LocalExecutor())
    first, second = (found["trials"] for found in group(2)[0])
    for name, reference in expected.items():
        for found in (first[name], second[name]):
            np.testing.assert_allclose(found["losses"], reference["losses"], rtol=0, atol=1e-5)
            assert found["forwards"] == reference["forwards"]
            assert np.nanmax(np.abs(found["accuracy"] - reference["accuracy"])) <= 4
        assert first[name]["losses"] == second[name]["losses"]


def test_what_a_black_box_is_asked_is_counted_in_all_processes(group: Any) -> None:
    for first, second in zip(*(found["black box"] for found in group(2)[0]), strict=True):
        together = tuple(map(sum, zip(first["own"], second["own"], strict=True)))
        assert first["said"] == second["said"] == together and first["own"][0] < together[0]


def test_slices_have_every_example_once_and_the_first_shard_has_some() -> None:
    for samples, shards in itertools.product(range(1, 12), range(1, 8)):
        seen: list[int] = []
        for shard in range(shards):
            executor = LocalExecutor()
            executor.shards, executor.shard = shards, shard
            seen += range(samples)[executor.slice(samples)]
            assert shard or seen
        assert seen == list(range(samples))


@pytest.mark.parametrize("bounds", [(-1, 2, 5), (3, 2, 5), (0, 6, 5), (0, 0, 0)])
def test_slices_that_cannot_be_are_refused(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="Slice: expected 0 <= start"):
        Slice(lambda: 0.0, *bounds)


def test_more_shards_than_samples_in_a_mini_batch_are_refused(some_drawings: str) -> None:
    executor = LocalExecutor()
    executor.shards = 26
    with pytest.raises(ConfigError, match=r"data shards larger than the batch: 26 shards, batch_size=25"):
        run_trial(TrialConfig.from_dict({**TRIAL, "optimizer": "zo-sgd"}), executor=executor)
