"""The coordinator: what all processes of a sweep share, an actor on the node that the sweep was started on.

It writes into the store, whichever node a cell runs on; it is where a trial leaves a cell for a group of workers and gets the
outcome; and it gives back what a group held on the cluster once the group is dead. Calls that wait for somebody are made again
by Ray should the coordinator itself be killed: it remembers nothing that they do not bring along.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from zeroflow.results.store import Store
from zeroflow.sweep import reservations
from zeroflow.sweep.messages import CellDone, CellTask, Outcome

if TYPE_CHECKING:
    import pyarrow as pa

_GRACE = 20.0
"""Seconds that a group may go unwatched."""


class Coordinator:
    """See the module. All methods are called from other processes.

    Args:
        results: root of the store.
        sweep: its number, see ``reservations``.
    """

    def __init__(self, results: str, sweep: int) -> None:
        self.store, self.sweep = Store(results), sweep
        self._mailboxes: dict[str, _Mailbox] = defaultdict(_Mailbox)
        self._alive: set[int] = set()
        self._dead: set[int] = set()
        self._over = asyncio.Event()

    async def write(self, tables: dict[str, pa.Table]) -> None:
        """``Store.write``."""
        await asyncio.to_thread(self.store.write, tables)

    async def done(self, cell: str) -> CellDone | None:
        """The outcome of a cell that is finished in the store; None of one that is not."""
        row = await asyncio.to_thread(self.store.row, "trials", cell)
        return CellDone(row["avg"], row["last"], row["fgt"]) if row else None

    async def run_task(self, group: str, number: int, task: CellTask | None) -> Outcome:
        """Leave a cell for a group of workers, and wait for its outcome.

        Args:
            group: name.
            number: of the cell among those of this group, from 0.
            task: the cell; None: the group is to end, and no outcome comes.
        """
        box = self._mailboxes[group]
        async with box.changed:
            box.tasks[number] = task
            box.changed.notify_all()
            await box.changed.wait_for(lambda: number in box.outcomes)
            del box.tasks[number]
            return box.outcomes[number]

    async def next_task(self, group: str) -> tuple[int, CellTask | None]:
        """The cell that a group has to work on, with its number; waits until there is one. An unfinished one comes again."""
        box = self._mailboxes[group]
        async with box.changed:
            await box.changed.wait_for(lambda: bool(box.waiting()))
            number = min(box.waiting())
            return number, box.tasks[number]

    async def begin_task(self, group: str, number: int) -> None:
        """A group begins with a cell, for the first time or again."""
        self._mailboxes[group].begun[number] += 1

    async def end_task(self, group: str, number: int, outcome: Outcome) -> None:
        """A worker has the outcome of a cell; the first one counts."""
        box = self._mailboxes[group]
        async with box.changed:
            box.outcomes.setdefault(number, outcome)
            box.changed.notify_all()

    async def times_begun(self, group: str, number: int) -> int:
        """How often a group has begun with a cell."""
        return self._mailboxes[group].begun[number]

    async def close(self, group: str, reservation: int) -> None:
        """Forget a group that is dead, or about to be, and give back what it held."""
        self._mailboxes.pop(group, None)
        self._dead.add(reservation)

    async def new_reservation(self) -> int:
        """The number of a new group's reservation, see ``reservations``."""
        taken = self._alive | self._dead | (await asyncio.to_thread(reservations.held_by, self.sweep)).keys()
        number = next(number for number in reservations.numbers_of(self.sweep) if number not in taken)
        self._alive.add(number)
        return number

    async def watch(self, reservation: int, owner: Any) -> None:
        """Wait until a group is closed, or the process that started it is dead.

        Args:
            reservation: its number.
            owner: the actor that started the group.
        """
        self._alive.add(reservation)
        try:
            while reservation not in self._dead:
                await owner.__ray_ready__.remote()  # answered between two cells
                await asyncio.sleep(1.0)
        except RayError:
            self._dead.add(reservation)
        self._alive.discard(reservation)

    async def end(self) -> None:
        """The sweep is over."""
        self._over.set()

    async def give_back_dead(self) -> None:
        """As long as the sweep runs: give back what its groups held on the cluster, once they are dead.

        Ray Train's own helper for that needs the dashboard, which a local Ray goes without. A group that nobody watches is
        given some time: when the coordinator was killed those who live come again.
        """
        unwatched: dict[int, float] = {}
        while not self._over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), 1.0)
            try:
                held = await asyncio.to_thread(reservations.held_by, self.sweep)
                for number, places in held.items():
                    since = unwatched.setdefault(number, time.monotonic())
                    if number in self._dead or (number not in self._alive and time.monotonic() - since > _GRACE):
                        for place in places:
                            await asyncio.to_thread(remove_placement_group, place)
                unwatched = {n: since for n, since in unwatched.items() if n in held and n not in self._alive}
            except Exception:  # the cluster's head is busy: the next time
                continue


@dataclass
class _Mailbox:
    """Cells that wait for a group of workers, and outcomes that wait for the trial, by number."""

    tasks: dict[int, CellTask | None] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    begun: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def waiting(self) -> list[int]:
        return [number for number in self.tasks if number not in self.outcomes]


@contextmanager
def running_coordinator(results: str) -> Iterator[Any]:
    """Start the coordinator of a sweep on this node; at the end what its groups still hold on the cluster is given back.

    Args:
        results: root of the store.

    Returns:
        The actor's handle.
    """
    sweep = reservations.new_sweep_number()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Calls that wait are many: of all groups of workers at once.
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=100_000)(Coordinator)
    handle = actor.options(scheduling_strategy=here).remote(results, sweep)
    giving_back = handle.give_back_dead.remote()
    try:
        yield handle
    finally:
        # Tune remembers the trial's function, and with it the handle; and what it was about to give back stays else.
        with suppress(Exception):
            ray.get([handle.end.remote(), giving_back], timeout=10)
        ray.kill(handle)
        reservations.give_back(sweep)
