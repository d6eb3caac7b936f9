"""A disk that forgets what was not synced: every way that a power cut may leave a folder."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Inode:
    """A file's bytes, those of them that are on the disk, and where the last write began."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    last: int = 0


class Recorder(io.FileIO):
    """A file whose writes the disk hears of."""

    disk: Disk

    def write(self, data: Any, /) -> int:
        place = os.lseek(self.fileno(), 0, os.SEEK_CUR) if "a" not in self.mode else os.fstat(self.fileno()).st_size
        written = super().write(data)
        self.disk.wrote(str(self.name), place, bytes(data)[:written])
        return written


class Disk:
    """Hears of all that is done below a folder while it is open, and forgets nothing.

    A folder's names are on the disk when the folder was synced, a file's bytes when the file was. Until then each of them may
    or may not be.

    Args:
        root: the folder; it is there and empty.

    Attributes:
        states: after each operation, the files that a cut would leave, ``{relative path: bytes}``: with nothing that was not
            synced; with all names, but zeros in place of bytes that were not synced; with all names and half of the last
            write. And what was promised until then: the number of ``mark`` calls.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.names: dict[str, Inode] = {}
        self.durable: dict[str, Inode] = {}
        self.folders = {self.root}
        self.states: list[tuple[int, dict[str, bytes]]] = []
        self.marks = 0

    def mark(self) -> None:
        """From here on something is promised."""
        self.marks += 1
        self._look()

    def _below(self, path: Any) -> str | None:
        whole = str(Path(path).absolute()) if not isinstance(path, int) else ""
        return whole if whole.startswith(self.root + os.sep) else None

    def _look(self) -> None:
        def found(names: dict[str, Inode], content: Any) -> dict[str, bytes]:
            return {name[len(self.root) + 1 :]: content(inode) for name, inode in names.items()}

        def zeros(inode: Inode) -> bytes:
            kept = inode.synced if inode.data.startswith(inode.synced) else b""
            return kept + bytes(len(inode.data) - len(kept))

        def torn(inode: Inode) -> bytes:
            if bytes(inode.data) == inode.synced:
                return inode.synced
            return bytes(inode.data[: (inode.last + len(inode.data)) // 2])

        reachable = {name: inode for name, inode in self.durable.items() if str(Path(name).parent) in self.folders}
        for state in (
            found(reachable, lambda inode: inode.synced),
            found(self.names, zeros),
            found(self.names, torn),
        ):
            if not self.states or state != self.states[-1][1]:
                self.states.append((self.marks, state))

    def wrote(self, name: str, place: int, data: bytes) -> None:
        inode = self.names[name]
        inode.data[place : place + len(data)] = data
        inode.last = place
        self._look()

    def synced(self, descriptor: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if name in self.names:
            self.names[name].synced = bytes(self.names[name].data)
        elif name == self.root or self._below(name):
            inside = {entry.path for entry in os.scandir(name) if entry.is_dir()}
            if name in self.folders:
                self.folders |= inside
            for known in {*self.names, *self.durable}:
                if str(Path(known).parent) == name:
                    if known in self.names:
                        self.durable[known] = self.names[known]
                    else:
                        del self.durable[known]
        self._look()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this is open every change below the folder is heard of."""
        patch = pytest.MonkeyPatch()
        opened = io.open

        def open_file(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **how: Any) -> Any:
            name = self._below(file)
            if name is None or mode.strip("b") not in ("w", "a", "x"):
                return opened(file, mode, buffering, *more, **how)
            raw = Recorder(name, mode.strip("b") or "w")
            raw.disk = self
            inode = self.names.setdefault(name, Inode())
            if "w" in mode:
                inode.data, inode.last = bytearray(), 0
            self._look()
            return raw if buffering == 0 else io.BufferedWriter(raw)

        def heard(function: Any, change: Any) -> Any:
            def changed(*arguments: Any, **how: Any) -> Any:
                paths = []
                for path in arguments:
                    if how.get("dir_fd") is not None and not isinstance(path, int):
                        path = Path(f"/proc/self/fd/{how['dir_fd']}").readlink() / path
                    paths.append(path)
                found = function(*arguments, **how)
                change(*paths)
                self._look()
                return found

            return changed

        def renamed(source: Any, target: Any) -> None:
            if self._below(source) in self.names:
                self.names[str(self._below(target))] = self.names.pop(str(self._below(source)))

        def unlinked(path: Any, *_: Any) -> None:
            self.names.pop(str(self._below(path)), None)

        def truncated(path: Any, size: int) -> None:
            if name := self._below(path):
                del self.names[name].data[size:]

        sync = os.fsync
        patch.setattr(io, "open", open_file)
        patch.setattr(builtins, "open", open_file)
        patch.setattr(os, "fsync", lambda descriptor: (sync(descriptor), self.synced(descriptor))[0])
        for name in ("replace", "rename"):
            patch.setattr(os, name, heard(getattr(os, name), renamed))
        for name in ("unlink", "remove"):
            patch.setattr(os, name, heard(getattr(os, name), unlinked))
        patch.setattr(os, "truncate", heard(os.truncate, truncated))
        try:
            yield
        finally:
            patch.undo()


def restore(state: dict[str, bytes], root: Path) -> None:
    """The folder as a cut left it."""
    for name, data in state.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
