"""A made-up store that has something for every figure and table, for the tests of what readers see."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from zeroflow.results import SCHEMAS, Store
from zeroflow.results.rows import failure, tables
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import Probe, Step, TrialResult

FINISHED = datetime(2025, 3, 4, 5, 6, 7, 891, tzinfo=UTC)
PROVENANCE = {
    "zeroflow_version": "0.1.0",
    "torch_version": "2.9.0",
    "timm_version": "1.0.0",
    "python_version": "3.11.9",
    "git_commit": "c0ffee",
    "git_dirty": True,
    "device": "cpu (x86_64)",
    "threads": 1,
    "finished_at": FINISHED,
}
SEEDS = (0, 1, 2)
# What three seeds differ by; the half width of the 95 % t-interval is 4.302652729911275 / sqrt(3).
OFFSETS = (-1.0, 0.0, 1.0)
HALF_WIDTH = 4.302652729911275 / 3**0.5


CONFUSION = (
    np.array([[12, 3], [0, 15]]),
    np.array([[9, 0, 6, 0], [0, 9, 1, 5], [0, 0, 15, 0], [3, 0, 0, 12]]),
)
"""Of two stages; after the second one 18 of 30 samples of the first task are put into it, 27 of 30 of the second one."""


def cell(
    level: float = 80.0, *, memory: float = 3.0, passes: int = 12_000, probes: bool = False, **config: Any
) -> TrialResult:
    """A result of two tasks whose stage accuracies are ``level`` and ``level - 10``, so Avg is ``level - 5``, Fgt 20."""
    values = TrialConfig(**({"tasks": 2, "lr": 0.01, "queries": 1} | config))
    untrained = values.method == "simplecil"
    seen = [
        Probe(task, step, "function_value", 2.0 + values.seed if task else None, 3.0 - step / 10)
        for task, steps in ((0, (0, 5)), (1, (10, 15)))
        for step in steps
    ]
    return TrialResult(
        config=values,
        accuracy_matrix=np.array([[level, np.nan], [level - 20, level]]),
        task_incremental=np.array([[level, np.nan], [level - 10, level + 2]]),
        domain_incremental=np.array([[level, np.nan], [level - 12, level]]),
        test_samples=np.array([30, 30]),
        task_classes=np.array([2, 2]),
        class_order=np.array([3, 1, 0, 2]),
        class_names=["cat", "dog", "eel", "fox"],
        steps=[] if untrained else [Step(0, 0, 0, 1.25, 0.01, 0.5), Step(1, 0, 1, 0.5, 0.005)],
        probes=seen if probes else [],
        costs={
            "forward_passes": 0 if untrained else passes,
            "forward_equivalents": 0
            if untrained
            else 3 * passes
            if str(values.optimizer).startswith("fo-")
            else passes,
            "peak_memory_bytes": round(memory * 2**20),
            "trainable_parameters": 0 if untrained else 700,
            "seconds": 4.5,
            "training_seconds": 0.0 if untrained else 3.5,
            "seconds_per_epoch": None if untrained else 0.35,
        },
        provenance=dict(PROVENANCE),
        confusion=CONFUSION,
    )


def simplecil(level: float = 70.0, **config: Any) -> TrialResult:
    return cell(level, method="simplecil", optimizer=None, lr=None, queries=None, schedule=None, epochs=None, **config)


def seeds(level: float, **config: Any) -> list[TrialResult]:
    """Three seeds whose Avg has mean ``level - 5`` and half width ``HALF_WIDTH``."""
    return [cell(level + offset, seed=seed, **config) for seed, offset in zip(SEEDS, OFFSETS, strict=True)]


def landscape(name: str = "two-parameters") -> tuple[pa.Table, pa.Table]:
    """Trajectories and surface of two bowls, around (-1, 0) and (1, 0), with runs that go straight to the middle or on."""
    common = {"landscape_id": f"made-up-{name}", "landscape": name}

    def losses(x: float, y: float) -> dict[str, float]:
        return {"x": x, "y": y, "loss_old": (x + 1) ** 2 + y**2, "loss_new": (x - 1) ** 2 + y**2}

    grid = [{**common, "point": None, **losses(x, y)} for x in np.linspace(-2, 2, 9) for y in np.linspace(-1, 2, 7)]
    named = {"start": (0.0, 2.0), "old optimum": (-1.0, 0.0), "new optimum": (1.0, 0.0), "balance": (0.0, 0.0)}
    points = [{**common, "point": name, **losses(*place)} for name, place in named.items()]
    runs = []
    for optimizer, queries in (("fo-sgd", None), ("zo-sgd", 1), ("zo-sgd", 8), ("forward-grad", 1)):
        for objective in ("both", "old-then-new"):
            for seed in (0, 1):
                sway = 0.0 if queries is None else 0.3 / queries * (1 + seed)
                for step in range(0, 101, 5):
                    share = step / 100
                    x = 0.0 if objective == "both" else (-share * 2 if share < 0.5 else -1 + 4 * (share - 0.5))
                    place = losses(x + sway * np.sin(step), 2 * (1 - share))
                    task = None if objective == "both" else int(step >= 50)
                    run = {
                        "optimizer": optimizer,
                        "optimizer_options": "{}",
                        "lr": 0.1,
                        "eps": None,
                        "queries": queries,
                    }
                    runs.append(
                        {
                            **common,
                            **run,
                            "seed": seed,
                            "objective": objective,
                            "step": step,
                            "task": task,
                            **place,
                            "distance": 0.0,
                        }
                    )
    return tuple(
        pa.Table.from_pylist(rows, schema=SCHEMAS[table])
        for table, rows in (("trajectories", runs), ("surfaces", grid + points))
    )  # type: ignore[return-value]


def fill(store: Store, *results: TrialResult) -> None:
    for result in results:
        store.write(tables(result))


def everything(store: Store) -> Store:
    """Fill a store: two data sets, queries, history, sparsity, hybrid, probes, two landscapes, a failure."""
    fill(store, simplecil(70.0), simplecil(60.0, dataset="other"))
    for method in ("ease", "aper-adapter"):
        fill(store, *seeds(82.0, method=method, optimizer="fo-sgd", queries=None, memory=9.0))
        for queries, gain in ((1, 0.0), (4, 3.0), (16, 5.0)):
            level = 72.0 + gain
            fill(
                store,
                *seeds(
                    level,
                    method=method,
                    optimizer="zo-sgd",
                    queries=queries,
                    passes=1000 * queries,
                    probes=queries == 1,
                ),
            )
    fill(store, *seeds(74.0, optimizer="zo-adam"), cell(66.0, optimizer="zo-sgd", dataset="other"))
    for option in ("history", "sparsity"):
        for share in (0.2, 0.4):
            fill(store, *seeds(72.0 + 10 * share, optimizer="zo-sgd", optimizer_options={option: share}))
    fill(
        store,
        *seeds(83.0, optimizer="zo-sgd", epochs=10, hybrid_epochs=7),
        *seeds(81.0, optimizer="fo-sgd", queries=None, epochs=10),
    )
    for name in ("two-parameters", "adapter"):
        store.write_landscape(*landscape(name))
    store.write_failure(failure(cell(seed=9).config, "RuntimeError", "boom", "Traceback ...", 2))
    return store
