"""A sweep's progress: a line for every finished cell, and one a minute while none finishes, on a terminal and in a log.

The same, as numbers, is written into the store every few seconds, for ``zeroflow status``.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from zeroflow.grid.labels import labels
from zeroflow.results.sweeps import SweepRecord
from zeroflow.sweep.messages import CellDone, CellFailed, FailureKind, Outcome

if TYPE_CHECKING:
    from zeroflow.sweep.queue import CellQueue
    from zeroflow.trial.config import TrialConfig

_WRITE_EVERY = 5.0
"""Seconds between two records of a sweep's state."""


class Progress:
    """Counts finished cells and foresees the rest from the seconds of those of the same method.

    Args:
        queue: of the sweep.
        echo: receives the lines.
    """

    def __init__(self, queue: CellQueue, echo: Callable[[str], None]) -> None:
        self.queue, self.total, self.echo = queue, len(queue.waiting), echo
        self.names = labels([job.config for job in queue.waiting])
        self.done = self.failed = 0
        self.started = self.last_line = time.monotonic()
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._since: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes down what it was given, and nobody reads that

    def name(self, config: TrialConfig) -> str:
        """A cell as a line names it."""
        return self.names.get(config.cell_id) or config.label()

    def begun(self, trial_id: str) -> None:
        """A trial's process works on its cell."""
        self._since[trial_id] = datetime.now(UTC).isoformat(timespec="seconds")

    def ended(self, trial_id: str, outcome: Outcome, seconds: float | None = None) -> None:
        """A trial is over: count its cell, print its line, and have a failure recorded.

        Args:
            trial_id: Tune's.
            outcome: of the trial's cell.
            seconds: that the cell took; None: not known.
        """
        tried = self.queue.running.get(trial_id)
        if tried is None:
            return
        job, took = self.queue.ended(trial_id, outcome), "" if seconds is None else f"({seconds:.1f} s)"
        if job is None:
            if isinstance(outcome, CellFailed) and outcome.kind is FailureKind.OUT_OF_MEMORY:
                self._line(f"{self.name(tried.config)}  out of memory, to be tried again with more  {took}")
            return
        if isinstance(outcome, CellDone):
            self.done += 1
            text = f"Avg {outcome.avg:.2f}  Last {outcome.last:.2f}  Fgt {outcome.fgt:.2f}"
        elif outcome.kind is FailureKind.DISK_FULL:
            text = f"NOT WRITTEN, the sweep ends: {outcome.message}"
        else:
            self.failed += 1
            text = f"FAILED: {outcome.error}: {outcome.message}"
            self.queue.write_failure(job, outcome)
        if seconds is not None:
            self._seconds[job.config.method].append(seconds)
        self._line(f"{self.name(job.config)}  {(text.splitlines() or [''])[0][:200]}  {took}")

    def died(self, trial_id: str, message: str) -> None:
        """A trial's process is dead, after as many tries as it may have.

        Args:
            trial_id: Tune's.
            message: what Tune knows of it.
        """
        kind = FailureKind.OUT_OF_MEMORY if "OutOfMemory" in message else FailureKind.PROCESS_DIED
        if trial_id not in self._since:
            kind = FailureKind.NOT_BEGUN  # a process that died between two cells
        self.ended(trial_id, CellFailed(kind, "TrialDied", message, message))

    @contextmanager
    def reporting(self, record: SweepRecord, silence: float = 60.0) -> Iterator[None]:
        """Write the record every few seconds, and print a line when none was printed for a while.

        Args:
            record: of the sweep.
            silence: that while, in seconds.
        """
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_WRITE_EVERY):
                try:
                    record.write("running", self.state())
                except Exception:  # full, or out of reach for now; that cells can be written is what counts
                    continue
                finally:
                    if time.monotonic() - self.last_line > silence:
                        theirs = len(self.queue.claimed_elsewhere)
                        waits = f", {theirs} by other sweeps" if theirs else ""
                        self._line(f"running: {len(self.queue.running)} cells{waits}")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        ended = "interrupted"
        try:
            yield
            ended = self.queue.stopped or ("interrupted" if self.queue.left else "finished")
        finally:
            stop.set()
            thread.join()
            try:
                record.end(ended, self.state())
            except Exception as error:
                self.echo(f"the sweep's record was not written: {error}")

    def state(self) -> dict[str, Any]:
        """Numbers of this moment, plain JSON."""
        running = list(self.queue.running.items())
        return {
            "done": self.done,
            "failed": self.failed,
            "waiting": len(self.queue.waiting),
            "elsewhere": len(self.queue.claimed_elsewhere),
            "finished_elsewhere": self.queue.finished_elsewhere,
            "left_seconds": self.remaining(),
            "running": [
                {
                    "cell_id": job.config.cell_id,
                    "label": self.name(job.config),
                    "since": self._since.get(trial),
                    "workers": job.placement.workers_per_trial,
                }
                for trial, job in running
            ],
        }

    def remaining(self) -> float | None:
        """Foreseen seconds until the end; None before the first cell is finished."""
        every = [s for seconds in list(self._seconds.values()) for s in seconds]
        if not every:
            return None
        mean = sum(every) / len(every)
        rest = 0.0
        for job in (*self.queue.waiting, *list(self.queue.running.values())):
            alike = self._seconds.get(job.config.method)
            rest += (sum(alike) / len(alike) if alike else mean) / self.queue.at_a_time(job.placement)
        return rest

    def _line(self, text: str) -> None:
        self.last_line = time.monotonic()
        rest = self.remaining()
        foreseen = "" if rest is None else f"  left ~{duration(rest)}"
        failed = f"  {self.failed} failed" if self.failed else ""
        ended = self.done + self.failed + self.queue.finished_elsewhere
        elapsed = duration(time.monotonic() - self.started)
        with suppress(OSError):  # whoever listened has gone
            self.echo(f"[{ended}/{self.total}  {elapsed}{foreseen}{failed}]  {text}")


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: ``1:02:03``, ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
