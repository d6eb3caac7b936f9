"""Signals that stop a sweep: all of them do what Ctrl-C does."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the end of a job, a terminal that closes."""

_ONE_WISH = 3.0
"""Seconds within which further signals mean the same as the first one."""


@contextmanager
def stopped_like_interrupted() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` in the main thread at a signal that stops a process.

    Once only for signals that come together, such as those of ``timeout``, which signals the process and then its group: a
    second one must not break into the orderly end. Signals that this process was started to ignore (``nohup``) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = float("-inf")

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if (now := time.monotonic()) - first > _ONE_WISH:
            first = now
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _STOPPING}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
