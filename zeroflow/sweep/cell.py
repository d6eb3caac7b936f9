"""Computing one cell in a process of Ray, alone or together with others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ray
import ray.train.torch
import torch

from zeroflow.imports import run_source
from zeroflow.models.named import find_modules_in
from zeroflow.optim import Executor, NonFiniteLoss
from zeroflow.results import rows
from zeroflow.sweep.failures import failed
from zeroflow.sweep.messages import CellDone, CellTask, Outcome
from zeroflow.sweep.unfinished import UnfinishedWork

if TYPE_CHECKING:
    from zeroflow import Placement


def compute(task: CellTask, coordinator: Any, executor: Executor | None = None) -> Outcome:
    """Compute one cell, the whole stream; the first process has the result written.

    Args:
        task: the cell.
        coordinator: handle of the ``Coordinator``.
        executor: shares the optimizer's evaluations with other processes; None: this process is alone.

    Returns:
        The outcome. Together with others only an error that all of them have alike is returned, any other one is raised.
    """
    from zeroflow import run_trial

    if task.sweep.commit:
        os.environ["ZEROFLOW_GIT_COMMIT"] = task.sweep.commit
    if task.sweep.module_folder:
        find_modules_in(task.sweep.module_folder)
    for source in task.sweep.imports:
        run_source(source)
    first = executor is None or executor.rank == 0
    work = UnfinishedWork(task, copied=first)
    try:
        with work.synchronised():
            result = run_trial(
                task.config,
                _placement(task, executor),
                executor=executor,
                folder=work.folder,
                tasks_folder=work.tasks_folder,
            )
        if first:
            workers, shards = task.placement.workers_per_trial, task.placement.data_shards
            tables = rows.tables(result, workers=workers, shards=shards, ray_version=ray.__version__)
            ray.get(coordinator.write.remote(tables))
    except Exception as error:
        if executor is not None and not isinstance(error, NonFiniteLoss):
            raise
        if isinstance(error, NonFiniteLoss):
            work.discard()
        return failed(error)
    finally:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # a neighbour on the same GPU may need it
    if first:
        work.discard_all_versions()
    return CellDone(*(float(result.summary[key]) for key in ("avg", "last", "fgt")))


def _placement(task: CellTask, executor: Executor | None) -> Placement:
    device = "cpu"
    if task.placement.gpus_per_worker:
        # Alone in its process a trial sees its own GPU as the only one.
        device = str(ray.train.torch.get_device()) if executor else "cuda"
    threads = task.placement.cpus_per_worker
    return task.placement.trial_placement(
        data_dir=task.sweep.data_dir, device=device, threads=threads, results=task.sweep.results
    )
