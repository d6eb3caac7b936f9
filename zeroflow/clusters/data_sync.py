"""Copy data sets from a bucket or a shared folder to a machine's own disk."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from zeroflow.errors import ConfigError
from zeroflow.progress import Progress, silent

_AT_ONCE = 16
"""Files copied at a time; small ones are limited by latency, not by bandwidth."""

_PIECE = 2**22


def synchronise(source: str, folder: Path, on_progress: Progress = silent) -> int:
    """Copy files that ``folder`` lacks or has with another size, each atomically. Nothing is deleted.

    Args:
        source: ``s3://bucket/path``, ``gs://...``, or a folder.
        folder: destination, created if missing.
        on_progress: progress callback, see ``Progress``; a unit is a file.

    Returns:
        Number of files copied.

    Raises:
        ConfigError: the source cannot be read, or has a file name that leads outside ``folder``.
    """
    import pyarrow as pa
    from pyarrow import fs

    try:
        filesystem, base = (
            fs.FileSystem.from_uri(source) if "://" in source else (fs.LocalFileSystem(), str(Path(source).absolute()))
        )
        if filesystem.get_file_info(base).type == fs.FileType.NotFound:
            raise ConfigError(f"data {source!r}: nothing is there")
        found = [i for i in filesystem.get_file_info(fs.FileSelector(base, recursive=True)) if i.is_file]
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"data {source!r}: cannot be read: {error}") from None
    wanted = []
    for info in found:
        inside = PurePosixPath(info.path).relative_to(base)
        if ".." in inside.parts or inside.is_absolute():
            raise ConfigError(f"data {source!r}: {info.path}: is outside {folder}")
        target = folder / inside
        if not target.is_file() or target.stat().st_size != info.size:
            wanted.append((info.path, target))

    def copy(number: int) -> None:
        path, target = wanted[number]
        target.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_input_stream(path) as stream:
            _whole(stream, target)

    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for number, _ in enumerate(pool.map(copy, range(len(wanted)))):
                on_progress(str(wanted[number][1].name), number + 1, len(wanted))
    except OSError as error:
        raise ConfigError(f"data {source!r}: {error}") from None
    return len(wanted)


def _whole(stream: Any, target: Path) -> None:
    """Write a file under a hidden name, and rename it once it is complete."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as hidden:
        with (file := Path(hidden) / target.name).open("wb") as part:
            while piece := stream.read(_PIECE):
                part.write(piece)
        file.replace(target)
