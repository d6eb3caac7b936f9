"""Report progress through a callback, so that long-running code knows nothing about terminals."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[str, int, int], None]
"""Called with the current activity, the number of units done, and the total number (0: unknown)."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
