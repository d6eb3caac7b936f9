"""Running a plan: every missing cell as a Tune trial, as many at a time as the cluster holds."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zeroflow.errors import ConfigError
from zeroflow.results import records
from zeroflow.results.store import Store
from zeroflow.sweep.grid import SweepPlacement
from zeroflow.sweep.progress import Progress
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import checkout_commit

# Read by Ray when it is imported or started, so set before. All are about noise and start-up time.
_RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "8",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

# What a Tune trial holds while Ray Train's workers do its work. Any share of a CPU would be missing for the last worker
# of a full cluster, which then never starts; nothing at all is refused.
_WAITING = {"memory": 1.0}


def run_sweep(
    cells: Sequence[TrialConfig],
    store: Store,
    placement: SweepPlacement,
    *,
    data_dir: str | None = None,
    address: str | None = None,
    echo: Callable[[str], None] = print,
) -> int:
    """Run cells through Ray Tune and Ray Train.

    Args:
        cells: what to run. store: where results go, each as soon as its cell is finished.
        placement: processes and resources of a cell, and how many at a time.
        data_dir: of the data sets, on every node. address: a running Ray's, ``"auto"``, or None: the one that
            ``RAY_ADDRESS`` names, else a new local one.
        echo: receives progress lines.

    Returns:
        The number of cells that failed.

    Raises:
        ConfigError: no node can hold a cell, or the store cannot be written; before anything runs.
    """
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address or os.environ.get("RAY_ADDRESS") or "local", **_quiet(address))
    try:
        return _run(cells, store, placement, data_dir, echo)
    finally:
        if started_here:
            ray.shutdown()


def _run(
    cells: Sequence[TrialConfig],
    store: Store,
    placement: SweepPlacement,
    data_dir: str | None,
    echo: Callable[[str], None],
) -> int:
    import ray
    from ray import tune
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from zeroflow.sweep.train import run_cell

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    placement = resolve_placement(placement, nodes)
    concurrency = concurrent_cells(placement, nodes)
    store.check_writable()
    echo(
        f"Ray {ray.__version__} at {ray.get_runtime_context().gcs_address}: {len(nodes)} node(s), "
        f"{sum(n.get('CPU', 0) for n in nodes):g} CPUs, {sum(n.get('GPU', 0) for n in nodes):g} GPUs; "
        f"{len(cells)} cells, {concurrency} at a time"
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # The store as an actor: written from the node that the sweep was started on, wherever cells run.
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Store)
    shared = remote.options(scheduling_strategy=here).remote(store.root)
    scratch, commit = tempfile.mkdtemp(prefix="zeroflow-"), checkout_commit()
    # Beside the results, where a later sweep finds it; an object store is no place for a file that grows by a few bytes.
    unfinished = f"{scratch if '://' in store.root else store.root}/unfinished"
    settings = [
        {
            "cell": config.canonical(), "placement": dataclasses.asdict(placement), "data_dir": data_dir,
            "commit": commit, "scratch": scratch, "unfinished": unfinished,
        }
        for config in cells
    ]  # fmt: skip
    progress = Progress(cells, concurrency, echo)

    def trial(setting: Mapping[str, Any]) -> None:
        run_cell({**setting["one"], "store": shared})

    trial.__name__ = "cell"
    bundle: dict[str, float] = {"CPU": placement.cpus_per_worker, "GPU": placement.gpus_per_worker or 0.0}
    # A trial with its own workers only waits for them: what it held would be missing for them.
    alone = placement.workers_per_trial == 1
    tuner = tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory([bundle if alone else _WAITING])),
        param_space={"one": tune.grid_search(settings)},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrency, reuse_actors=alone),
        run_config=tune.RunConfig(
            name="sweep", storage_path=scratch, verbose=0, callbacks=[progress.callback()],
            failure_config=tune.FailureConfig(max_failures=placement.retries),
        ),
    )  # fmt: skip
    try:
        with progress.beating():
            tuner.fit()
        for config, error in progress.died():
            store.write_failure(records.failure(config, error, str(error), placement.retries + 1))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return progress.failed


def resolve_placement(placement: SweepPlacement, nodes: Sequence[Mapping[str, float]]) -> SweepPlacement:
    """Decide what was left to the cluster: a GPU per worker where there is any."""
    if placement.gpus_per_worker is not None:
        return placement
    return dataclasses.replace(placement, gpus_per_worker=1.0 if any(n.get("GPU", 0) for n in nodes) else 0.0)


def concurrent_cells(placement: SweepPlacement, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many cells fit at a time: whole workers on whole nodes.

    Raises:
        ConfigError: not even one fits; the message has the numbers.
    """
    need = {"CPU": float(placement.cpus_per_worker), "GPU": float(placement.gpus_per_worker or 0)}

    def fits(node: Mapping[str, float]) -> int:
        by_cpu = int(node.get("CPU", 0) / need["CPU"])
        if not need["GPU"]:
            return by_cpu
        gpus = int(node.get("GPU", 0))
        # A share never spans two GPUs.
        return min(by_cpu, gpus * int(1 / need["GPU"]) if need["GPU"] < 1 else gpus // int(need["GPU"]))

    workers = sum(fits(node) for node in nodes)
    cells = workers // placement.workers_per_trial
    if not cells:
        raise ConfigError(
            f"no cell fits: it needs {placement.workers_per_trial} worker(s) with {need['CPU']:g} CPU(s) and "
            f"{need['GPU']:g} GPU(s) each; the nodes have "
            + ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
        )
    return min(cells, placement.max_concurrent or cells)


def _quiet(address: str | None) -> dict[str, Any]:
    local = not (address or os.environ.get("RAY_ADDRESS"))
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    return {**options, "include_dashboard": False} if local else options
