"""The desk: what all processes of a sweep share, an actor on the node that the sweep was started on.

It writes into the store, whichever node a cell runs on; it is where a trial leaves a cell for a group of workers and gets the
outcome; and it gives back what a group held on the cluster once the group is dead. Calls that wait for somebody are made again by Ray should the desk itself be killed: it remembers nothing that
they do not bring along.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from zeroflow.results.store import Store

if TYPE_CHECKING:
    import pyarrow as pa

SWEEPS, GROUPS = 2**14, 2**10
"""What a group holds on the cluster is known by the last bytes of the memory that its workers ask for, its mark: the number of
the sweep, from 1, and the number of the group, of so many."""

_GRACE = 20.0
"""Seconds that a group may go unwatched."""

Setting = Mapping[str, Any]
Outcome = Mapping[str, Any]


class Desk:
    """See the module. All methods are called from other processes.

    Args:
        root: of the store.
    """

    def __init__(self, root: str) -> None:
        self.store = Store(root)
        self._trays: dict[str, _Tray] = defaultdict(_Tray)
        self._alive: set[int] = set()
        self._dead: set[int] = set()

    async def write(self, tables: dict[str, pa.Table]) -> None:
        """``Store.write``."""
        await asyncio.to_thread(self.store.write, tables)

    async def write_failure(self, table: pa.Table) -> None:
        """``Store.write_failure``."""
        await asyncio.to_thread(self.store.write_failure, table)

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
            tray.starts[number] += 1
            return number, tray.cells[number]

    async def answer(self, group: str, number: int, outcome: Outcome) -> None:
        """A worker has the outcome of a cell; the first one counts."""
        tray = self._trays[group]
        async with tray.changed:
            tray.outcomes.setdefault(number, outcome)
            tray.changed.notify_all()

    async def starts(self, group: str, number: int) -> int:
        """How often a group has begun with a cell."""
        return self._trays[group].starts[number]

    async def close(self, group: str, mark: int) -> None:
        """Forget a group that is dead, or about to be."""
        self._trays.pop(group, None)
        self._dead.add(mark)

    async def watch(self, mark: int, owner: Any) -> None:
        """Wait until the process that started a group is dead.

        Args:
            mark: of the group. owner: the actor that started it.
        """
        self._alive.add(mark)
        try:
            while True:
                await owner.__ray_ready__.remote()  # answered between two cells
                await asyncio.sleep(1.0)
        except RayError:
            self._dead.add(mark)

    async def keep_order(self, sweep: int) -> None:
        """As long as the sweep runs: give back what its groups held on the cluster, once they are dead.

        Ray Train's own helper for that needs the dashboard, which a local Ray goes without. A group that nobody watches is
        given some time: when the desk was killed those who live come again.

        Args:
            sweep: the part of all its groups' marks that is the same.
        """
        unwatched: dict[int, float] = {}
        while True:
            for mark, places in (await asyncio.to_thread(_places, sweep)).items():
                since = unwatched.setdefault(mark, time.monotonic())
                if mark in self._dead or (mark not in self._alive and time.monotonic() - since > _GRACE):
                    for place in places:
                        await asyncio.to_thread(remove_placement_group, place)
            await asyncio.sleep(1.0)


def _places(sweep: int) -> dict[int, list[PlacementGroup]]:
    """What the groups of a sweep hold on the cluster, by mark."""
    found = defaultdict(list)
    for place in placement_group_table().values():
        marks = {int(bundle.get("memory", 0)) % (SWEEPS * GROUPS) for bundle in place["bundles"].values()}
        if len(marks) == 1 and (mark := marks.pop()) // GROUPS == sweep and place["state"] != "REMOVED":
            identity = ray.PlacementGroupID(bytes.fromhex(place["placement_group_id"]))
            found[mark].append(PlacementGroup(identity))
    return found


@dataclass
class _Tray:
    """Cells that wait for a group of workers, and outcomes that wait for the trial, by number."""

    cells: dict[int, Setting] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def waiting(self) -> list[int]:
        return [number for number in self.cells if number not in self.outcomes]
