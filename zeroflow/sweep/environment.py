"""Environment variables of a sweep's processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

RAY_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "120",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Read by Ray when it is imported or started, so set before. All are about noise and start-up time, but for three: Tune's
snapshots of thousands of trials take longer with every trial, and the store is what a sweep goes on from; on Ctrl-C Tune would
give every trial ten seconds to end, of which none has any use; and the queue itself never hands out more cells than fit. Left to
itself Tune starts one process after the other, and as soon as a cell is finished ends the one that is just starting, since the
finished one's can have its cell: short cells would then run one at a time."""

KEPT_MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in {
            "hugetlb": 1, "trim_threshold": 2**32, "mmap_threshold": 2**25, "top_pad": 2**26, "arena_max": 1
        }.items()
    )
}  # fmt: skip
"""Environment of worker processes: freed memory is kept, in huge pages. Otherwise a forward pass on a CPU gives all of its
memory back and faults it in again, page by page (``benchmarks/kept_memory.py``). Other C libraries ignore it."""

LOCAL_SETTINGS = {**KEPT_MEMORY, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Of a local Ray: kept memory, and no process that waits for a node's preemption, which cannot happen."""


def set_defaults(values: Mapping[str, str]) -> None:
    """Set the environment variables that are not set yet."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


@contextmanager
def changed_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and put them back at the end as they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
