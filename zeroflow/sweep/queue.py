"""The queue: which cell runs next, as Ray Tune asks for one.

The most demanding cells come first, of those that need as much the cheapest: a sweep's first rows appear early. A cell starts
when its workers fit beside those that run and beside what more demanding ones wait for; where several sweeps write into one
store, when no other one has claimed it. One that ran out of memory comes again with what the grid allows.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.search import Searcher

from zeroflow.errors import ConfigError
from zeroflow.grid.cell_placement import CellPlacement
from zeroflow.grid.cost_estimate import work
from zeroflow.grid.placement import Node, SweepPlacement, cells_that_fit, on_cluster
from zeroflow.results import rows
from zeroflow.results.claims import Claims
from zeroflow.results.store import Store
from zeroflow.sweep.messages import CellFailed, CellTask, FailureKind, Outcome, SweepContext
from zeroflow.sweep.trainable import TASK
from zeroflow.trial.config import TrialConfig

_LOOK_AGAIN = 2.0
"""Seconds until the cluster, and cells that another sweep runs, are looked at again."""

_PATIENCE = 300.0
"""Seconds that the store may be out of reach before the sweep ends."""

_FALSE_STARTS = 10
"""How many processes may die before they begin with a cell, beyond its retries: of that the cell is innocent, as where memory is
short and its neighbour takes it."""


@dataclass(frozen=True)
class Job:
    """A cell to run.

    Attributes:
        config: what to compute.
        placement: with which processes.
        tries: how often it ran out of memory.
        unbegun: how often a process died before it began with the cell.
    """

    config: TrialConfig
    placement: CellPlacement
    tries: int = 0
    unbegun: int = 0


class CellQueue(Searcher):  # type: ignore[misc]
    """What Tune asks for its next trial.

    Args:
        cells: what to run.
        placement: of the sweep.
        nodes: resources of the cluster's nodes now.
        store: where cells are finished.
        context: what goes with every cell.

    Attributes:
        claims: what keeps other sweeps from cells; None: nothing.
        running: jobs by Tune's trial.
        claimed_elsewhere: jobs whose cells other sweeps run.
        finished_elsewhere: how many of those have ended.
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
        context: SweepContext,
    ) -> None:
        super().__init__()
        self.placement, self.store, self.context = placement, store, context
        self.claims: Claims | None = None
        self.running: dict[str, Job] = {}
        self.claimed_elsewhere: list[Job] = []
        self.finished_elsewhere = 0
        self.stopped: str | None = None
        self._looked_at, self._reached_at = 0.0, time.monotonic()
        self._failed_before = store.failures()
        self._nodes, self._seen, self._seen_at = nodes, nodes(), time.monotonic()
        self._fits: dict[CellPlacement, int] = {}
        for config in cells:  # what it may come to must be possible too
            for tries in range(1, len(placement.out_of_memory) + 1):
                self._most(self._placed(config, tries))
        jobs = [Job(config, self._placed(config)) for config in cells]
        self._waiting: dict[CellPlacement, deque[Job]] = defaultdict(deque)
        for job in sorted(jobs, key=lambda job: (self._most(job.placement), work(vars(job.config)))):
            self._waiting[job.placement].append(job)

    @property
    def waiting(self) -> list[Job]:
        """Jobs that have not begun."""
        return [job for jobs in list(self._waiting.values()) for job in list(jobs)]

    @property
    def left(self) -> bool:
        """Whether anything is still to do."""
        return any(self._waiting.values()) or bool(self.running or self.claimed_elsewhere)

    def at_a_time(self, placement: CellPlacement) -> int:
        """How many such cells run at a time when there are no others."""
        try:
            most = self._most(placement)
        except ConfigError:  # a node has left; another one may come
            most = 1
        return min(most, self.placement.max_concurrent or most)

    # What Tune calls. An exception would end all trials.

    def suggest(self, trial_id: str) -> Any:
        """The next cell's setting; None: not now; ``FINISHED``."""
        if self.stopped or not self.left:
            return None if self.running else Searcher.FINISHED
        try:
            self._look_around()
            for jobs in self._startable():
                job = jobs.popleft()
                try:
                    mine = self._begin(job)
                except Exception:
                    jobs.appendleft(job)
                    raise
                self._reached_at = time.monotonic()
                if mine:
                    self.running[trial_id] = job
                    return {TASK: CellTask(job.config, job.placement, self.context)}
            self._reached_at = time.monotonic()
        except (OSError, ConfigError) as error:  # out of reach for now, it may be
            if time.monotonic() - self._reached_at > _PATIENCE:
                self.stopped = str(error)
        return None

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes down what it was given, and nobody reads that

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune's callbacks come with more and call ``ended``."""

    def save(self, checkpoint_path: str) -> None:
        """The store tells what is done: nothing of Tune's is ever restored."""

    def restore(self, checkpoint_path: str) -> None:
        """See ``save``."""

    # What the sweep calls.

    def ended(self, trial_id: str, outcome: Outcome) -> Job | None:
        """A trial is over.

        A cell that ran out of memory comes back if the grid allows more, and one that its process never began with, too.

        Args:
            trial_id: Tune's.
            outcome: of the trial's cell.

        Returns:
            The job, if that was its last try.
        """
        job = self.running.pop(trial_id)
        kind = outcome.kind if isinstance(outcome, CellFailed) else None
        again: Job | None = None
        if kind is FailureKind.OUT_OF_MEMORY and job.tries < len(self.placement.out_of_memory):
            again = dataclasses.replace(job, placement=self._placed(job.config, job.tries + 1), tries=job.tries + 1)
        elif kind is FailureKind.NOT_BEGUN and job.unbegun < self.placement.retries + _FALSE_STARTS:
            again = dataclasses.replace(job, unbegun=job.unbegun + 1)
        if again:  # what is claimed stays so
            self._waiting[again.placement].appendleft(again)
            return None
        if self.claims:
            self.claims.release(job.config.cell_id)
        if isinstance(outcome, CellFailed) and kind is FailureKind.DISK_FULL:
            self.stopped = outcome.message
        return job

    def write_failure(self, job: Job, failed: CellFailed) -> None:
        """Write down that a cell has failed for good; if that cannot be written no further cell starts."""
        attempts = self.placement.retries + 1 if failed.kind is FailureKind.PROCESS_DIED else job.tries + 1
        row = rows.failure(job.config, failed.error, failed.message, failed.traceback, attempts)
        try:
            self.store.write_failure(row)
        except (OSError, ConfigError) as refused:
            self.stopped = f"results {self.store.root!r}: cannot be written: {refused}"

    def _placed(self, config: TrialConfig, tries: int = 0) -> CellPlacement:
        return on_cluster(self.placement.of(config, tries), self._seen)

    def _most(self, placement: CellPlacement) -> int:
        if placement not in self._fits:
            self._fits[placement] = cells_that_fit(placement, self._seen)
        return self._fits[placement]

    def _startable(self) -> Iterator[deque[Job]]:
        """Waiting jobs that may start now, the most demanding placement first."""
        if self.placement.max_concurrent and len(self.running) >= self.placement.max_concurrent:
            return
        room: dict[str, float] = defaultdict(float)
        for node in self._seen:
            for name, amount in node.items():
                room[name] += amount
        beside: dict[CellPlacement, int] = defaultdict(int)
        for job in self.running.values():
            beside[job.placement] += 1
            _take(room, job.placement)
        for placement, jobs in list(self._waiting.items()):
            try:
                most = self._most(placement)
            except ConfigError:
                continue  # no node can hold it any more; others need not wait for one that can
            while jobs and beside[placement] < most and _has(room, placement):
                yield jobs
            if jobs:
                _take(room, placement)  # less demanding ones leave what this one waits for

    def _begin(self, job: Job) -> bool:
        """Claim a job's cell; False if another sweep has it, or has finished it."""
        cell = job.config.cell_id
        if self.claims and not self.claims.take(cell):
            self.claimed_elsewhere.append(job)
            return False
        if not self._is_over(cell):
            return True
        if self.claims:
            self.claims.release(cell)
        self.finished_elsewhere += 1
        return False

    def _is_over(self, cell: str) -> bool:
        """Whether a cell is done, or has failed in another sweep since this one began: clocks may differ, files tell."""
        failed = self.store.failure(cell)
        return self.store.has(cell) or (failed is not None and failed != self._failed_before.get(cell))

    def _look_around(self) -> None:
        """See what nodes there are, and, when nothing else waits, what has become of the cells of other sweeps."""
        now = time.monotonic()
        if now - self._seen_at > _LOOK_AGAIN and (seen := self._nodes()):
            self._seen, self._seen_at = seen, now
            self._fits.clear()
        if self.claimed_elsewhere and not any(self._waiting.values()) and now - self._looked_at > _LOOK_AGAIN:
            self._looked_at = now
            theirs, self.claimed_elsewhere = self.claimed_elsewhere, []
            for job in theirs:
                self._waiting[job.placement].append(job)  # to be claimed once more


def _has(room: Mapping[str, float], placement: CellPlacement) -> bool:
    workers = placement.workers_per_trial
    return all(room.get(name, 0.0) - workers * amount > -1e-6 for name, amount in placement.worker.items())


def _take(room: dict[str, float], placement: CellPlacement) -> None:
    for name, amount in placement.worker.items():
        room[name] -= placement.workers_per_trial * amount
