"""Checkpoints of unfinished cells that outlive their node: copied into the object store that the results go to.

Each node has a folder of its own for unfinished cells. What a cell resumes from is copied into the store every few seconds, so
that it resumes elsewhere when its node is lost. The copies need not be of one moment: a log is good up to any record, and a
checkpoint of another task than the log's is passed over.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zeroflow.errors import ConfigError
from zeroflow.results.store import Store

INTERVAL = float(os.environ.get("ZEROFLOW_COPY_EVERY", "10"))
"""Seconds between copies: no more steps than were made meanwhile are lost with a node."""


@contextmanager
def synchronised(store: Store, folder: Path) -> Iterator[None]:
    """Bring a cell's unfinished work from the store, and copy what changes of it back as long as this lasts.

    A store out of reach is no reason to stop: then the cell resumes from what was copied last, or begins anew.

    Args:
        store: in an object store.
        folder: of the cell, on this node.
    """
    copies = Copies(store, folder)
    copies.fetch()
    thread = threading.Thread(target=copies.keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        copies.over.set()
        thread.join()


def remove_copies(store: Store, cell: str) -> None:
    """Remove the copies of a finished cell, whichever version of the code made them."""
    with suppress(OSError, ConfigError):
        for name in store.names("unfinished"):
            if name.split("/")[0].startswith(f"{cell}-"):
                store.drop_file(f"unfinished/{name}")


class Copies:
    """The copies of one cell's folder.

    Args:
        store: see ``synchronised``.
        folder: see ``synchronised``.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder, self.inside = store, folder, f"unfinished/{folder.name}"
        self.over = threading.Event()
        self._copied: dict[str, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Bring what the store has further than this node."""
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
        """Copy again and again, until ``over`` is set."""
        while not self.over.wait(INTERVAL):
            self.copy()

    def copy(self) -> None:
        """Copy files that have changed. Checkpoints first: their tasks' logs may be gone when they are there."""
        for path in sorted(self.folder.glob("[!.]*"), key=lambda path: path.suffix != ".pt"):
            with suppress(OSError, ConfigError):
                state = path.stat()
                if self._copied.get(path.name) != (seen := (state.st_mtime_ns, state.st_size)):
                    self.store.put_file(f"{self.inside}/{path.name}", path.read_bytes())
                    self._copied[path.name] = seen
