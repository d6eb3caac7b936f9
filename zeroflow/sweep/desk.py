"""The desk: what all processes of a sweep share, an actor on the node that the sweep was started on.

It writes into the store, whichever node a cell runs on; it is where a trial leaves a cell for a group of workers and gets the
outcome; and it gives back what a group held on the cluster once the group is dead. Calls that wait for somebody are made again by Ray should the desk itself be killed: it remembers nothing that
they do not bring along.
"""

from __future__ import annotations

import asyncio
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

MARKS = 2**20
"""Groups are told apart by the last bytes of the memory that their workers ask for: below so many."""

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
        self._watches: set[asyncio.Task[None]] = set()

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

    async def watch(self, mark: int, owner: Any) -> None:
        """Give back a group's place on the cluster when the process that started it is dead.

        Ray Train's own helper for that needs the dashboard, which a local Ray goes without.

        Args:
            mark: see ``WorkerGroup``. owner: the actor that started the group.
        """

        async def wait() -> None:
            while True:
                try:
                    await owner.__ray_ready__.remote()  # answered between two cells
                except RayError:
                    break
                await asyncio.sleep(1.0)
            await self.close("", mark)

        task = asyncio.create_task(wait())
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    async def close(self, group: str, mark: int) -> None:
        """Forget a group that is dead or dying, and give back its place on the cluster."""
        self._trays.pop(group, None)
        for _ in range(_LOOKS):
            await asyncio.to_thread(_give_back, mark)
            await asyncio.sleep(1.0)  # its controller may have been about to ask for it


_LOOKS = 5
"""How often it is looked after a dead group's place."""


def _give_back(mark: int) -> None:
    for found in placement_group_table().values():
        asked = [int(bundle.get("memory", 0)) % MARKS for bundle in found["bundles"].values()]
        if found["state"] != "REMOVED" and asked and all(part == mark for part in asked):
            identity = ray.PlacementGroupID(bytes.fromhex(found["placement_group_id"]))
            remove_placement_group(PlacementGroup(identity))


@dataclass
class _Tray:
    """Cells that wait for a group of workers, and outcomes that wait for the trial, by number."""

    cells: dict[int, Setting] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def waiting(self) -> list[int]:
        return [number for number in self.cells if number not in self.outcomes]
