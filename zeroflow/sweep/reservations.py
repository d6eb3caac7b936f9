"""What worker groups hold on the cluster, and whose it is.

A reservation is Ray's placement group for the workers of one ``WorkerGroup``. When a group dies by force nobody gives it back,
and the sweep has to know which of the cluster's placement groups are its dead groups'. Ray Train makes them itself, without a
name or a label that could say so. What can be chosen is how much memory the workers ask for, and Ray tells that of every
placement group. So the number of a reservation is hidden there: the memory that a cell asks for is a multiple of
``MEMORY_BLOCK`` bytes; a group asks for that less one block, plus as many bytes as its number. What was found to fit by whole
blocks still does.

A number is the sweep's, from 1, times ``GROUPS``, plus the group's: sweeps that share a cluster do not touch each other's.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from zeroflow.grid.cell_placement import MEMORY_BLOCK

SWEEPS, GROUPS = 2**12, 2**12
"""How many numbers there are of each; their product is ``MEMORY_BLOCK``."""

Held = Mapping[int, list[PlacementGroup]]


def new_sweep_number() -> int:
    """A number for a sweep, which probably no other one on the cluster has."""
    return random.randrange(1, SWEEPS)


def numbers_of(sweep: int) -> range:
    """The numbers that a sweep's reservations may have."""
    return range(sweep * GROUPS, (sweep + 1) * GROUPS)


def with_number(resources: Mapping[str, float], number: int) -> dict[str, float]:
    """What a worker asks for, with a reservation's number hidden in its memory.

    Args:
        resources: of ``CellPlacement.worker``; memory in whole blocks.
        number: of the reservation.
    """
    return {**resources, "memory": max(resources.get("memory", 0.0) - MEMORY_BLOCK, 0.0) + number}


def held_by(sweep: int) -> Held:
    """What the groups of a sweep hold on the cluster, by number of the reservation."""
    found = defaultdict(list)
    for place in placement_group_table().values():
        numbers = {int(bundle.get("memory", 0)) % MEMORY_BLOCK for bundle in place["bundles"].values()}
        if len(numbers) == 1 and (number := numbers.pop()) in numbers_of(sweep) and place["state"] != "REMOVED":
            identity = ray.PlacementGroupID(bytes.fromhex(place["placement_group_id"]))
            found[number].append(PlacementGroup(identity))
    return found


def give_back(sweep: int) -> None:
    """Give back all that the groups of a sweep hold."""
    for places in held_by(sweep).values():
        for place in places:
            remove_placement_group(place)
