"""Results of several threads: in order, no more than are asked for, and ended with whoever takes them."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zeroflow.data import prefetched
from zeroflow.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zeroflow"


def makers(count: int, made: list[int], seconds: float = 0.0) -> list[Callable[[], int]]:
    def maker(i: int) -> Callable[[], int]:
        def make() -> int:
            time.sleep(seconds * (count - i))  # the first takes longest
            made.append(i)
            return i * i

        return make

    return [maker(i) for i in range(count)]


def loaders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("zeroflow-loader")]


@pytest.mark.parametrize("threads", [0, 1, 3, 50])
def test_results_come_in_order_whoever_is_first(threads: int) -> None:
    made: list[int] = []
    assert list(prefetched(makers(8, made, 0.005), threads)) == [i * i for i in range(8)]
    assert sorted(made) == list(range(8)) and loaders() == []
    assert list(prefetched([], threads)) == []


def test_the_next_results_are_made_while_one_is_worked_on_and_no_more() -> None:
    made: list[int] = []
    results = prefetched(makers(20, made), 3)
    assert made == [] and loaders() == []
    assert next(results) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(made) == [0, 1, 2, 3]
    results.close()


def test_threads_run_side_by_side() -> None:
    together = threading.Barrier(3)
    assert sorted(prefetched([lambda: together.wait(timeout=10)] * 3, 3)) == [0, 1, 2]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_an_error_takes_its_results_place(threads: int) -> None:
    def fail() -> int:
        raise ConfigError("image 2")

    made: list[int] = []
    works = makers(6, made)
    results = prefetched([works[0], works[1], fail, *works[3:]], threads)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ConfigError, match="image 2"):
        next(results)
    assert loaders() == []


@pytest.mark.parametrize("how", ["close", "forget", "raise"])
def test_threads_end_with_their_consumer(how: str) -> None:
    made: list[int] = []
    results = prefetched(makers(1000, made), 2)
    assert next(results) == 0 and len(loaders()) >= 1
    if how == "close":
        results.close()
    elif how == "raise":
        with pytest.raises(RuntimeError):
            results.throw(RuntimeError())
    else:
        del results
        gc.collect()
    assert loaders() == [] and len(made) <= 4


def test_threads_of_the_caller_stay_as_they_are() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(prefetched([torch.get_num_threads] * 2, 2)) == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
