"""The queue: which cell runs next, as Ray Tune asks for one.

The most demanding cells come first. A cell starts when its workers fit beside those that run; where several sweeps write into
one store, when no other one has claimed it. One that ran out of memory comes again with what the grid allows.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.search import Searcher

from zeroflow.results.claims import Claims
from zeroflow.results.store import Store
from zeroflow.sweep.placement import CellPlacement, Node, SweepPlacement, cells_that_fit, on_cluster
from zeroflow.trial.config import TrialConfig

_LOOK_AGAIN = 2.0
"""Seconds until the cluster, and cells that another sweep runs, are looked at again."""


@dataclass(frozen=True)
class Job:
    """A cell to run. ``tries``: how often it ran out of memory."""

    config: TrialConfig
    placement: CellPlacement
    fits: int
    tries: int = 0


class CellQueue(Searcher):  # type: ignore[misc]
    """What Tune asks for its next trial.

    Args:
        cells: what to run. placement: of the sweep. nodes: resources of the cluster's nodes now.
        store: where cells are finished. common: what goes with every cell, see ``train.run_cell``.

    Attributes:
        claims: what keeps other sweeps from cells; None: nothing.
        running: jobs by Tune's trial. elsewhere: cells that other sweeps run. theirs: how many of those they have finished.
        stopped: why no further cell may start; None as long as they may.

    Raises:
        ConfigError: a cell that no node can hold.
    """

    def __init__(
        self,
        cells: Sequence[TrialConfig],
        placement: SweepPlacement,
        nodes: Callable[[], Sequence[Node]],
        store: Store,
        common: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.placement, self.store, self.common = placement, store, dict(common)
        self.claims: Claims | None = None
        self._nodes, self._seen, self._seen_at = nodes, nodes(), time.monotonic()
        self._known: dict[CellPlacement, int] = {}
        jobs = [self._job(config) for config in cells]
        self.waiting = deque(sorted(jobs, key=lambda job: job.fits))
        self.running: dict[str, Job] = {}
        self.elsewhere: list[TrialConfig] = []
        self.theirs: list[TrialConfig] = []
        self._asked_at = 0.0
        self.stopped: str | None = None

    @property
    def at_a_time(self) -> int:
        """How many of the least demanding cells run at a time."""
        most = max((job.fits for job in (*self.waiting, *self.running.values())), default=1)
        return min(most, self.placement.max_concurrent or most)

    # What Tune calls.

    def suggest(self, trial_id: str) -> Any:
        """The next cell's setting; None: not now; ``FINISHED``."""
        self._look_elsewhere()
        while self.waiting and not self.stopped and self._room_for(self.waiting[0]):
            job = self.waiting.popleft()
            cell = job.config.cell_id
            if not self._claim(cell):
                self.elsewhere.append(job.config)
            elif self.store.has(cell):
                self._release(cell)
                self.theirs.append(job.config)
            else:
                self.running[trial_id] = job
                return {"one": self._setting(job)}
        over = self.stopped or not (self.waiting or self.elsewhere)
        return Searcher.FINISHED if over and not self.running else None

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune's callbacks come with more and call ``ended``."""

    def save(self, checkpoint_path: str) -> None:
        """The store tells what is done: nothing of Tune's is ever restored."""

    def restore(self, checkpoint_path: str) -> None:
        """See ``save``."""

    # What the sweep calls.

    def ended(self, trial_id: str, outcome: Mapping[str, Any]) -> Job | None:
        """A trial is over: its cell is free again, and comes back if it ran out of memory and the grid allows more.

        Returns:
            The job, if that was its last try.
        """
        job = self.running.pop(trial_id, None)
        if job is None:
            return None
        self._release(job.config.cell_id)
        kind = outcome.get("kind")
        if kind == "memory" and job.tries < len(self.placement.out_of_memory):
            self.waiting.appendleft(self._job(job.config, job.tries + 1))
            return None
        if kind == "disk":
            self.stopped = str(outcome["message"])
        return job

    def _job(self, config: TrialConfig, tries: int = 0) -> Job:
        placement = on_cluster(self.placement.of(config, tries), self._seen)
        return Job(config, placement, self._fits(placement), tries)

    def _fits(self, placement: CellPlacement) -> int:
        if placement not in self._known:
            self._known[placement] = cells_that_fit(placement, self._seen)
        return self._known[placement]

    def _room_for(self, job: Job) -> bool:
        """Of cells of which n fit each takes an nth of the cluster."""
        if time.monotonic() - self._seen_at > _LOOK_AGAIN and (seen := self._nodes()):
            self._seen, self._seen_at = seen, time.monotonic()
            self._known.clear()
        if self.placement.max_concurrent and len(self.running) >= self.placement.max_concurrent:
            return False
        taken = sum(1 / self._now(other) for other in self.running.values())
        return taken + 1 / self._now(job) <= 1 + 1e-9

    def _now(self, job: Job) -> int:
        try:
            return self._fits(job.placement)
        except Exception:  # a node has left: one at a time waits for another one
            return 1

    def _claim(self, cell: str) -> bool:
        return self.claims is None or self.claims.take(cell)

    def _release(self, cell: str) -> None:
        if self.claims:
            self.claims.release(cell)

    def _setting(self, job: Job) -> dict[str, Any]:
        return {
            **self.common,
            "cell": job.config.canonical(),
            "placement": dataclasses.asdict(job.placement),
            "tries": job.tries,
            "last": job.tries >= len(self.placement.out_of_memory),
        }

    def _look_elsewhere(self) -> None:
        """See which of the others' cells are done, and which have been given up."""
        if not self.elsewhere or time.monotonic() - self._asked_at < _LOOK_AGAIN:
            return
        self._asked_at = time.monotonic()
        still = []
        for config in self.elsewhere:
            if self.store.has(config.cell_id):
                self.theirs.append(config)
            elif self._claim(config.cell_id):
                self.waiting.append(self._job(config))
            else:
                still.append(config)
        self.elsewhere = still
