"""Starting a Ray of this process's own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zeroflow.sweep.environment import changed_environment

QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}
"""Arguments of ``ray.init``."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment of a local Ray: it is nobody else's, and listens on the machine's own address alone (what Ray does on Windows and
macOS of its own accord). Without it its ports are open to the network."""


def start_local_ray(**options: Any) -> None:
    """Start a Ray that only this machine and no signal but this process's reaches; ``ray.shutdown`` ends it.

    Args:
        **options: further arguments of ``ray.init``.
    """
    import ray

    with loopback_only(), sessions_of_their_own():
        ray.init("local", include_dashboard=False, **QUIET, **options)


@contextmanager
def loopback_only() -> Iterator[None]:
    """Have what Ray starts meanwhile listen on this machine alone, whether or not Ray was imported before."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with changed_environment(LOOPBACK):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def sessions_of_their_own() -> Iterator[None]:
    """Have the processes that Ray starts meanwhile in sessions of their own, where no signal to this one's group reaches them.

    ``timeout``, a batch system and a terminal that closes signal the whole group. Ray's own processes would end at once, and
    this one, which then asks them to end in order, would wait a minute for an answer.

    Should this process be killed the kernel ends them with it. Where it cannot (macOS) nothing is other than Ray has it: there
    a process of Ray ends the group.
    """
    from ray._private import services, utils

    before = services.ConsolePopen
    if utils.detect_fate_sharing_support():
        services.ConsolePopen = functools.partial(before, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = before
