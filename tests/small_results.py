"""Results of two tasks, equal or not, a process that writes them, and what a store holds, for the tests of stores."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from everything import PROVENANCE
from places import ROOT

from zeroflow.results import SCHEMAS, Store, load
from zeroflow.results.rows import tables
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import Step, TrialResult

sys.path.insert(0, str(ROOT / "benchmarks"))

from store import result_of


def cell(level: float = 80.0, *, loss: float = 0.5, **config: Any) -> TrialResult:
    """A result of two tasks whose stage accuracies are ``level`` and ``level - 10``, so Avg is ``level - 5``."""
    values = TrialConfig(**({"tasks": 2, "lr": 0.01, "queries": 1} | config))
    untrained = values.method == "simplecil"
    return TrialResult(
        config=values,
        accuracy_matrix=np.array([[level, np.nan], [level - 20, level]]),
        task_incremental=np.array([[level, np.nan], [level - 10, level + 2]]),
        domain_incremental=None if values.base_classes else np.array([[level, np.nan], [level - 12, level]]),
        test_samples=np.array([30, 30]),
        task_classes=np.array([3, 1] if values.base_classes else [2, 2]),
        class_order=np.array([3, 1, 0, 2]),
        class_names=["cat", "dog", "eel", "fox"],
        steps=[] if untrained else [Step(0, 0, 0, 1.25, 0.01, 0.5), Step(1, 0, 1, loss, 0.005)],
        probes=[],
        costs={
            "forward_passes": 0 if untrained else 12_000,
            "peak_memory_bytes": 3 * 2**20,
            "trainable_parameters": 0 if untrained else 700,
            "seconds": 4.5,
            "training_seconds": 0.0 if untrained else 3.5,
            "seconds_per_epoch": None if untrained else 0.35,
        },
        provenance=dict(PROVENANCE),
    )


def simplecil(level: float = 70.0, **config: Any) -> TrialResult:
    return cell(level, method="simplecil", optimizer=None, lr=None, queries=None, schedule=None, epochs=None, **config)


def path(store: Store, table: str, result: TrialResult) -> Path:
    return Path(store.root, table, f"{result.cell_id}.parquet")


def odd() -> TrialResult:
    """A result with the values that text formats get wrong."""
    names = ['say "é\n\u2028"', "back\\slash\ttab", "", "nul\0", "\U0001f600"]
    result = cell(100 / 3, seed=2**63 - 1, class_order_seed=0, dataset="null", lr=5e-324, eps=1.7976931348623157e308)
    return dataclasses.replace(result, class_names=names, class_order=np.arange(5))


WRITER = """
import itertools, random, sys
import pyarrow.compute as pc
from zeroflow.results import Store

source, store = Store(sys.argv[1]), Store(sys.argv[2])
tables = {name: source.load(name) for name in ("trials", "stages", "accuracy", "steps")}
cells = sorted(source.done())
random.shuffle(cells)
for cell in itertools.chain(set(cells) - store.done(), itertools.cycle(cells)):
    store.write({name: table.filter(pc.field("cell_id") == cell) for name, table in tables.items()})
    print(cell, flush=True)
"""


@contextmanager
def writing(source: Store, root: str, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes the cells of ``source`` into a store, over and over; killed after ``seconds``."""
    command = [sys.executable, "-c", WRITER, source.root, root]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer, ThreadPoolExecutor() as pool:
        try:
            assert writer.stdout and writer.stdout.readline()
            pool.submit(lambda: writer.stdout and writer.stdout.read())  # else it stops when the pipe is full
            timer = threading.Timer(seconds, writer.kill)
            timer.start()
            yield writer
            timer.join()
        finally:
            writer.kill()


def contents(store: Store | str | Path) -> dict[str, pa.Table]:
    return {name: load(store, name) for name in SCHEMAS}


def check_equal(found: dict[str, pa.Table], expected: dict[str, pa.Table]) -> None:
    for name, table in expected.items():
        assert found[name].equals(table, check_metadata=True), name


def loose(store: Store) -> list[str]:
    files = Path(store.root).rglob("*.parquet")
    return sorted(str(file.relative_to(store.root)) for file in files if file.name != "packed.parquet")


def trials(path: Path, *cells: tuple[dict[str, Any], float]) -> pa.Table:
    """The rows of a made-up store: cells whose accuracy is the same on every task at every stage, so Avg and Last are it."""
    store = Store(path)
    for values, accuracy in cells:
        result = result_of(TrialConfig.from_dict(values), 0)
        result.accuracy_matrix[~np.isnan(result.accuracy_matrix)] = accuracy
        store.write(tables(result))
    return load(path, "trials")
