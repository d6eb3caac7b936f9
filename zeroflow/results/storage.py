"""Where the bytes of a store live: a folder, or a bucket of an object store. What the files mean is ``store``'s to know.

Names of files are relative to the store: ``trials/<cell id>.parquet``. A file is there whole or not at all: in a folder it
is written under a name that begins with a dot and then renamed, an object appears when it is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from zeroflow.durable import sync_folder, write_atomically
from zeroflow.errors import ConfigError, is_text
from zeroflow.results.claims import Claims, FolderClaims, ObjectClaims

_ENOUGH = 2**14  # bytes that must find room where a cell is to be written
_SPARE = 2**20  # bytes that must be free beside those of the cells to be written
_CELL = 2**16  # bytes that the files of a cell take, with room
_LEFTOVER_SECONDS = 3600.0


@dataclass(frozen=True)
class File:
    """A file of a store: its name relative to the store, its bytes, and when it was written, nanoseconds since 1970."""

    name: str
    size: int
    mtime_ns: int

    @property
    def stem(self) -> str:
        """The name without folder and ending."""
        return self.name.rpartition("/")[2].rpartition(".")[0]


def _name(info: fs.FileInfo) -> str:
    """The name of a file without its folder; "." where it is no UTF-8, and so none of the store's."""
    try:
        return str(info.base_name)
    except UnicodeDecodeError:
        return "."


