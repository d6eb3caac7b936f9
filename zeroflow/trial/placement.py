"""Where and how a trial runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zeroflow.defaults import CACHE_BYTES
from zeroflow.errors import ConfigError
from zeroflow.models.endpoint import Features

GPU_LOADER_THREADS = 4
"""Threads that make mini-batches ahead for a GPU, unless a placement says otherwise."""


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many CPU threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Placement:
    """Where and how a trial runs; never part of what it computes.

    Attributes:
        data_dir: folder of the data sets that are not embedded.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        threads: CPU threads of one process. Another number may change the last bits of a result.
        evaluation_batch: images per forward pass outside training; another value may change the last bits.
        loader_threads: that make mini-batches ahead of the step that needs them; 0: each is made when it is needed; None: 4 on
            a GPU, 0 on the CPU, whose cores have enough to do.
        cache_bytes: the most that decoded images of all data sets, and the most that features of frozen backbones, may take
            on this machine's disk; 0: they are made whenever they are needed.
        endpoint: of a black box: an address, or a callable ``images -> features``.
        endpoint_timeout: seconds of one try.
        price_per_1000_images: that it is asked for; the result then has a price.
        results: of the cells that share a black box's answers, the folder or URI; None: this cell shares them with no other.
        keep_tasks: whether every finished task is kept for cells that branch from it, see ``run_trial``.
    """

    data_dir: str | None = None
    device: str = "auto"
    threads: int = 1
    evaluation_batch: int = 64
    loader_threads: int | None = None
    cache_bytes: int = CACHE_BYTES
    endpoint: Features | str | None = None
    endpoint_timeout: float = 30.0
    price_per_1000_images: float | None = None
    results: str | None = None
    keep_tasks: bool = False

    def __post_init__(self) -> None:
        for name, value in (("loader_threads", self.loader_threads), ("cache_bytes", self.cache_bytes)):
            if value is not None and value < 0:
                raise ConfigError(f"{name}={value!r}: expected an integer >= 0")

    def torch_device(self) -> torch.device:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            device: torch.device | None = torch.device(name)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device={self.device!r}: expected auto, cpu, cuda or cuda:<number>")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={self.device!r}: torch sees no GPU here")
        return device

    def loaders(self) -> int:
        """``loader_threads``, decided by the device where it is left open."""
        if self.loader_threads is None:
            return GPU_LOADER_THREADS if self.torch_device().type == "cuda" else 0
        return self.loader_threads
