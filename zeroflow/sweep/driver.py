"""Running a plan: every missing cell as a Tune trial, as many at a time as the cluster holds."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroflow.grid.placement import SweepPlacement
from zeroflow.imports import imported_files
from zeroflow.results.store import Store
from zeroflow.results.sweeps import SweepRecord, is_alive
from zeroflow.sweep.environment import LOCAL_SETTINGS, RAY_SETTINGS, changed_environment, set_defaults
from zeroflow.sweep.local_ray import QUIET, start_local_ray
from zeroflow.sweep.messages import SweepContext
from zeroflow.sweep.progress import Progress
from zeroflow.sweep.ray_watch import ended_if_ray_dies
from zeroflow.sweep.signals import stopped_like_interrupted
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import checkout_commit, code_state

if TYPE_CHECKING:
    from zeroflow.sweep.queue import CellQueue


@dataclass(frozen=True)
class SweepEnd:
    """How a sweep ended.

    Attributes:
        failed: cells that failed.
        stopped: why it ended before all cells had run; None: it did not.
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

    Ctrl-C, SIGTERM and SIGHUP end it in order; what is finished is in the store, and what is not resumes from its log the next
    time.

    Args:
        cells: what to run.
        store: where results go, each as soon as its cell is finished.
        placement: processes and resources of cells, and how many at a time.
        name: of the grid, for ``zeroflow status``.
        data_dir: of the data sets, on every node.
        address: a running Ray's, ``"auto"``, or None: the one that ``RAY_ADDRESS`` names, else a new local one.
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
                with ended_if_ray_dies():
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
    """Run cells on the Ray that this process is connected to; see ``run_sweep``."""
    from zeroflow.sweep.coordinator import running_coordinator
    from zeroflow.sweep.nodes import present_and_to_come
    from zeroflow.sweep.queue import CellQueue
    from zeroflow.sweep.tune_events import deaths_told_to_tune

    commit = checkout_commit()
    with _scratch_folder() as scratch:
        context = SweepContext(
            store.root,
            data_dir,
            commit,
            "-".join([code_state(commit), *(source.digest for source in imported_files())]),
            scratch,
            placement.retries,
            placement.folder,
            imported_files(),
        )
        queue = CellQueue(cells, placement, present_and_to_come, store, context)
        store.check_writable()
        with closing(store.claims()) as claims:
            queue.claims = claims
            record = SweepRecord(store, name, cells, dataclasses.asdict(placement), commit)
            echo(_first_line(queue))
            progress = Progress(queue, echo)
            with running_coordinator(store.root) as coordinator:
                tuner = _tuner(coordinator, queue, progress, context)
                with suppress(KeyboardInterrupt), progress.reporting(record), deaths_told_to_tune():
                    tuner.fit()
            return SweepEnd(progress.failed, queue.stopped or ("interrupted" if queue.left else None))


def _first_line(queue: CellQueue) -> str:
    """Which Ray a sweep runs on, with what, and how many cells at a time."""
    import ray

    from zeroflow.sweep.nodes import nodes_to_come, present_nodes

    present = present_nodes()
    jobs = queue.waiting
    most = max(map(queue.at_a_time, {job.placement for job in jobs}), default=0)
    more = f", {len(to_come)} more node(s) may come" if (to_come := nodes_to_come(present)) else ""
    return (
        f"Ray {ray.__version__} at {ray.get_runtime_context().gcs_address}: {len(present)} node(s), "
        f"{sum(node.get('CPU', 0) for node in present):g} CPUs, {sum(node.get('GPU', 0) for node in present):g} GPUs"
        f"{more}; {len(jobs)} cells, {most} at a time"
    )


def _tuner(coordinator: Any, queue: CellQueue, progress: Progress, context: SweepContext) -> Any:
    """What runs a trial for every cell of the queue, in processes that are kept from cell to cell."""
    from ray import tune

    from zeroflow.sweep.trainable import trainable
    from zeroflow.sweep.tune_events import ProgressCallback

    return tune.Tuner(
        trainable(coordinator),
        tune_config=tune.TuneConfig(search_alg=queue, num_samples=-1, reuse_actors=True),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=context.scratch,
            verbose=0,
            callbacks=[ProgressCallback(progress)],
            failure_config=tune.FailureConfig(max_failures=context.retries),
        ),
    )


@contextmanager
def _scratch_folder() -> Iterator[str]:
    """A folder for what Tune and Train insist on writing; those of processes that were killed are removed too."""
    host = socket.gethostname()
    for old in Path(tempfile.gettempdir()).glob(f"zeroflow-{host}-*-*"):
        pid = old.name.removeprefix(f"zeroflow-{host}-").split("-")[0]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"zeroflow-{host}-{os.getpid()}-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
