"""What an interrupted trial goes on from: a checkpoint of finished tasks, and for the task in hand its evaluations' log.

A forward-pass step needs no checkpoint of its own: the few numbers that its evaluations gave make it again without a forward
pass (``zeroflow.optim.Journal``), so at most the step in flight is lost. Steps with an exact gradient are saved by epoch.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zeroflow.optim import Executor, Journal, LocalExecutor


class Checkpoints:
    """The folder of one trial's unfinished work. Every file appears whole or not at all.

    Args:
        folder: made if it is missing; process 0 alone reads and writes it. executor: where evaluations run.
    """

    def __init__(self, folder: str | Path, executor: Executor | None = None) -> None:
        self.folder, self.executor = Path(folder), executor or LocalExecutor()
        self.first = self.executor.rank == 0
        if self.first:
            self.folder.mkdir(parents=True, exist_ok=True)

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
        """Save tensors, numbers, texts and containers of them under a name, in the place of what was there."""
        if self.first:
            temporary = self.folder / f".{name}.{os.getpid()}"
            torch.save(dict(content), temporary)
            temporary.replace(self.folder / f"{name}.pt")

    def remove(self) -> None:
        """Delete the folder: the trial's result is safe elsewhere."""
        if self.first:
            shutil.rmtree(self.folder, ignore_errors=True)
