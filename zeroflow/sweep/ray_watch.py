"""Noticing that Ray itself has died below a sweep, which otherwise would wait for it: for a minute, or for ever."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_EVERY = 2.0
"""Seconds between two looks."""

_NEEDED = {"gcs_server": "GCS", "raylet": "raylet"}
"""Processes of Ray without which nothing goes on, with what they are called."""


@contextmanager
def ended_if_ray_dies() -> Iterator[None]:
    """Within the block: end this process, with status 1 and one sentence, once a process is dead that Ray needs on this node.

    Whoever kills one (the kernel, short of memory, or somebody else): nothing that asks Ray returns any more, so no end in order is
    possible, and none is needed. What is finished is in the store, and the logs of unfinished cells are on disk.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY):
            dead = _dead_process()
            if dead and not over.is_set():
                sys.stdout.flush()
                sys.stderr.write(f"the sweep was stopped: Ray's {dead} died; the same command goes on from here\n")
                sys.stderr.flush()
                os._exit(1)

    threading.Thread(target=watch, daemon=True, name="ray-watch").start()
    try:
        yield
    finally:
        over.set()  # from here on Ray is shut down


def _dead_process() -> str | None:
    """The dead process that Ray needs on this node; None: all live."""
    import ray
    from ray._private import worker

    node: Any = worker._global_node
    if node is None or not ray.is_initialized():
        return None
    if node.all_processes:  # a Ray of this process's own
        dead = [kind for kind, _ in node.dead_processes()]
        return next((name for kind, name in _NEEDED.items() if kind in dead), None)
    here = ray.get_runtime_context().get_node_id()
    return next(("raylet" for each in ray.nodes() if each["NodeID"] == here and not each["Alive"]), None)
