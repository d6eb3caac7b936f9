"""Progress and remaining time of a command on standard error: a bar on a terminal, elsewhere an occasional line."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm

_SHORT = 2.0  # seconds of work that nobody asks about
_ON_TERMINAL, _ELSEWHERE = 0.5, 30.0  # seconds between two looks
_COLUMNS = 79  # of a terminal that does not know its size


class Bar:
    """A progress bar; the instance is a ``Progress`` callback. A new total starts a new count.

    Args:
        label: name of the work.
        unit: name of its units; ``B``: bytes.
    """

    def __init__(self, label: str, unit: str = "") -> None:
        self.label, self.unit = label, unit
        self._state, self._since = ("", 0, 0), time.time()
        self._bar: tqdm[Any] | None = None
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        with self._lock:
            if total != self._state[2]:
                self._since = time.time()
            self._state = (what, done, total)

    def __enter__(self) -> Bar:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def echo(self, text: str, *, err: bool = False) -> None:
        """Print a line above the bar."""
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            click.echo(text, err=err)

    def _look(self) -> None:
        terminal = sys.stderr.isatty()
        wait = _SHORT if terminal else _ELSEWHERE
        while not self._over.wait(wait):
            wait = _ON_TERMINAL if terminal else _ELSEWHERE
            try:
                with self._lock:
                    if terminal:
                        self._draw()
                    else:
                        click.echo(self._line(), err=True)
            except (OSError, ValueError):
                return  # nobody is there to see it

    def _draw(self) -> None:
        from tqdm import tqdm

        what, done, total = self._state
        if self._bar is None:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            self._bar = tqdm(
                desc=self.label,
                unit=self.unit or "it",
                unit_scale=self.unit == "B",
                leave=False,
                delay=_SHORT,
                dynamic_ncols=columns > 0,
                **({} if columns else {"ncols": _COLUMNS, "nrows": 2}),
                bar_format=None if self.unit else "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )
        bar = self._bar
        bar.start_t, bar.n, bar.total = self._since, done, total or None
        bar.set_postfix_str(what)  # draws it

    def _line(self) -> str:
        from tqdm import tqdm

        what, done, total = self._state
        passed = time.time() - self._since
        left = f", left ~{tqdm.format_interval(passed / done * (total - done))}" if done and total else ""
        share = f", {done / total:.0%}" if total else ""
        return f"{self.label}: {what}{share}, {tqdm.format_interval(passed)}{left}"
