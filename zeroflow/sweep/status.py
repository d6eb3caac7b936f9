"""How far the sweeps on a store are, read from the store alone: from another terminal, or another machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zeroflow.grid.cell_placement import CellPlacement
from zeroflow.grid.grid_file import Grid
from zeroflow.grid.placement import SweepPlacement
from zeroflow.grid.plan import Plan, make_plan
from zeroflow.results.store import Store
from zeroflow.results.sweeps import sweeps, work_of
from zeroflow.sweep.progress import duration
from zeroflow.trial.config import TrialConfig


@dataclass(frozen=True)
class SweepStatus:
    """A sweep that is running, or was killed.

    Attributes:
        record: what it last wrote, see ``SweepRecord``.
        plan: what of its cells is done, failed, missing, and what the missing ones will cost.
        tasks: of cells in work, the number (from 1) of the last task that was trained or is being, where this machine can see it.
    """

    record: Mapping[str, Any]
    plan: Plan
    tasks: Mapping[str, int]

    @property
    def running(self) -> list[dict[str, Any]]:
        """The cells that it was at when it was last heard of, without those that the store has meanwhile."""
        done = {config.cell_id for config in self.plan.done}
        return [cell for cell in self.record.get("running", []) if cell["cell_id"] not in done]

    def describe(self, price_per_hour: float | None = None) -> str:
        """The status as text."""
        record, plan = self.record, self.plan
        left, running = record.get("left_seconds"), self.running
        at = "running" if record["state"] == "running" else "in work when it was killed"
        lines = [
            f"sweep {record['grid']}: {record['state']}, begun {record['started_at']} on {record['host']} (process "
            f"{record['pid']}), last heard of {_ago(record['written_at'])} ago",
            f"  {len(plan.grid.cells)} cells: {len(plan.done)} done, {len(plan.failed)} failed, {len(plan.missing)} missing, "
            f"of them {len(running)} {at}"
            + (f" and {record['elsewhere']} in the hands of other sweeps" if record.get("elsewhere") else "")
            + ("" if left is None else f"; left ~{duration(left)}"),
        ]
        for cell in running:
            since = f"for {_ago(cell['since'])}" if cell.get("since") else "about to start"
            task = f", training has reached task {self.tasks[cell['cell_id']]}" if cell["cell_id"] in self.tasks else ""
            workers = f" on {cell['workers']} workers" if cell["workers"] > 1 else ""
            lines.append(f"  {at}: {cell['cell_id']} {cell['label']}{workers} {since}{task}")
        if plan.missing:
            lines.append(f"  {plan.estimate.describe(price_per_hour)}")
        return "\n".join(lines)


def running_sweeps(store: Store) -> list[SweepStatus]:
    """The sweeps on a store that have not ended, and those that were killed; the oldest first."""
    found = []
    for record in sweeps(store):
        if record["state"] in ("running", "killed") and (work := work_of(store, record)):
            try:
                placement = SweepPlacement(**{**work["placement"], "cell": CellPlacement(**work["placement"]["cell"])})
                grid = Grid(record["grid"], tuple(TrialConfig(**cell) for cell in work["cells"]), placement)
            except TypeError:
                continue  # of another version
            found.append(SweepStatus(record, make_plan(grid, store, None, elsewhere=True), _tasks(store, record)))
    return found


def _tasks(store: Store, record: Mapping[str, Any]) -> dict[str, int]:
    """The last task of each running cell that has a log in the store's folder; one that began at a kept task has none before."""
    unfinished = Path(store.root) / "unfinished"
    found = {}
    for cell in record.get("running", []):
        logs = unfinished.glob(f"{cell['cell_id']}-*/task-*.losses")
        if numbers := [int(log.stem.removeprefix("task-")) for log in logs]:
            found[cell["cell_id"]] = 1 + max(numbers)
    return found


def _ago(moment: str) -> str:
    return duration((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())
