"""How long work reports its progress: through a callback, so that what works knows nothing of terminals."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done now, how many units of the work are done, and how many there are (0: not known)."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
