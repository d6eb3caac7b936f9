"""Running a plan: every missing cell as a Tune trial, as many at a time as the cluster holds."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroflow.results import records
from zeroflow.results.store import Store
from zeroflow.results.sweeps import SweepRecord
from zeroflow.sweep.placement import Node, SweepPlacement
from zeroflow.sweep.progress import Progress
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import checkout_commit

# Read by Ray when it is imported or started, so set before. All are about noise and start-up time, but for two: Tune's
# snapshots of thousands of trials take longer with every trial, and the store is what a sweep goes on from; and on Ctrl-C Tune
# would give every trial ten seconds to end, of which none has any use.
_RAY_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

# What a Tune trial holds while Ray Train's workers do its work. Any share of a CPU would be missing for the last worker
# of a full cluster, which then never starts; nothing at all is refused.
_WAITING = {"memory": 1.0}


@dataclass(frozen=True)
class SweepEnd:
    """How a sweep ended.

    Attributes:
        failed: cells that failed. stopped: why it ended before all cells had run; None: it did not.
    """

    failed: int
    stopped: str | None = None


def run_sweep(
    cells: Sequence[TrialConfig],
    store: Store,
    placement: SweepPlacement,
    *,
    name: str = "sweep",
    data_dir: str | None = None,
    address: str | None = None,
    echo: Callable[[str], None] = print,
) -> SweepEnd:
    """Run cells through Ray Tune and Ray Train.

    Ctrl-C and SIGTERM end it in order; what is finished is in the store, and what is not goes on from its log the next time.

    Args:
        cells: what to run. store: where results go, each as soon as its cell is finished.
        placement: processes and resources of cells, and how many at a time. name: of the grid, for ``zeroflow status``.
        data_dir: of the data sets, on every node. address: a running Ray's, ``"auto"``, or None: the one that
            ``RAY_ADDRESS`` names, else a new local one.
        echo: receives progress lines.

    Raises:
        ConfigError: no node can hold a cell, or the store cannot be written; before anything runs.
    """
    for setting, value in _RAY_SETTINGS.items():
        os.environ.setdefault(setting, value)
    local = not (address or os.environ.get("RAY_ADDRESS"))
    if local:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process of its own for what cannot happen
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address or os.environ.get("RAY_ADDRESS") or "local", **_quiet(local))
    try:
        with _terminated_like_interrupted():
            return _run(cells, store, placement, name, data_dir, echo)
    finally:
        if started_here:
            ray.shutdown()


def _run(
    cells: Sequence[TrialConfig],
    store: Store,
    placement: SweepPlacement,
    name: str,
    data_dir: str | None,
    echo: Callable[[str], None],
) -> SweepEnd:
    import ray
    from ray import tune
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from zeroflow.sweep.desk import SWEEPS, Desk
    from zeroflow.sweep.queue import CellQueue
    from zeroflow.sweep.train import run_cell

    def nodes() -> list[Node]:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    commit = checkout_commit()
    scratch = _scratch_folder()
    number = random.randrange(1, SWEEPS)  # tells it from others on the cluster
    common = {
        "root": store.root, "data_dir": data_dir, "commit": commit, "scratch": scratch, "sweep": number,
        "retries": placement.retries,
    }  # fmt: skip
    claims = None
    try:
        queue = CellQueue(cells, placement, nodes, store, common)
        store.check_writable()
        claims = queue.claims = store.claims()
        found = nodes()
        echo(
            f"Ray {ray.__version__} at {ray.get_runtime_context().gcs_address}: {len(found)} node(s), "
            f"{sum(n.get('CPU', 0) for n in found):g} CPUs, {sum(n.get('GPU', 0) for n in found):g} GPUs; "
            f"{len(cells)} cells, {queue.at_a_time} at a time"
        )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Desk)
        desk = remote.options(scheduling_strategy=here).remote(store.root)
        order = desk.keep_order.remote(number)

        def trial(setting: Mapping[str, Any]) -> None:
            run_cell(setting["one"], desk)

        def resources(setting: Mapping[str, Any]) -> Any:
            own = setting["one"]["placement"]
            alone = own["workers_per_trial"] == 1
            return tune.PlacementGroupFactory([_worker(own) if alone else _WAITING])

        trial.__name__ = "cell"
        progress = Progress(queue, echo)
        record = SweepRecord(store, name, cells, dataclasses.asdict(placement), commit)

        def died(job: Any, error: str) -> None:
            row = records.failure(job.config, "TrialDied", error, error, placement.retries + 1)
            try:
                store.write_failure(row)
            except OSError as refused:
                queue.stopped = f"results {store.root!r}: cannot be written: {refused.strerror or refused}"

        tuner = tune.Tuner(
            tune.with_resources(trial, resources),
            tune_config=tune.TuneConfig(search_alg=queue, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="sweep", storage_path=scratch, verbose=0, callbacks=[progress.callback(died)],
                failure_config=tune.FailureConfig(max_failures=placement.retries),
            ),
        )  # fmt: skip
        with suppress(KeyboardInterrupt), progress.reporting(record):
            tuner.fit()
        ray.cancel(order)
        left = len(queue.waiting) + len(queue.running) + len(queue.elsewhere)
        return SweepEnd(progress.failed, queue.stopped or ("interrupted" if left else None))
    finally:
        if claims:
            claims.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch_folder() -> str:
    """A folder for what Tune and Train insist on writing; those of processes that were killed are removed."""
    for old in Path(tempfile.gettempdir()).glob("zeroflow-*-*"):
        pid = old.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"zeroflow-{os.getpid()}-")


def _worker(placement: Mapping[str, Any]) -> dict[str, float]:
    from zeroflow.sweep.placement import CellPlacement

    return CellPlacement(**placement).worker


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM, with which a job is stopped, do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quiet(local: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    return {**options, "include_dashboard": False} if local else options
