"""The desk: what all processes of a sweep share, an actor on the node that the sweep was started on.

It writes into the store, whichever node a cell runs on; it is where a trial leaves a cell for a group of workers and gets the
outcome; and it gives back what a group held on the cluster once the group is dead. Calls that wait for somebody are made again
by Ray should the desk itself be killed: it remembers nothing that they do not bring along.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from zeroflow.grid.placement import BLOCK
from zeroflow.results.store import Store

if TYPE_CHECKING:
    import pyarrow as pa

SWEEPS, GROUPS = 2**12, 2**12
"""What a group holds on the cluster is known by how much of a block of memory its workers ask for, its mark: the number of the
sweep, from 1, and the number of the group, each of so many."""

_GRACE = 20.0
"""Seconds that a group may go unwatched."""

Setting = Mapping[str, Any]
Outcome = Mapping[str, Any]


class Desk:
    """See the module. All methods are called from other processes.

    Args:
        root: of the store. sweep: its number, which tells it from others on the cluster.
    """

    def __init__(self, root: str, sweep: int) -> None:
        self.store, self.sweep = Store(root), sweep
        self._trays: dict[str, _Tray] = defaultdict(_Tray)
        self._alive: set[int] = set()
        self._dead: set[int] = set()
        self._over = asyncio.Event()

    async def write(self, tables: dict[str, pa.Table]) -> None:
        """``Store.write``."""
        await asyncio.to_thread(self.store.write, tables)

    async def done(self, cell: str) -> dict[str, float] | None:
        """``avg``, ``last`` and ``fgt`` of a cell that is finished; None of one that is not."""
        row = await asyncio.to_thread(self.store.row, "trials", cell)
        return row and {key: row[key] for key in ("avg", "last", "fgt")}

    async def run(self, group: str, number: int, setting: Setting) -> Outcome:
        """Leave a cell for a group of workers, and wait for its outcome.

        Args:
            group: name. number: of the cell among those of this group, from 0. setting: see ``train.run_cell``.
        """
        tray = self._trays[group]
        async with tray.changed:
            tray.cells[number] = setting
            tray.changed.notify_all()
            await tray.changed.wait_for(lambda: number in tray.outcomes)
            del tray.cells[number]
            return tray.outcomes[number]

    async def next(self, group: str) -> tuple[int, Setting]:
        """The cell that a group has to work on; waits until there is one. An unfinished one is given again and again."""
        tray = self._trays[group]
        async with tray.changed:
            await tray.changed.wait_for(lambda: bool(tray.waiting()))
            number = min(tray.waiting())
            return number, tray.cells[number]

    async def begin(self, group: str, number: int) -> None:
        """A group begins with a cell, for the first time or again."""
        self._trays[group].begins[number] += 1

    async def answer(self, group: str, number: int, outcome: Outcome) -> None:
        """A worker has the outcome of a cell; the first one counts."""
        tray = self._trays[group]
        async with tray.changed:
            tray.outcomes.setdefault(number, outcome)
            tray.changed.notify_all()

    async def begins(self, group: str, number: int) -> int:
        """How often a group has begun with a cell."""
        return self._trays[group].begins[number]

    async def close(self, group: str, mark: int) -> None:
        """Forget a group that is dead, or about to be."""
        self._trays.pop(group, None)
        self._dead.add(mark)

    async def enrol(self) -> int:
        """A mark for a new group."""
        taken = self._alive | self._dead | (await asyncio.to_thread(places, self.sweep)).keys()
        mark = next(m for m in range(self.sweep * GROUPS, (self.sweep + 1) * GROUPS) if m not in taken)
        self._alive.add(mark)
        return mark

    async def watch(self, mark: int, owner: Any) -> None:
        """Wait until a group is closed, or the process that started it is dead.

        Args:
            mark: of the group. owner: the actor that started it.
        """
        self._alive.add(mark)
        try:
            while mark not in self._dead:
                await owner.__ray_ready__.remote()  # answered between two cells
                await asyncio.sleep(1.0)
        except RayError:
            self._dead.add(mark)
        self._alive.discard(mark)

    async def end(self) -> None:
        """The sweep is over."""
        self._over.set()

    async def keep_order(self) -> None:
        """As long as the sweep runs: give back what its groups held on the cluster, once they are dead.

        Ray Train's own helper for that needs the dashboard, which a local Ray goes without. A group that nobody watches is
        given some time: when the desk was killed those who live come again.
        """
        unwatched: dict[int, float] = {}
        while not self._over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), 1.0)
            try:
                held = await asyncio.to_thread(places, self.sweep)
                for mark, groups in held.items():
                    since = unwatched.setdefault(mark, time.monotonic())
                    if mark in self._dead or (mark not in self._alive and time.monotonic() - since > _GRACE):
                        for place in groups:
                            await asyncio.to_thread(remove_placement_group, place)
                unwatched = {
                    mark: since for mark, since in unwatched.items() if mark in held and mark not in self._alive
                }
            except Exception:  # the cluster's head is busy: the next time
                continue


def places(sweep: int) -> dict[int, list[PlacementGroup]]:
    """What the groups of a sweep hold on the cluster, by mark."""
    found = defaultdict(list)
    for place in placement_group_table().values():
        marks = {int(bundle.get("memory", 0)) % BLOCK for bundle in place["bundles"].values()}
        if len(marks) == 1 and (mark := marks.pop()) // GROUPS == sweep and place["state"] != "REMOVED":
            identity = ray.PlacementGroupID(bytes.fromhex(place["placement_group_id"]))
            found[mark].append(PlacementGroup(identity))
    return found


@dataclass
class _Tray:
    """Cells that wait for a group of workers, and outcomes that wait for the trial, by number."""

    cells: dict[int, Setting] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    begins: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def waiting(self) -> list[int]:
        return [number for number in self.cells if number not in self.outcomes]
