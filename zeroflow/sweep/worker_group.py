"""A group of Ray Train workers that works on one cell after the other.

Starting a group costs many times what a small cell does: a controller, the workers, their imports, their connections. So the
process of a Tune trial, which Tune hands from cell to cell, keeps its group as long as cells want the same. The group is one
run of Ray Train, whose loop asks the coordinator for cells; when a worker dies, Ray Train starts the workers anew, and they go on
with the cell they were at, from its checkpoint and its log.
"""

from __future__ import annotations

import datetime
import threading
import uuid
from typing import Any, ClassVar

import ray
import ray.train
import ray.train.torch
from ray.train import TrainingFailedError

from zeroflow.grid.cell_placement import CellPlacement
from zeroflow.sweep.failures import GroupDied
from zeroflow.sweep.messages import CellTask, Outcome
from zeroflow.sweep.rendezvous import RendezvousConfig
from zeroflow.sweep.reservations import with_number

_FOREVER = datetime.timedelta(days=30)
"""How long workers wait for each other: between cells as long as it takes. That somebody is dead they learn from Ray."""


class WorkerGroup:
    """A running group.

    Args:
        placement: of its cells.
        loop: the Ray Train loop, called with ``{"coordinator": handle, "group": name, "shards": number}``.
        coordinator: handle of the ``Coordinator``.
        retries: deaths of workers, preemptions apart, until the group ends.
        scratch: folder for what Ray Train insists on writing.
    """

    kept: ClassVar[WorkerGroup | None] = None
    """The group of this process."""

    name: str
    """By which the coordinator knows it."""
    reservation: int
    """Number of what it holds on the cluster, see ``reservations``."""
    number: int
    """Of the cell in work, among those of this group."""

    @classmethod
    def of(cls, placement: CellPlacement, *arguments: Any) -> WorkerGroup:
        """This process's group, if it is alive and has this placement, or else a new one in its place."""
        if cls.kept and (cls.kept.placement != placement or cls.kept.error):
            cls.kept.leave()
        if cls.kept is None:
            cls.kept = cls(placement, *arguments)
        return cls.kept

    def __init__(self, placement: CellPlacement, loop: Any, coordinator: Any, retries: int, scratch: str) -> None:
        self.placement, self.coordinator, self.name = placement, coordinator, uuid.uuid4().hex
        self.reservation: int = ray.get(coordinator.new_reservation.remote())
        self.error: BaseException | None = None
        self.number = self._cells = 0
        gpus, resources = placement.gpus_per_worker or 0.0, with_number(placement.worker, self.reservation)
        # nccl for gradients, where each worker has a GPU of its own; it refuses two on one. A few numbers go by gloo anyway.
        backend = "cpu:gloo,cuda:nccl" if gpus >= 1 else "gloo"
        self._trainer = ray.train.torch.TorchTrainer(
            loop,
            train_loop_config={"coordinator": coordinator, "group": self.name, "shards": placement.data_shards},
            torch_config=RendezvousConfig(backend=backend, timeout_s=int(_FOREVER.total_seconds())),
            scaling_config=ray.train.ScalingConfig(
                num_workers=placement.workers_per_trial, use_gpu=gpus > 0, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name=self.name, storage_path=scratch, failure_config=ray.train.FailureConfig(max_failures=retries)
            ),
        )
        self._watch = coordinator.watch.remote(self.reservation, ray.get_runtime_context().current_actor)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def run(self, task: CellTask) -> Outcome:
        """Have a cell worked on, and wait for its outcome.

        Raises:
            GroupDied: the group ended before it had one; ``Coordinator.times_begun`` tells how often it had begun.
        """
        number = self.number = self._cells
        self._cells += 1
        outcome = self.coordinator.run_task.remote(self.name, number, task)
        while self._thread.is_alive():
            if ray.wait([outcome], timeout=1.0)[0]:
                return ray.get(outcome)
        if ray.wait([outcome], timeout=0)[0]:
            return ray.get(outcome)
        ray.cancel(outcome)
        raise GroupDied(f"the group of workers ended: {self.error}") from self.error

    @property
    def worn_out(self) -> bool:
        """Whether it ended because its workers had died too often, rather than its controller."""
        return isinstance(self.error, TrainingFailedError)

    def leave(self) -> None:
        """End the group."""
        type(self).kept = None
        if self._thread.is_alive():
            end = self.coordinator.run_task.remote(self.name, self._cells, None)
            self._thread.join(timeout=30.0)  # or it waits for a node that has gone
            ray.cancel(end)
        ray.get(self.coordinator.close.remote(self.name, self.reservation))

    def _work(self) -> None:
        try:
            self._trainer.fit()
            self.error = RuntimeError("its loop ended")
        except BaseException as error:
            self.error = error
