"""Processes and resources of one cell; apart from the rules about them, so that a process that passes cells on needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zeroflow.errors import ConfigError
from zeroflow.trial.runtime import RuntimeOptions, require_amount, require_integer

_GIB = 2**30
MEMORY_BLOCK = 2**24
"""Bytes of which the memory that cells ask for is a multiple; why is told in ``zeroflow.sweep.reservations``."""


@dataclass(frozen=True)
class CellPlacement(RuntimeOptions):
    """Processes and resources of one cell.

    Attributes:
        workers_per_trial: processes that share a trial's work, at most: a cell gets no more than its step has
            evaluations to share.
        data_shards: into how many slices, each seen by workers of its own, a mini-batch is cut; divides the workers.
        cpus_per_worker: also its CPU threads.
        gpus_per_worker: may be a fraction; None: one where the cluster has any, else none.
        memory_per_worker: GiB that a node must have left for each; None: not asked for.
        endpoint: see ``RuntimeOptions``; None: the sweep starts one for cells that need it.

    Raises:
        ConfigError: a value is wrong, or the slices do not divide the workers.
    """

    workers_per_trial: int = 1
    data_shards: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None
    memory_per_worker: float | None = None

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
            for name in ("workers_per_trial", "data_shards", "cpus_per_worker"):
                require_integer(name, getattr(self, name), 1)
            for name in ("gpus_per_worker", "memory_per_worker"):
                require_amount(name, getattr(self, name))
            gpus = self.gpus_per_worker
            if gpus is not None and gpus > 1 and gpus != int(gpus):
                raise ConfigError(f"gpus_per_worker={gpus!r}: expected a whole number above 1")
            if self.workers_per_trial % self.data_shards:
                raise ConfigError(
                    f"data_shards={self.data_shards}: expected a divisor of workers_per_trial={self.workers_per_trial}"
                )
        except ConfigError as error:
            raise ConfigError(f"placement.{error}") from None

    @property
    def worker(self) -> dict[str, float]:
        """What one worker asks Ray for; memory in whole blocks, see ``MEMORY_BLOCK``."""
        memory = math.ceil((self.memory_per_worker or 0) * _GIB / MEMORY_BLOCK) * MEMORY_BLOCK
        asked = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker or 0, "memory": memory}
        return {name: float(amount) for name, amount in asked.items() if amount}
