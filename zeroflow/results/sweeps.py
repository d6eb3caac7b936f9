"""Records of sweeps, beside the tables: ``<root>/sweeps/<start>-<id>.json``, one for each run of a grid.

While a sweep runs its record is written anew every few seconds, and a second file ``<start>-<id>.cells.json`` names its cells
and their placement: that is what ``zeroflow status`` reads from another terminal. What remains is how long the whole took,
which no cell's row says.
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

from zeroflow.errors import ConfigError

if TYPE_CHECKING:
    from zeroflow.results.store import Store
    from zeroflow.trial.config import TrialConfig

_LOST_AFTER = 90.0
"""Seconds without a word after which a sweep that has not said how it ended counts as killed."""

_FORGOTTEN_AFTER = 86400.0
"""Seconds after which that is written down."""


class SweepRecord:
    """The record of this process's sweep.

    Args:
        store: where.
        name: of the grid.
        cells: what it runs.
        placement: how, plain JSON values.
        commit: of the code.

    Raises:
        ConfigError: the store cannot be written.
    """

    def __init__(
        self, store: Store, name: str, cells: Sequence[TrialConfig], placement: Mapping[str, Any], commit: str | None
    ) -> None:
        self.store, self._began = store, time.monotonic()
        for old in sweeps(store):
            # Of another machine, whose clock may differ, only after long.
            if old["state"] == "killed" and (old["host"] == socket.gethostname() or _silence(old) > _FORGOTTEN_AFTER):
                stem = str(old.pop("file")).removesuffix(".json")
                store.put_file(f"sweeps/{stem}.json", (json.dumps(old) + "\n").encode())
                store.drop_file(f"sweeps/{stem}.cells.json")
        now = datetime.now(UTC)
        self._file = f"sweeps/{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        self._fixed = {
            "grid": name,
            "cells": len(cells),
            "commit": commit,
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": now.isoformat(timespec="seconds"),
        }
        try:
            self._open(cells, placement)
        except OSError as error:
            raise ConfigError(f"results {store.root!r}: cannot be written: {error.strerror or error}") from None

    def _open(self, cells: Sequence[TrialConfig], placement: Mapping[str, Any]) -> None:
        work = {"cells": [config.canonical() for config in cells], "placement": placement}
        self.store.put_file(f"{self._file}.cells.json", json.dumps(work).encode())
        self.write("running", {})

    def write(self, state: str, progress: Mapping[str, Any]) -> None:
        """Write how far it is.

        Args:
            state: ``running``, ``finished``, or why it ended.
            progress: plain JSON values.
        """
        times = {
            "state": state,
            "seconds": round(time.monotonic() - self._began, 1),
            "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.store.put_file(f"{self._file}.json", (json.dumps({**self._fixed, **times, **progress}) + "\n").encode())

    def end(self, state: str, progress: Mapping[str, Any]) -> None:
        """Write how it ended, without what only matters while it runs."""
        for name in ("host", "pid"):
            self._fixed.pop(name)
        self.write(state, progress)
        self.store.drop_file(f"{self._file}.cells.json")


def sweeps(store: Store) -> list[dict[str, Any]]:
    """The records of a store's sweeps, the oldest first. A running one that is gone, or has long been silent, is ``killed``."""
    found = []
    for name, content in store.files("sweeps"):
        if not name.endswith(".json") or name.endswith(".cells.json"):
            continue
        try:
            record = json.loads(content)
            if record["state"] == "running" and _is_lost(record):
                record["state"] = "killed"
        except (ValueError, KeyError, TypeError):
            continue  # not one of ours
        found.append({"file": name, **record})
    return found


def work_of(store: Store, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """``cells`` (canonical configurations) and ``placement`` of a sweep's record; None once it has ended."""
    wanted = str(record["file"]).removesuffix(".json") + ".cells.json"
    content = dict(store.files("sweeps")).get(wanted)
    return None if content is None else json.loads(content)


def _is_lost(record: Mapping[str, Any]) -> bool:
    return _silence(record) > _LOST_AFTER or (record["host"] == socket.gethostname() and not is_alive(record["pid"]))


def _silence(record: Mapping[str, Any]) -> float:
    """Seconds since a record was written."""
    return (datetime.now(UTC) - datetime.fromisoformat(record["written_at"])).total_seconds()


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
