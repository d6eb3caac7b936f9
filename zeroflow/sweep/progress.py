"""A sweep's progress: a line for every finished cell, and one a minute while none finishes, on a terminal and in a log.

The same, as numbers, is written into the store every few seconds, for ``zeroflow status``.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroflow.results.sweeps import SweepRecord

if TYPE_CHECKING:
    from zeroflow.sweep.queue import CellQueue, Job

_WRITE_EVERY = 5.0
"""Seconds between two records of a sweep's state."""


class Progress:
    """Counts finished cells and foresees the rest from the seconds of those of the same method.

    Args:
        queue: of the sweep. echo: receives the lines. record_failure: ``(job, outcome)``, of every cell that failed.
    """

    def __init__(
        self, queue: CellQueue, echo: Callable[[str], None], record_failure: Callable[[Job, Mapping[str, Any]], None]
    ) -> None:
        self.queue, self.total, self.echo, self.record_failure = queue, len(queue.waiting), echo, record_failure
        self.done = self.failed = 0
        self.started = self.last_line = time.monotonic()
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._since: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes down what it was given, and nobody reads that

    def begun(self, trial_id: str) -> None:
        """A trial's process works on its cell."""
        self._since[trial_id] = datetime.now(UTC).isoformat(timespec="seconds")

    def ended(self, trial_id: str, outcome: Mapping[str, Any]) -> None:
        """A trial is over: count its cell, print its line, and have a failure recorded."""
        tried = self.queue.running.get(trial_id)
        if tried is None or "ok" not in outcome:  # stopped in the middle
            return
        job = self.queue.ended(trial_id, outcome)
        label, seconds = tried.config.label(), f"({outcome['cell_seconds']:.1f} s)" if "cell_seconds" in outcome else ""
        if job is None:
            if outcome["kind"] == "memory":
                self._line(f"{label}  out of memory, to be tried again with more  {seconds}")
            return
        if outcome["ok"]:
            self.done += 1
            text = f"Avg {outcome['avg']:.2f}  Last {outcome['last']:.2f}  Fgt {outcome['fgt']:.2f}"
        elif outcome["kind"] == "disk":
            text = f"NOT WRITTEN, the sweep ends: {outcome['message']}"
        else:
            self.failed += 1
            text = f"FAILED: {outcome['type']}: {outcome['message']}"
            self.record_failure(job, outcome)
        if "cell_seconds" in outcome:
            self._seconds[job.config.method].append(outcome["cell_seconds"])
        self._line(f"{label}  {(text.splitlines() or [''])[0][:200]}  {seconds}")

    @contextmanager
    def reporting(self, record: SweepRecord, silence: float = 60.0) -> Iterator[None]:
        """Write the record every few seconds, and print a line whenever none was printed for ``silence`` seconds."""
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

    def callback(self) -> Any:
        """A Tune callback that feeds this."""
        from ray import tune

        progress = self

        class Feed(tune.Callback):  # type: ignore[misc]
            def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                progress.begun(trial.trial_id)

            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                progress.ended(trial.trial_id, trial.last_result or {})

            def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                message = f"the process of the trial died: {_error_of(trial)}"
                kind = "memory" if "OutOfMemory" in message else "died"
                if trial.trial_id not in progress._since:
                    kind = "unbegun"  # a process that died between two cells
                outcome = {"ok": False, "kind": kind, "type": "TrialDied", "message": message, "traceback": message}
                progress.ended(trial.trial_id, outcome)

            def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
                # Tune gives some trials up without a word, such as one whose process would not be reset.
                if iteration % 100 == 0:
                    for trial in trials:
                        if trial.trial_id in progress.queue.running and trial.status == "ERROR":
                            self.on_trial_error(iteration, trials, trial)

        return Feed()

    def state(self) -> dict[str, Any]:
        """Numbers of this moment, plain JSON."""
        running = list(self.queue.running.items())
        return {
            "done": self.done, "failed": self.failed, "waiting": len(self.queue.waiting),
            "elsewhere": len(self.queue.claimed_elsewhere), "finished_elsewhere": self.queue.finished_elsewhere,
            "left_seconds": self.remaining(),
            "running": [
                {"cell_id": job.config.cell_id, "label": job.config.label(), "since": self._since.get(trial),
                 "workers": job.placement.workers_per_trial}
                for trial, job in running
            ],
        }  # fmt: skip

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


def _error_of(trial: Any) -> str:
    """What Tune knows of a trial's last error; it has not reached its storage yet, so from the file on this node."""
    try:
        from ray import cloudpickle

        return str(cloudpickle.loads(Path(trial.pickled_error_file).read_bytes()))
    except Exception:
        return "its log says more"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: ``1:02:03``, ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
