"""A sweep's progress: a line for every finished cell, and one a minute while none finishes, on a terminal and in a log."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from zeroflow.trial.config import TrialConfig


class Progress:
    """Counts finished cells and foresees the rest from the seconds of those of the same method.

    Args:
        cells: all cells of the sweep. concurrency: how many run at a time. echo: receives the lines.
    """

    def __init__(self, cells: Sequence[TrialConfig], concurrency: int, echo: Callable[[str], None]) -> None:
        self.waiting = {config.cell_id: config for config in cells}
        self.total, self.concurrency, self.echo = len(cells), concurrency, echo
        self.finished = self.failed = 0
        self.started = self.last_line = time.monotonic()
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._died: list[tuple[TrialConfig, Exception]] = []

    def cell_done(self, cell_id: str, report: dict[str, Any]) -> None:
        """Count a cell that ended by itself, well or not, and print its line."""
        config = self.waiting.pop(cell_id, None)
        if config is None:
            return
        self.finished += 1
        self._seconds[config.method].append(report["cell_seconds"])
        if report["ok"]:
            outcome = f"Avg {report['avg']:.2f}  Last {report['last']:.2f}  Fgt {report['fgt']:.2f}"
        else:
            self.failed += 1
            outcome = f"FAILED: {report['error']}".splitlines()[0][:200]
        self._line(f"{config.label()}  {outcome}  ({report['cell_seconds']:.1f} s)")

    def cell_died(self, cell_id: str, error: Exception) -> None:
        """Count a cell whose process ended without a word, after all retries."""
        config = self.waiting.pop(cell_id, None)
        if config is None:
            return
        self.finished += 1
        self.failed += 1
        self._died.append((config, error))
        self._line(f"{config.label()}  DIED: {error}".splitlines()[0][:200])

    def died(self) -> list[tuple[TrialConfig, Exception]]:
        """Cells whose process died, with the error."""
        return self._died

    @contextmanager
    def beating(self, every: float = 60.0) -> Iterator[None]:
        """Print a line whenever none was printed for ``every`` seconds."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(1.0):
                if time.monotonic() - self.last_line > every:
                    self._line("running")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def callback(self) -> Any:
        """A Tune callback that feeds this."""
        from ray import tune

        progress = self

        class Feed(tune.Callback):  # type: ignore[misc]
            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                progress.cell_done(_cell_id(trial), trial.last_result)

            def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                progress.cell_died(_cell_id(trial), RuntimeError(f"trial process died: {trial.get_error()}"))

        return Feed()

    def remaining(self) -> float | None:
        """Foreseen seconds until the end; None before the first cell is finished."""
        every = [s for seconds in self._seconds.values() for s in seconds]
        if not every:
            return None
        mean = sum(every) / len(every)
        rest = 0.0
        for config in self.waiting.values():
            alike = self._seconds.get(config.method)
            rest += sum(alike) / len(alike) if alike else mean
        return rest / self.concurrency

    def _line(self, text: str) -> None:
        self.last_line = time.monotonic()
        rest = self.remaining()
        foreseen = "" if rest is None else f"  left ~{_duration(rest)}"
        failed = f"  {self.failed} failed" if self.failed else ""
        elapsed = _duration(time.monotonic() - self.started)
        self.echo(f"[{self.finished}/{self.total}  {elapsed}{foreseen}{failed}]  {text}")


def _cell_id(trial: Any) -> str:
    return TrialConfig(**trial.config["one"]["cell"]).cell_id


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
