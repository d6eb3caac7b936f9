"""A durable log of evaluation results, from which steps can be replayed without a single forward pass.

A forward-pass step is determined by its losses: directions are regenerated, and moments follow. So a few numbers per step are
a complete checkpoint. Against a power cut, each record carries a checksum, and the file is synced to the disk at most once a
second: a power cut loses the steps of the last second, a kill only the step in flight.
"""

from __future__ import annotations

import errno
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from zeroflow.durable import sync_folder
from zeroflow.optim.executor import Executor, LocalExecutor, Numbers

SYNC_SECONDS = 1.0
"""Seconds between syncs: a sync takes milliseconds, as a step does."""


class Journal(Executor):
    """An ``Executor`` that records the results of another one, and replays them.

    With a file of earlier steps it replays its records first; then it runs evaluations and appends their results to the file
    before it returns them. The caller must make the same steps in the same order: the same seed, mini-batches, options. The
    file is little-endian float64: for every call the number of values, the values, and the CRC-32 of these bytes. Everything
    from the first truncated or torn record on is dropped. Where several processes share evaluations
    (``DistributedExecutor``), the first one reads and writes the file, and broadcasts its records.

    Args:
        path: the file; its folder must exist.
        executor: makes evaluations; default: in this process.

    Attributes:
        replaying: whether the next call is answered from the file.
    """

    def __init__(self, path: str | Path, executor: Executor | None = None) -> None:
        self.path, self.executor = Path(path), executor or LocalExecutor()
        self.rank, self.shards, self.shard = self.executor.rank, self.executor.shards, self.executor.shard
        first = self.rank == 0
        written = self.broadcast(self.path.read_bytes() if first and self.path.exists() else b"")
        self._records, whole = _records(written)
        if first and whole < len(written):
            os.truncate(self.path, whole)
        self._file = self.path.open("ab", buffering=0) if first else None
        self._synced = -math.inf  # when, in seconds of a monotonic clock

    @property
    def replaying(self) -> bool:
        return bool(self._records)

    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        """As ``Executor.map``.

        Raises:
            ValueError: a record cannot be from this step: the file belongs to another run.
        """
        if self._records:
            numbers = self._records.popleft()
            if count == 0 or len(numbers) % count or width not in (None, len(numbers) // count):
                raise ValueError(
                    f"{self.path}: {len(numbers)} numbers where {count} evaluations of {width} were expected; it belongs to another run"
                )
            return [tuple(row) for row in numbers.reshape(count, -1).tolist()]
        results = self.executor.map(count, evaluate, width)
        numbers = np.array(results, "<f8").reshape(-1)
        if self._file is not None:
            counted = np.concatenate([[np.float64(len(numbers))], numbers]).astype("<f8").tobytes()
            record = counted + np.float64(zlib.crc32(counted)).astype("<f8").tobytes()
            written = self._file.write(record)
            if written != len(record):  # a full disk takes a part: what follows it could not be read
                os.truncate(self.path, self.path.stat().st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._sync()
        return results

    def _sync(self) -> None:
        """Sync the file to the disk if that was not done within the last second; the first time its name in the folder too."""
        assert self._file is not None
        now = time.monotonic()
        if now - self._synced < SYNC_SECONDS:
            return
        os.fsync(self._file.fileno())
        if self._synced == -math.inf:
            sync_folder(self.path.parent)
        self._synced = now

    def broadcast(self, content: bytes) -> bytes:
        return self.executor.broadcast(content)

    def total(self, vector: Tensor) -> Tensor:
        return self.executor.total(vector)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _records(written: bytes) -> tuple[deque[npt.NDArray[np.float64]], int]:
    """The complete records of a file up to the first damaged one, and their size in bytes."""
    values = np.frombuffer(written[: len(written) // 8 * 8], "<f8")
    records: deque[npt.NDArray[np.float64]] = deque()
    place = 0
    while place < len(values):
        count = values[place]
        if not (0 < count < len(values) and count.is_integer()):
            break
        end = place + 1 + int(count)
        if end >= len(values) or values[end] != zlib.crc32(values[place:end].tobytes()):
            break
        records.append(values[place + 1 : end])
        place = end + 1
    return records, 8 * place
