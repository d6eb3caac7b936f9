"""Records of sweeps, beside the tables: ``<root>/sweeps/<start>-<id>.json``, one for each run of a grid.

While a sweep runs its record is written anew every few seconds, and a second file ``<start>-<id>.cells.json`` names its cells:
that is what ``zeroflow status`` reads from another terminal. What remains is how long the whole took, which no cell's row
says.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeroflow.results.store import Store
    from zeroflow.trial.config import TrialConfig

_LOST_AFTER = 90.0
"""Seconds without a word after which a sweep that has not said how it ended counts as killed."""


class SweepRecord:
    """The record of this process's sweep.

    Args:
        store: where. name: of the grid. cells: what it runs. commit: of the code.
    """

    def __init__(self, store: Store, name: str, cells: Sequence[TrialConfig], commit: str | None) -> None:
        self.store, self._began = store, time.monotonic()
        now = datetime.now(UTC)
        self._file = f"sweeps/{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        self._fixed = {
            "grid": name, "cells": len(cells), "commit": commit, "cpus": os.cpu_count(), "machine": platform.machine(),
            "host": socket.gethostname(), "pid": os.getpid(), "started_at": now.isoformat(timespec="seconds"),
        }  # fmt: skip
        store.put_file(f"{self._file}.cells.json", json.dumps([config.canonical() for config in cells]).encode())
        self.write("running", {})

    def write(self, state: str, progress: Mapping[str, Any]) -> None:
        """Write how far it is.

        Args:
            state: ``running``, ``finished``, or why it ended. progress: plain JSON values.
        """
        times = {
            "state": state, "seconds": round(time.monotonic() - self._began, 1),
            "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        self.store.put_file(f"{self._file}.json", (json.dumps({**self._fixed, **times, **progress}) + "\n").encode())

    def end(self, state: str, progress: Mapping[str, Any]) -> None:
        """Write how it ended."""
        self.write(state, progress)
        self.store.drop_file(f"{self._file}.cells.json")


def sweeps(store: Store) -> list[dict[str, Any]]:
    """The records of a store's sweeps, the oldest first. A running one that has not been heard of is ``killed``."""
    found = []
    for name, content in store.files("sweeps"):
        if not name.endswith(".json") or name.endswith(".cells.json"):
            continue
        try:
            record = json.loads(content)
            silent = (datetime.now(UTC) - datetime.fromisoformat(record["written_at"])).total_seconds()
        except (ValueError, KeyError, TypeError):
            continue  # being written by another system's hand
        if record["state"] == "running" and silent > _LOST_AFTER:
            record["state"] = "killed"
        found.append({"file": name, **record})
    return found


def cells_of(store: Store, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The canonical configurations of a running sweep's cells; empty once it has ended."""
    wanted = str(record["file"]).removesuffix(".json") + ".cells.json"
    for name, content in store.files("sweeps"):
        if name == wanted:
            return list(json.loads(content))
    return []
