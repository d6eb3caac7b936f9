"""Files that survive a kill and a power cut: there whole or not at all, and under their names once they were written."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk. Nothing happens where a file system cannot sync folders."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems refuse: they have no cache of names of their own.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, each of them on the disk."""
    missing = [folder, *folder.parents]
    missing = missing[: next(place for place, path in enumerate(missing) if path.is_dir())]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it is there whole or not at all, in place of an earlier one, and stays once this has returned.

    Args:
        path: of the file; missing folders are made.
        data: all of its bytes.

    Raises:
        OSError: the disk is full, or the folder cannot be written; an earlier file is as it was.
    """
    make_folder(path.parent)
    # Dot first: readers of a Parquet folder skip such names, and no other ones.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
