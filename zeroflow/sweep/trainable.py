"""What Ray runs of a sweep: a Tune trial for one cell, which runs a Ray Train loop over the cell's workers.

With one worker per trial the loop runs in the Tune trial's own process (Ray Train's local mode), which Tune then hands to
the next cell: no process starts, nothing is imported again. With more, a group of Ray Train workers shares the work of each
step, and is kept from cell to cell likewise (``WorkerGroup``).
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray import tune

from zeroflow.sweep.cell import compute
from zeroflow.sweep.failures import GroupDied, cause_of, failed
from zeroflow.sweep.messages import CellTask, Outcome
from zeroflow.sweep.worker_group import WorkerGroup

TASK = "task"
"""Key of a Tune trial's configuration: its ``CellTask``."""

OUTCOME, SECONDS = "outcome", "cell_seconds"
"""Keys of a Tune trial's result: its ``Outcome``, and how long its cell took."""

_UNBEGUN_GROUPS = 3
"""How many groups of workers may end before they begin with a cell, beyond its retries."""

# What a Tune trial holds while Ray Train's workers do its work. Any share of a CPU would be missing for the last worker
# of a full cluster, which then never starts; nothing at all is refused.
_WAITING = {"memory": 1.0}


def trainable(coordinator: Any) -> Any:
    """What ``tune.Tuner`` runs for every cell, with the resources that the cell asks for.

    Args:
        coordinator: handle of the ``Coordinator``.
    """

    def cell(setting: Mapping[str, Any]) -> None:
        run_cell(setting[TASK], coordinator)

    return tune.with_resources(cell, _resources)


def _resources(setting: Mapping[str, Any]) -> Any:
    placement = setting[TASK].placement
    return tune.PlacementGroupFactory([placement.worker if placement.workers_per_trial == 1 else _WAITING])


def run_cell(task: CellTask, coordinator: Any) -> None:
    """A Tune trial: run one cell, and have it written before Tune hears of it."""
    started = time.monotonic()
    # Of a trial that died after its cell was written, and was started again.
    outcome: Outcome | None = ray.get(coordinator.done.remote(task.config.cell_id))
    if outcome is None:
        run = _in_this_process if task.placement.workers_per_trial == 1 else _in_a_worker_group
        outcome = run(task, coordinator)
    tune.report({OUTCOME: outcome, SECONDS: time.monotonic() - started})


def _in_this_process(task: CellTask, coordinator: Any) -> Outcome:
    placement = task.placement
    trainer = ray.train.torch.TorchTrainer(
        lambda: compute(task, coordinator),
        scaling_config=ray.train.ScalingConfig(
            num_workers=0, use_gpu=bool(placement.gpus_per_worker), resources_per_worker=placement.worker
        ),
        run_config=ray.train.RunConfig(name=task.config.cell_id, storage_path=task.sweep.scratch),
    )
    outcome: Outcome = trainer.fit().return_value
    return outcome


def _in_a_worker_group(task: CellTask, coordinator: Any) -> Outcome:
    deaths, groups, retries = 0, 0, task.sweep.retries
    while True:
        group = WorkerGroup.of(task.placement, worker_loop, coordinator, retries, task.sweep.scratch)
        try:
            return group.run(task)
        except GroupDied as death:
            # Only what happened while this cell was in work counts, and none of the preemptions, which wear no group out.
            begun = ray.get(coordinator.times_begun.remote(group.name, group.number))
            deaths += min(begun, retries + 1 if group.worn_out else 1)
            groups += 1
            if deaths > retries or groups > retries + _UNBEGUN_GROUPS:
                return failed(cause_of(death))


def worker_loop(options: Mapping[str, Any]) -> None:
    """The Ray Train loop of a worker group: one cell after the other, until there is none any more.

    Args:
        options: ``coordinator``, ``group`` (its name), ``shards`` (slices of a mini-batch).
    """
    from zeroflow.optim.executor import PeerError
    from zeroflow.optim.parallel import DistributedExecutor

    coordinator, group = options["coordinator"], options["group"]
    executor = DistributedExecutor(shards=options["shards"])
    while True:
        found = _next_task(coordinator, group) if executor.rank == 0 else None
        number, task = pickle.loads(executor.broadcast(pickle.dumps(found)))
        if task is None:
            return
        broken: Exception | None = None
        if executor.rank == 0:
            ray.get(coordinator.begin_task.remote(group, number))
        try:
            outcome = compute(task, coordinator, executor)
        except PeerError:
            raise  # another worker says what it was, or is dead: then this cell is worked on again
        except Exception as error:
            outcome, broken = failed(error), error
        if broken or executor.rank == 0:
            ray.get(coordinator.end_task.remote(group, number, outcome))
        if broken:
            raise broken  # the others may wait for this one in the middle of a step: all begin anew


def _next_task(coordinator: Any, group: str) -> tuple[int, CellTask | None]:
    """The next cell of a group. One that is done already (the coordinator was killed before it told) is answered at once."""
    while True:
        number, task = ray.get(coordinator.next_task.remote(group))
        done = task and ray.get(coordinator.done.remote(task.config.cell_id))
        if not done:
            return number, task
        ray.get(coordinator.end_task.remote(group, number, done))
