"""Claims on cells: of several sweeps that write into one store at the same time, one runs a cell.

In a folder a claim is a lock on one byte of the file ``.claims``, at the place that the cell's id names: the system gives it
back the moment its holder dies, however that happens. In an object store, which has no locks, it is an object that its holder
writes anew every few seconds; one that is not is void after a while.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import uuid
import warnings
from pathlib import Path
from typing import Protocol

from pyarrow import fs

LEASE_SECONDS = 60.0
"""How long a claim in an object store is good for after it was last renewed."""

_ALL = "all"
"""In the place of a cell's id."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Claims(Protocol):
    """What one process has claimed."""

    def take(self, cell: str) -> bool:
        """Claim a cell; False if another process has it. A cell that is claimed here already stays so."""
        ...

    def take_all(self) -> bool:
        """Claim every cell there is or will be; False if another process has claimed one."""
        ...

    def release(self, cell: str) -> None:
        """Give a claim back, if there is one."""
        ...

    def close(self) -> None:
        """Give all claims back."""
        ...


class FolderClaims:
    """Claims on the cells of a store in a folder.

    Locks belong to the process: one such object in a process is enough, and a second one on the same folder would take
    nothing away from the first.

    Args:
        folder: the store's; it exists.
    """

    def __init__(self, folder: str | Path) -> None:
        self._file: int | None = os.open(Path(folder) / ".claims", os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, cell: str) -> bool:
        return self._lock(1, _place(cell))

    def take_all(self) -> bool:
        return self._lock(0, 0)  # to the end of any file

    def _lock(self, length: int, start: int) -> bool:
        if self._file is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warnings.warn(
                    f"the file system of the results has no locks ({error.strerror}): do not run two sweeps on them at once",
                    stacklevel=2,
                )
                self.close()
                return True
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def release(self, cell: str) -> None:
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _place(cell))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class ObjectClaims:
    """Claims on the cells of a store in an object store, renewed by a thread of this process.

    A claim is ``<base>/claims/<cell>.<holder>``, one on all cells ``<base>/claims/all.<holder>``. Who has written one and then sees another's takes his own back: of two that
    come at the same moment neither may get the cell, never both. Listings must show what has been written (S3 and GCS do).

    Args:
        filesystem: where.
        base: the store's path there.
        lease: see ``LEASE_SECONDS``.
    """

    def __init__(self, filesystem: fs.FileSystem, base: str, lease: float = LEASE_SECONDS) -> None:
        self._filesystem, self._base, self._lease = filesystem, f"{base}/claims", lease
        self._holder = uuid.uuid4().hex
        self._held: set[str] = set()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def take(self, cell: str) -> bool:
        return self._take(cell, (cell, _ALL))

    def take_all(self) -> bool:
        return self._take(_ALL, None)

    def _take(self, cell: str, against: tuple[str, ...] | None) -> bool:
        """Claim a cell against claims on some, or on any."""
        with self._lock:
            if cell in self._held:
                return True
            self._write(cell)
            found = self._filesystem.get_file_info(fs.FileSelector(self._base, allow_not_found=True))
            named = ((info, info.base_name.partition(".")[0]) for info in found if info.is_file)
            found = [info for info, name in named if against is None or name in against]
            own = next((info for info in found if info.base_name == f"{cell}.{self._holder}"), None)
            # Their times are all of the same clock, the object store's.
            now = own.mtime.timestamp() if own and own.mtime else 0.0
            others = [info for info in found if info is not own]
            if own is None or any(i.mtime and now - i.mtime.timestamp() < self._lease for i in others):
                self._delete(f"{cell}.{self._holder}")
                return False
            for void in others:
                self._delete(void.base_name)
            self._held.add(cell)
            return True

    def release(self, cell: str) -> None:
        with self._lock:
            if cell in self._held:
                self._held.discard(cell)
                self._delete(f"{cell}.{self._holder}")

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        for cell in list(self._held):
            self.release(cell)

    def _renew(self) -> None:
        while not self._ended.wait(self._lease / 4):
            for cell in list(self._held):
                try:
                    self._write(cell)
                    if cell not in self._held:  # given back meanwhile
                        self._delete(f"{cell}.{self._holder}")
                except OSError:
                    continue  # the next time, or never: then the claim is void, and the worst is a cell computed twice

    def _write(self, cell: str) -> None:
        with self._filesystem.open_output_stream(f"{self._base}/{cell}.{self._holder}") as stream:
            stream.write(b"claimed")

    def _delete(self, name: str) -> None:
        try:
            self._filesystem.delete_file(f"{self._base}/{name}")
        except OSError:
            return  # gone already


def _place(cell: str) -> int:
    """The byte that stands for a cell: as much of its id as a file may be long."""
    return int(cell, 16) >> 2