class Storage:
    """The files below a path of an object store, or of any other file system that pyarrow knows.

    Args:
        root: as the user named it.
        filesystem: where it is.
        base: the path there.

    Every method that reads raises ConfigError where the file system cannot be reached.
    """

    def __init__(self, root: str, filesystem: fs.FileSystem, base: str) -> None:
        self.root, self.filesystem, self.base = root, filesystem, base

    def exists(self, folders: Sequence[str]) -> bool:
        """Whether one of some folders is there."""
        with self._reaching("read"):
            found = self.filesystem.get_file_info([f"{self.base}/{folder}" for folder in folders])
        return any(info.type == fs.FileType.Directory for info in found)

    def list(self, folder: str, *, recursive: bool = False) -> list[File]:
        """The files in a folder, by name; those whose name begins with a dot are left out. Empty if it is not there."""
        with self._reaching("read"):
            selector = fs.FileSelector(f"{self.base}/{folder}", allow_not_found=True, recursive=recursive)
            found = self.filesystem.get_file_info(selector)
            if not found:
                self._check_base()
        files = [self._file(info) for info in found if info.is_file and not _name(info).startswith(".")]
        return sorted(files, key=lambda file: file.name)

    def stat(self, name: str) -> File | None:
        """A file; None if there is none of the name."""
        with self._reaching("read"):
            info = self.filesystem.get_file_info(f"{self.base}/{name}")
        return self._file(info) if info.is_file else None

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if it has gone, none of them if the disk refuses."""
        try:
            with self._reaching("read"), self.filesystem.open_input_file(f"{self.base}/{name}") as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def open(self, name: str) -> pa.NativeFile:
        """A file to read parts of. Raises FileNotFoundError if it has gone."""
        with self._reaching("read"):
            return self.filesystem.open_input_file(f"{self.base}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Write a file, in place of an earlier one of the name."""
        with self.filesystem.open_output_stream(f"{self.base}/{name}") as stream:
            stream.write(data)

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        if self.filesystem.get_file_info(f"{self.base}/{name}").is_file:
            self.filesystem.delete_file(f"{self.base}/{name}")

    def sync(self, folder: str) -> None:
        """Return when what was written in a folder would survive a power cut; an object does so from the start."""

    def check_room(self, cells: int) -> None:
        """See that there is room for the files of so many cells; a bucket has it. Nothing is written.

        Raises:
            ConfigError: the disk has too little.
        """

    def check_writable(self) -> None:
        """See that a file can be written: one is, and removed.

        Raises:
            ConfigError: the folder cannot be made or written; no such bucket, no credentials, no access.
        """
        with self._reaching("written"):
            name = f".writable-{uuid.uuid4().hex}"
            self.write(name, b"")
            self.filesystem.delete_file(f"{self.base}/{name}")

    def claims(self) -> Claims:
        """This process's claims on cells."""
        return ObjectClaims(self.filesystem, self.base)

    def _file(self, info: fs.FileInfo) -> File:
        return File(info.path[len(self.base) + 1 :], info.size, info.mtime_ns or 0)

    def _check_base(self) -> None:
        bucket = self.base.partition("/")[0]
        if self.filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
            raise ConfigError(f"results {self.root!r}: no such bucket: {bucket}")

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        """Turn what an object store's client raises into one message."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigError(
                f"results {self.root!r}: cannot be {what}: check bucket, credentials and endpoint; {error}"
            ) from None


class Folder(Storage):
    """The files below a local folder.

    Args:
        root: its path, made absolute at once.

    Raises:
        ConfigError: it is a file.
    """

    def __init__(self, root: str | Path) -> None:
        self._tidied: set[Path] = set()
        base = str(Path(root).expanduser().absolute())
        if not is_text(base):
            raise ConfigError(f"results {os.fsencode(base)!r}: not UTF-8; expected a folder whose whole path is")
        super().__init__(base, fs.LocalFileSystem(), base)
        if Path(base).is_file():
            raise ConfigError(f"results {self.root!r}: expected a folder, found a file")

    def read(self, name: str) -> bytes | None:
        try:
            return Path(self.base, name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            return b""

    def write(self, name: str, data: bytes) -> None:
        path = Path(self.base, name)
        write_atomically(path, data)
        if path.parent not in self._tidied:  # once: it looks at every name in the folder
            self._tidied.add(path.parent)
            remove_leftovers(path.parent, "*")

    def delete(self, name: str) -> None:
        Path(self.base, name).unlink(missing_ok=True)

    def sync(self, folder: str) -> None:
        sync_folder(Path(self.base, folder))

    def check_room(self, cells: int) -> None:
        needed = _SPARE + cells * _CELL
        try:
            there = next(folder for folder in (Path(self.base), *Path(self.base).parents) if folder.exists())
            disk = shutil.disk_usage(there)
        except OSError as error:
            raise ConfigError(f"results {self.root!r}: cannot be read: {error.strerror}") from None
        if disk.total and disk.free < needed:  # some network file systems say 0 of everything
            raise ConfigError(
                f"results {self.root!r}: {disk.free / 2**20:.1f} MiB of the disk are free, expected {needed / 2**20:.1f} MiB or more for "
                f"{cells} cell{'s' if cells > 1 else ''}: make room, or name another disk with --results"
            )

    def check_writable(self) -> None:
        try:
            Path(self.base).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.base, buffering=0) as file:
                file.write(bytes(_ENOUGH))
        except OSError as error:
            raise ConfigError(f"results {self.root!r}: cannot be written: {error.strerror}") from None

    def claims(self) -> Claims:
        try:
            return FolderClaims(self.base)
        except OSError as error:
            raise ConfigError(f"results {self.root!r}: cannot be written: {error.strerror}: {error.filename}") from None

    def _check_base(self) -> None:
        """A folder that is not there is an empty store."""


def open_storage(root: str | Path) -> Storage:
    """The storage at a folder, or at a URI that pyarrow knows (``s3://bucket/path``, ``gs://...``).

    Raises:
        ConfigError: a URI nobody knows or with credentials in it, or a folder that is a file.
    """
    uri = str(root)
    if "://" not in uri:
        return Folder(root)
    if "@" in uri.split("://", 1)[1].split("/")[0]:
        raise ConfigError(
            "results: the address has credentials in it, which would go into logs and reports; expected them in the "
            "environment, in ~/.aws/credentials, or in the machine's role"
        )
    try:
        filesystem, base = fs.FileSystem.from_uri(_whole_objects(uri))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"results {uri!r}: expected a folder or an object store's URI; {error}") from None
    return Folder(base) if isinstance(filesystem, fs.LocalFileSystem) else Storage(uri, filesystem, base)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed writers of files ``name`` (may hold ``*``) left in a local folder an hour ago or earlier."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()
        except FileNotFoundError:
            continue  # its writer, or another one, was faster


def _whole_objects(uri: str) -> str:
    """Have S3 objects of our size written by one request, so that a killed writer leaves no parts of an upload."""
    if not uri.startswith("s3://") or "allow_delayed_open" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"
