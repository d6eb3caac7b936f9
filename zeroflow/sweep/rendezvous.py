"""The rendezvous of a group's workers, without a port that is open to everybody.

torch's own store listens on every address of a machine and asks nobody who they are. This one listens on the address
that Ray uses: of a local Ray, the machine's own (see ``local_ray.LOOPBACK``).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from torch._C._distributed_c10d import TCPStore

_open: list[Any] = []
"""What this process keeps open for the workers of its group: the last one."""


@dataclass
class RendezvousConfig(TorchConfig):  # type: ignore[misc]
    """``TorchConfig`` with that rendezvous."""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: RendezvousConfig) -> None:
        address, port = worker_group.execute_single(0, _serve)
        worker_group.execute(_set_torch_distributed_env_vars)
        size, timeout = len(worker_group), datetime.timedelta(seconds=backend_config.timeout_s)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, address, port, rank, size, backend_config.backend, timeout
                )
                for rank in range(size)
            ]
        )


def _serve() -> tuple[str, int]:
    """Open the store in which workers find each other, in this process; its address and port."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    listener = socket.socket(family)
    listener.bind((address, 0))
    listener.listen(4096)
    port = listener.getsockname()[1]
    _open[:] = [
        TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
    ]
    return address, port


def _join(address: str, port: int, rank: int, size: int, backend: str, timeout: datetime.timedelta) -> None:
    if ipaddress.ip_address(address).is_loopback:
        # gloo would take the address that the machine's name stands for.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    # With the store's own patience: the group's, of weeks, is more than it can count.
    store = TCPStore(address, port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
