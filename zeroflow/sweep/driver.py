"""Running a plan: every missing cell as a Tune trial, as many at a time as the cluster holds."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroflow.errors import ConfigError
from zeroflow.grid.placement import CellPlacement, Node, SweepPlacement
from zeroflow.results import records
from zeroflow.results.store import Store
from zeroflow.results.sweeps import SweepRecord, is_alive
from zeroflow.sweep.environment import LOCAL_SETTINGS, RAY_SETTINGS, changed_environment, set_defaults
from zeroflow.sweep.local_ray import QUIET, start_local_ray
from zeroflow.sweep.progress import Progress
from zeroflow.sweep.signals import stopped_like_interrupted
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import checkout_commit, code_state

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

    Ctrl-C, SIGTERM and SIGHUP end it in order; what is finished is in the store, and what is not goes on from its log the next time.

    Args:
        cells: what to run. store: where results go, each as soon as its cell is finished.
        placement: processes and resources of cells, and how many at a time. name: of the grid, for ``zeroflow status``.
        data_dir: of the data sets, on every node. address: a running Ray's, ``"auto"``, or None: the one that
            ``RAY_ADDRESS`` names, else a new local one.
        echo: receives progress lines.

    Raises:
        ConfigError: no node can hold a cell, or the store cannot be written; before anything runs.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    set_defaults({**RAY_SETTINGS, **({} if address else LOCAL_SETTINGS)})
    import ray

    from zeroflow.sweep import serve

    started_here = not ray.is_initialized()
    served = serve.wanted(cells, placement, local=started_here and not address)
    with changed_environment(serve.variables()) if served else nullcontext():
        if started_here:
            if address:
                ray.init(address, **QUIET)
            else:
                start_local_ray()
        with stopped_like_interrupted():  # Ray has just set handlers of its own
            try:
                if served:
                    url = serve.start(served)
                    placement = serve.placed_at(placement, url)
                    echo(f"{served.backbone} is served at {url}")
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
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from zeroflow.sweep.cell import run_cell
    from zeroflow.sweep.coordinator import SWEEPS, Desk, places
    from zeroflow.sweep.queue import CellQueue, Job

    def nodes() -> list[Node]:
        here = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [*here, *_to_come(here)]

    commit = checkout_commit()
    scratch = _scratch_folder()
    common = {
        "root": store.root, "data_dir": data_dir, "commit": commit, "code": code_state(commit), "scratch": scratch,
        "retries": placement.retries, "folder": placement.folder,
    }  # fmt: skip
    claims = desk = None
    try:
        queue = CellQueue(cells, placement, nodes, store, common)
        store.check_writable()
        claims = queue.claims = store.claims()
        record = SweepRecord(store, name, cells, dataclasses.asdict(placement), commit)
        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if more := _to_come(found):
            # Otherwise Tune waits for one cell's machine before it asks for the next one's.
            os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(10 * len(more)))
        echo(
            f"Ray {ray.__version__} at {ray.get_runtime_context().gcs_address}: {len(found)} node(s), "
            f"{sum(n.get('CPU', 0) for n in found):g} CPUs, {sum(n.get('GPU', 0) for n in found):g} GPUs"
            f"{f', {len(more)} more node(s) may come' if more else ''}; "
            f"{len(cells)} cells, {max(map(queue.at_a_time, {job.placement for job in queue.waiting}), default=0)} at a time"
        )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Calls that wait are many: of all groups of workers at once.
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=100_000)(Desk)
        sweep = random.randrange(1, SWEEPS)
        desk = remote.options(scheduling_strategy=here).remote(store.root, sweep)
        order = desk.keep_order.remote()

        def trial(setting: Mapping[str, Any]) -> None:
            run_cell(setting["one"], desk)

        def resources(setting: Mapping[str, Any]) -> Any:
            own = CellPlacement(**setting["one"]["placement"])
            return tune.PlacementGroupFactory([own.worker if own.workers_per_trial == 1 else _WAITING])

        def record_failure(job: Job, outcome: Mapping[str, Any]) -> None:
            row = records.failure(
                job.config, outcome["type"], outcome["message"], outcome["traceback"],
                placement.retries + 1 if outcome["kind"] == "died" else job.tries + 1,
            )  # fmt: skip
            try:
                store.write_failure(row)
            except (OSError, ConfigError) as refused:
                queue.stopped = f"results {store.root!r}: cannot be written: {refused}"

        trial.__name__ = "cell"
        progress = Progress(queue, echo, record_failure)
        tuner = tune.Tuner(
            tune.with_resources(trial, resources),
            tune_config=tune.TuneConfig(search_alg=queue, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="sweep", storage_path=scratch, verbose=0, callbacks=[progress.callback()],
                failure_config=tune.FailureConfig(max_failures=placement.retries),
            ),
        )  # fmt: skip
        with suppress(KeyboardInterrupt), progress.reporting(record), deaths_told_to_tune():
            tuner.fit()
        return SweepEnd(progress.failed, queue.stopped or ("interrupted" if queue.left else None))
    finally:
        if desk:
            # Tune remembers the trial's function, and with it the desk; and what it was about to give back stays else.
            with suppress(Exception):
                ray.get([desk.end.remote(), order], timeout=10)
            ray.kill(desk)
            for group in places(sweep).values():
                for place in group:
                    remove_placement_group(place)
        if claims:
            claims.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _to_come(here: Sequence[Node]) -> list[Node]:
    """The nodes that Ray's autoscaler may start beside those that are here; none where there is no autoscaler.

    Kinds of nodes with the same resources (spot and on demand) stand for one another, and those here count for theirs.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    most: dict[tuple[tuple[str, float], ...], int] = {}
    for group in config.node_group_configs if config else ():
        # What Ray itself adds to a node's resources (its kind of GPU, memory as measured) tells nothing of what fits.
        counted = {name: float(group.resources[name]) for name in ("CPU", "GPU", "memory") if group.resources.get(name)}
        kind = tuple(sorted(counted.items()))
        if kind:
            most[kind] = max(most.get(kind, 0), _ANY_NUMBER if group.max_count < 0 else group.max_count)
    found: list[Node] = []
    for kind, count in most.items():
        whole = {name: amount for name, amount in kind if name != "memory"}
        alive = sum(all(node.get(name, 0.0) == amount for name, amount in whole.items()) for node in here)
        found += [dict(kind)] * max(count - alive, 0)
    return found


_ANY_NUMBER = 1000
"""Nodes of a kind without a limit that are reckoned with."""


def _scratch_folder() -> str:
    """A folder for what Tune and Train insist on writing; those of processes that were killed are removed."""
    host = socket.gethostname()
    for old in Path(tempfile.gettempdir()).glob(f"zeroflow-{host}-*-*"):
        pid = old.name.removeprefix(f"zeroflow-{host}-").split("-")[0]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"zeroflow-{host}-{os.getpid()}-")


@contextmanager
def deaths_told_to_tune() -> Iterator[None]:
    """Let Tune count a process that Ray killed for its memory as one that died.

    Ray says so by an error of its own, which Tune 2.60 does not expect: it would end all trials.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import RayActorError, RayError, RayTaskError

    known = RayActorManager._actor_task_failed

    def told(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        known(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = told
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = known
