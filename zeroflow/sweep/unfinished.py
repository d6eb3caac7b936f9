"""The unfinished work of a cell on this machine: its folder of checkpoints and logs, from which it resumes."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from zeroflow.errors import ConfigError
from zeroflow.results.store import Store
from zeroflow.sweep.checkpoint_sync import remove_copies, synchronised
from zeroflow.sweep.messages import CellTask


class UnfinishedWork:
    """What a cell resumes from.

    Args:
        task: the cell.
        copied: whether this process copies it into an object store, where the results go to one.
    """

    def __init__(self, task: CellTask, *, copied: bool) -> None:
        self._everything, self._cell = unfinished_folder(task.sweep.results), task.config.cell_id
        # Other code might not make the same steps of the same losses; nor do slices, to the last bit.
        sliced = f"-{task.placement.data_shards}" if task.placement.data_shards > 1 else ""
        self.folder = self._everything / f"{self._cell}-{task.sweep.code}{sliced}"
        self.tasks_folder = kept_tasks_folder(task.sweep.results, f"{task.sweep.code}{sliced}")
        self._store = None
        # Only where no folder beside the results is everybody's.
        if copied and "://" in task.sweep.results:
            with suppress(ConfigError):  # the coordinator writes results; a node that reaches no store still computes
                self._store = Store(task.sweep.results)

    def synchronised(self) -> AbstractContextManager[None]:
        """Keep the copies in an object store up to date, where there are any."""
        return synchronised(self._store, self.folder) if self._store else nullcontext()

    def discard(self) -> None:
        """Remove it: resuming from it would fail again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._remove_copies()

    def discard_all_versions(self) -> None:
        """Remove what any version of the code has left of the cell, which is finished."""
        self._remove_copies()
        for old in self._everything.glob(f"{self._cell}-*"):
            shutil.rmtree(old, ignore_errors=True)

    def _remove_copies(self) -> None:
        if self._store:
            remove_copies(self._store, self._cell)


def kept_tasks_folder(results: str, code: str) -> Path:
    """The folder of finished tasks that cells of a version of the code branch from.

    Args:
        results: root of the store.
        code: see ``SweepContext``.
    """
    return unfinished_folder(results).parent / "tasks" / code


def unfinished_folder(results: str) -> Path:
    """The folder of unfinished cells: beside the results, or of this machine where they are in an object store.

    A log that grows by a few bytes has no place in an object store; copies of it go there, see ``checkpoint_sync``. Of this
    machine too where the folder of the results cannot be written.

    Args:
        results: root of the store.
    """
    if "://" not in results:
        folder = Path(results) / "unfinished"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "zeroflow" / "unfinished" / hashlib.sha256(results.encode()).hexdigest()[:16]
