"""Exceptions of a cell's processes as messages: what went wrong, and whether another try may help."""

from __future__ import annotations

import errno
import traceback

from zeroflow.secrets import without_secrets
from zeroflow.sweep.messages import CellFailed, FailureKind

_NO_ROOM = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


class GroupDied(RuntimeError):
    """A group of workers has ended, by more deaths of its workers than it may have, or of its controller."""


def failed(error: BaseException) -> CellFailed:
    """The failure that an exception stands for, without secrets in its texts."""
    cause = cause_of(error)
    if is_out_of_memory(cause):
        kind = FailureKind.OUT_OF_MEMORY
    elif isinstance(cause, OSError) and cause.errno in _NO_ROOM:
        kind = FailureKind.DISK_FULL
    else:
        kind = FailureKind.ERROR
    text = "".join(traceback.format_exception(error))
    return CellFailed(kind, type(cause).__name__, without_secrets(str(cause)), without_secrets(text))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short: torch's, CUDA's, Python's, or Ray's when it killed a process for it."""
    text = f"{type(error).__name__}: {error}".lower()
    said = any(words in text for words in ("outofmemory", "out of memory", "can't allocate memory", "alloc_failed"))
    return said or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def cause_of(error: BaseException) -> BaseException:
    """The error that a worker raised, out of the wrappers it came in."""
    workers = getattr(error, "worker_failures", None)
    inner = next(iter(workers.values())) if workers else getattr(error, "cause", None)
    if inner is None and isinstance(error, GroupDied):
        inner = error.__cause__
    return cause_of(inner) if isinstance(inner, BaseException) else error
