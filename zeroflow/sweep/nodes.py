"""The nodes of the cluster that this process is connected to: those that are there, and those that may come."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from zeroflow.grid.placement import Node

_ANY_NUMBER = 1000
"""Nodes of a kind without a limit that are reckoned with."""


def present_nodes() -> list[Node]:
    """Resources of the nodes that are there now."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def present_and_to_come() -> list[Node]:
    """Resources of the nodes that are there now and of those that may come."""
    present = present_nodes()
    return [*present, *nodes_to_come(present)]


def nodes_to_come(present: Sequence[Node]) -> list[Node]:
    """The nodes that Ray's autoscaler may start beside those that are there; none where there is no autoscaler.

    Kinds of nodes with the same resources (spot and on demand) stand for one another, and those present count for theirs.

    Args:
        present: see ``present_nodes``.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    most: dict[tuple[tuple[str, float], ...], int] = {}
    for group in config.node_group_configs if config else ():
        # What Ray itself adds to a node's resources (its kind of GPU, memory as measured) tells nothing of what fits.
        counted = {name: float(group.resources[name]) for name in ("CPU", "GPU", "memory") if group.resources.get(name)}
        kind = tuple(sorted(counted.items()))
        if kind:
            most[kind] = max(most.get(kind, 0), _ANY_NUMBER if group.max_count < 0 else group.max_count)
    found: list[Node] = []
    for kind, count in most.items():
        whole = {name: amount for name, amount in kind if name != "memory"}
        alive = sum(all(node.get(name, 0.0) == amount for name, amount in whole.items()) for node in present)
        found += [dict(kind)] * max(count - alive, 0)
    return found
