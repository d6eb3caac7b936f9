"""Unfinished work that travels: where results are in an object store, each node has a folder of its own for unfinished cells.

What a cell goes on from is copied into the store every few seconds, so that it goes on elsewhere when its node is lost. The copies
need not be of one moment: a log is good up to any record, and a checkpoint of another task than the log's is passed over.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zeroflow.errors import ConfigError
from zeroflow.results.store import Store

EVERY = float(os.environ.get("ZEROFLOW_COPY_EVERY", "10"))
"""Seconds between copies: of more steps than were made meanwhile none is lost with a node."""


@contextmanager
def travelling(store: Store, folder: Path) -> Iterator[None]:
    """Bring what the store has of a cell's unfinished work into ``folder``, and copy what changes there into the store.

    A store out of reach is no reason to stop: then what was copied last is gone on from, or the cell begins anew.
    """
    copies = _Copies(store, folder)
    copies.fetch()
    thread = threading.Thread(target=copies.keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        copies.over.set()
        thread.join()


def forget(store: Store, cell: str) -> None:
    """Remove the copies of a cell that is finished, whichever code they were made by."""
    with suppress(OSError, ConfigError):
        for name in store.names("unfinished"):
            if name.split("/")[0].startswith(f"{cell}-"):
                store.drop_file(f"unfinished/{name}")


class _Copies:
    """Args: store, folder: as of ``travelling``."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder, self.inside = store, folder, f"unfinished/{folder.name}"
        self.over = threading.Event()
        self._copied: dict[str, tuple[int, int]] = {}

    def fetch(self) -> None:
        with suppress(OSError, ConfigError):
            for name, data in self.store.files(self.inside):
                here = self.folder / name
                # Of two logs of one task the longer one; of two checkpoints the store's, which is seconds old at most if
                # this node made it, and from where the cell has been since if not.
                if here.suffix == ".losses" and here.exists() and here.stat().st_size >= len(data):
                    continue
                self.folder.mkdir(parents=True, exist_ok=True)
                temporary = self.folder / f".{name}.fetched"
                temporary.write_bytes(data)
                temporary.replace(here)

    def keep(self) -> None:
        while not self.over.wait(EVERY):
            self.copy()

    def copy(self) -> None:
        """Copy files that have changed. Checkpoints first: their tasks' logs may be gone when they are there."""
        for path in sorted(self.folder.glob("[!.]*"), key=lambda path: path.suffix != ".pt"):
            with suppress(OSError, ConfigError):
                state = path.stat()
                if self._copied.get(path.name) != (seen := (state.st_mtime_ns, state.st_size)):
                    self.store.put_file(f"{self.inside}/{path.name}", path.read_bytes())
                    self._copied[path.name] = seen
