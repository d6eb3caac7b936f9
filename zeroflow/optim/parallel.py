"""Queries of one step shared among processes: everybody holds the same parameters and exchanges scalars only."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import distributed

from zeroflow.optim.objective import Numbers


class DistributedExecutor:
    """Shares evaluations out over a ``torch.distributed`` group, in blocks, with one all-gather of the results a step.

    All processes must run the same steps on the same mini-batches; each regenerates the directions it needs, so traffic
    does not depend on the number of parameters. Results come back in evaluation order, never in arrival order: the bits
    do not depend on the number of processes.

    Args:
        group: process group of a backend for CPU tensors, such as gloo; default: the world. A few numbers gain nothing
            from a GPU's own network, and several processes may then share one GPU.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)

    def map(self, count: int, width: int, evaluate: Callable[[int], Numbers]) -> list[Numbers]:
        # Blocks, not strides: the two sides of a query stay together, and its direction is generated once.
        bounds = [count * rank // self.size for rank in range(self.size + 1)]
        largest = max(after - before for before, after in itertools.pairwise(bounds))
        mine = torch.zeros((largest, width), dtype=torch.float64)
        for place, index in enumerate(range(bounds[self.rank], bounds[self.rank + 1])):
            mine[place] = torch.tensor(evaluate(index), dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(gathered, mine, group=self.group)
        return [
            tuple(row)
            for block, (before, after) in zip(gathered, itertools.pairwise(bounds), strict=True)
            for row in block[: after - before].tolist()
        ]
