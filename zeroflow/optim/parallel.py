"""Queries of one step shared among processes: everybody holds the same parameters and exchanges scalars only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from zeroflow.optim.objective import Numbers


class PeerError(RuntimeError):
    """Another process that shares the work has failed or is gone; its own error says why."""


@contextmanager
def _together() -> Iterator[None]:
    """What a collective operation raises where a peer is gone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"a process that shares the work is gone: {error}") from error


class DistributedExecutor:
    """Shares evaluations out over a ``torch.distributed`` group, in blocks, with one all-gather of the results a step.

    All processes must run the same steps on the same mini-batches; each regenerates the directions it needs, so traffic
    does not depend on the number of parameters. Results come back in evaluation order, never in arrival order: the bits
    do not depend on the number of processes. An evaluation that raises does so in all of them.

    Args:
        group: process group of a backend for CPU tensors, such as gloo; default: the world. A few numbers gain nothing
            from a GPU's own network, and several processes may then share one GPU.
    """

    def __init__(self, shards: int = 1, group: distributed.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)

    def map(self, count: int, evaluate: Callable[[int], Numbers], width: int | None = 1) -> list[Numbers]:
        # Blocks, not strides: the two sides of a query stay together, and its direction is generated once.
        bounds = [count * rank // self.size for rank in range(self.size + 1)]
        own: list[Numbers] = []
        failure: Exception | None = None
        try:
            own = [evaluate(index) for index in range(bounds[self.rank], bounds[self.rank + 1])]
        except Exception as error:
            failure = error  # the others wait for an answer: tell them, then raise
        if width is None:
            width = self._agreed(len(own[0]) if own else 0)
        largest = max(after - before for before, after in itertools.pairwise(bounds))
        mine = torch.zeros(largest * width + 1, dtype=torch.float64)
        mine[-1] = float(failure is not None)
        if own:
            mine[: len(own) * width] = torch.tensor(own, dtype=torch.float64).flatten()
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        with _together():
            distributed.all_gather(gathered, mine, group=self.group)
        if failure is not None:
            raise failure
        failed = [rank for rank, block in enumerate(gathered) if block[-1]]
        if failed:
            raise PeerError(f"the evaluations of process {', '.join(map(str, failed))} failed; its own log says how")
        return [
            tuple(row)
            for block, (before, after) in zip(gathered, itertools.pairwise(bounds), strict=True)
            for row in block[:-1].view(largest, width)[: after - before].tolist()
        ]

    def broadcast(self, content: bytes) -> bytes:
        """What process 0 gave, in all of them."""
        box = [content]
        source = distributed.get_global_rank(self.group, 0) if self.group else 0
        with _together():
            distributed.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def _agreed(self, width: int) -> int:
        """How many numbers an evaluation gives, for processes that made none."""
        wide = torch.tensor(width)
        with _together():
            distributed.all_reduce(wide, distributed.ReduceOp.MAX, group=self.group)
        return int(wide)
