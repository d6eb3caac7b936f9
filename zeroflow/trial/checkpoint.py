"""What an interrupted trial is resumed from: a checkpoint of finished tasks, and for the task in hand its evaluations' log.

A forward-pass step needs no checkpoint of its own: the few numbers that its evaluations gave make it again without a forward
pass (``zeroflow.optim.Journal``), so at most the step in flight is lost. Steps with an exact gradient are saved by epoch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import io
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zeroflow.data.dataset import ImageDataset
from zeroflow.durable import make_folder, write_atomically
from zeroflow.imports import imports_of
from zeroflow.optim import Executor, Journal, LocalExecutor
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.features import file_identity
from zeroflow.trial.named_files import images_of, labels_digest, weights_of


@dataclass(frozen=True)
class DataFacts:
    """What tells whether a trial goes on with the data, and with the code of somebody's own, that it began with.

    Attributes:
        classes: names, in the data set's own order.
        labels: hash of the labels of all samples.
        files: changes with the files of the images, and with where they are.
        host: the machine that saw the images where they are; elsewhere they have other paths and times.
        named: hashes of weights and images by their names in the configuration, see ``named_files``.
        imports: hashes of the imported files that the cell computes with.
    """

    classes: list[str]
    labels: str
    files: str
    host: str
    named: Mapping[str, str] = field(default_factory=dict)
    imports: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: ImageDataset, config: TrialConfig) -> DataFacts:
        """The facts of a cell's data set and weights as they are on this machine now."""
        files = hashlib.sha256()
        for samples in (dataset.train, dataset.test):
            files.update(file_identity(samples).encode() + b"|")
        named = {**weights_of(config), **images_of(config, dataset)}
        labels, host = labels_digest(dataset), socket.gethostname()
        return cls(list(dataset.class_names), labels, files.hexdigest(), host, named, imports_of(config))

    def differs(self, other: DataFacts) -> bool:
        """Whether these are certainly other data, weights or code."""
        if any(getattr(self, key) != getattr(other, key) for key in ("classes", "labels", "named", "imports")):
            return True
        return self.host == other.host and self.files != other.files


class Checkpoints:
    """The folder of one trial's unfinished work. Every file appears whole or not at all.

    Args:
        folder: made if it is missing; process 0 alone reads and writes it.
        executor: where evaluations run.
    """

    def __init__(self, folder: str | Path, executor: Executor | None = None) -> None:
        self.folder, self.executor = Path(folder), executor or LocalExecutor()
        self.first = self.executor.rank == 0

    @contextmanager
    def locked(self, patience: float = 300.0) -> Iterator[None]:
        """Make the folder, and keep other processes from it meanwhile.

        A process that was given up, but is not dead yet, must not write into what its successor resumes from.

        Args:
            patience: seconds to wait for another process to leave it.

        Raises:
            TimeoutError: it did not.
        """
        if not self.first:
            yield
            return
        deadline = time.monotonic() + patience
        while (lock := self._lock()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder}: another process works on this trial")
            time.sleep(0.1)
        try:
            yield
        finally:
            os.close(lock)

    def _lock(self) -> int | None:
        """The open lock of the folder; None while another process has it."""
        make_folder(self.folder)
        file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), (self.folder / ".lock").stat()):
                return file
        except FileNotFoundError:
            pass  # whoever had the folder has just removed it
        except BlockingIOError:
            pass
        except OSError:
            return file  # a file system without locks
        os.close(file)
        return None

    def begin_with(self, data: DataFacts) -> None:
        """Forget what was made with other data: to resume would mix the two."""
        known = self.load("data")
        if known is not None and DataFacts(**known).differs(data) and self.first:
            for path in (*self.folder.glob("*.pt"), *self.folder.glob("*.losses")):
                path.unlink()
        if known is None or DataFacts(**known) != data:
            self.save("data", dataclasses.asdict(data))

    def journal(self, task: int) -> Journal:
        """The log of a task's evaluations."""
        return Journal(self.folder / f"task-{task}.losses", self.executor)

    def load(self, name: str) -> dict[str, Any] | None:
        """What was saved under a name, on the CPU; None if nothing was."""
        path = self.folder / f"{name}.pt"
        content = path.read_bytes() if self.first and path.exists() else b""
        shared = self.executor.broadcast(content)
        return torch.load(io.BytesIO(shared), map_location="cpu", weights_only=True) if shared else None

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Save tensors, numbers, strings and containers of them under a name, in the place of what was there."""
        if self.first:
            packed = io.BytesIO()  # torch's own writing hides why it failed
            torch.save(dict(content), packed)
            write_atomically(self.folder / f"{name}.pt", packed.getbuffer())

    def tally(self, task: int) -> dict[str, Any] | None:
        """What was measured of a task in hand and of the trial's time; None: nothing yet."""
        known = self.load("tally")
        return known if known and known["task"] == task else None

    def remove(self) -> None:
        """Delete the folder: the trial's result is safe elsewhere."""
        if self.first:
            shutil.rmtree(self.folder, ignore_errors=True)


class KeptTasks:
    """Finished tasks that other cells may begin at: those with the same settings up to there.

    Args:
        folder: for each cell without ``later`` a folder, with a checkpoint for each task.
        executor: where evaluations run.
    """

    def __init__(self, folder: str | Path, executor: Executor | None = None) -> None:
        self.folder, self.executor = Path(folder), executor

    def save(self, config: TrialConfig, stages: int, state: Mapping[str, Any], data: DataFacts) -> None:
        """Keep a trial after so many tasks."""
        own = self._of(config)
        if own.first:
            make_folder(own.folder)
        own.save(f"{stages}", {**state, "data": dataclasses.asdict(data)})

    def load(self, config: TrialConfig, data: DataFacts, *, stages: int, equal: bool) -> dict[str, Any] | None:
        """The trial before the settings change; None if it was not kept, or with other data.

        Args:
            config: of a cell with ``later``.
            data: its own.
            stages: of it, which may be other ones than of the cell that was kept.
            equal: whether they have equally many classes: of those that have not one accuracy is not known.
        """
        before = config.later["task"] - 1
        state = self._of(config).load(f"{before}")
        if state is None or DataFacts(**state["data"]) != data:
            return None
        found = state["history"]["accuracy"]
        accuracy = torch.full((len(found), stages, stages), torch.nan, dtype=found.dtype)
        accuracy[:, :before, :before] = found[:, :before, :before]
        if equal == bool(accuracy[-1, 0, 0].isnan()):
            return None
        state["history"]["accuracy"] = accuracy
        return state

    def _of(self, config: TrialConfig) -> Checkpoints:
        return Checkpoints(self.folder / config.unbranched.cell_id, self.executor)
