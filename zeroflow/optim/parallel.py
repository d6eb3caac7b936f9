"""The work of one step shared among processes: everybody holds the same parameters and exchanges a few numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, distributed

from zeroflow.optim.executor import Executor, Numbers, PeerError


@contextmanager
def _together() -> Iterator[None]:
    """What a collective operation raises where a peer is gone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"a process that shares the work has exited: {error}") from error


class DistributedExecutor(Executor):
    """Shares evaluations, and the mini-batch of each, over a ``torch.distributed`` group; one all-gather of results a step.

    Process r holds slice r % shards of every mini-batch. The ``shards`` processes that hold a whole one are a query group;
    the groups share out a step's evaluations in blocks. All processes run the same steps; each regenerates the directions
    it needs, so traffic does not depend on the number of parameters (but for an exact gradient's, which is added up).
    Results come back in evaluation order, summed in the order of slices, never in arrival order: the bits do not depend on
    the number of query groups, and the number of slices changes rounding only. An evaluation that raises does so in all
    processes.

    Args:
        shards: slices of a mini-batch; the closure then is a ``Slice``, or every process brings an equally large part.
        group: process group of a backend for CPU tensors, such as gloo; default: the world. A few numbers gain nothing
            from a GPU's own network, and several processes may then share one GPU. For exact gradients of several slices
            ``"cpu:gloo,cuda:nccl"`` takes that network.

    Raises:
        ValueError: the number of processes is no multiple of the number of slices.
    """

    def __init__(self, shards: int = 1, group: distributed.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        if shards < 1 or self.size % shards:
            raise ValueError(f"shards={shards}: expected a divisor of the number of processes, {self.size}")
        self.shards, self.shard, self.groups = shards, self.rank % shards, self.size // shards
        self._backends = str(distributed.get_backend_config(group))
        self._peers = group
        if 1 < shards < self.size:
            first = self.rank - self.shard
            ranks = [distributed.get_global_rank(group, r) if group else r for r in range(first, first + shards)]
            made = distributed.new_group(ranks, backend=self._backends, use_local_synchronization=True)
            self._peers = cast(distributed.ProcessGroup, made)

    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        # Blocks, not strides: the two sides of a query stay together, and its direction is generated once.
        bounds = [count * number // self.groups for number in range(self.groups + 1)]
        number = self.rank // self.shards
        own: list[Numbers] = []
        failure: Exception | None = None
        try:
            own = self.make(range(bounds[number], bounds[number + 1]), evaluate)
        except Exception as error:
            failure = error  # the others wait for an answer: tell them, then raise
        if width is None:
            width = self._agreed(len(own[0]) if own else 0)
        largest = max(after - before for before, after in itertools.pairwise(bounds))
        mine = torch.zeros(largest * width + 1, dtype=torch.float64)
        mine[-1] = float(failure is not None)
        for row, found in zip(mine[:-1].view(largest, width), own, strict=False):
            row[: len(found)] = torch.tensor(found, dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        with _together():
            distributed.all_gather(gathered, mine, group=self.group)
        if failure is not None:
            raise failure
        failed = [rank for rank, block in enumerate(gathered) if block[-1]]
        if failed:
            raise PeerError(f"the evaluations of process {', '.join(map(str, failed))} failed; its own log says how")
        results: list[Numbers] = []
        for first, (before, after) in zip(range(0, self.size, self.shards), itertools.pairwise(bounds), strict=True):
            block = gathered[first]
            for other in gathered[first + 1 : first + self.shards]:
                block = block + other
            results += map(tuple, block[:-1].view(largest, width)[: after - before].tolist())
        return results

    def broadcast(self, content: bytes) -> bytes:
        box = [content]
        source = distributed.get_global_rank(self.group, 0) if self.group else 0
        with _together():
            distributed.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def total(self, vector: Tensor) -> Tensor:
        if self.shards == 1:
            return vector
        direct = vector.device.type == "cpu" or f"{vector.device.type}:nccl" in self._backends
        moved = vector if direct else vector.cpu()
        with _together():
            distributed.all_reduce(moved, group=self._peers)
        return moved.to(vector.device)

    def _agreed(self, width: int) -> int:
        """How many numbers an evaluation gives, for processes that made none."""
        wide = torch.tensor(width)
        with _together():
            distributed.all_reduce(wide, distributed.ReduceOp.MAX, group=self.group)
        return int(wide)
