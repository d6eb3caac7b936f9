"""Buffers that a forward pass moves: all evaluations of a step see the same ones, however they are moved and from when on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zeroflow.optim import create_optimizer


class Observed(nn.Module):
    """A layer whose output depends on a running mean of itself, and which notes what it saw of it.

    Args:
        replaced: whether the mean is put in the place of the old one, or written into it.
    """

    def __init__(self, *, replaced: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.replaced, self.moves = nn.Linear(3, 1), replaced, True
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("table", torch.ones(5))
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.seen.append(float(self.mean))
        after = 0.5 * self.mean + 0.5 * h.detach().mean()
        if self.moves and self.replaced:
            self.mean = after
        elif self.moves:
            self.mean.copy_(after)
        return h * (1 + self.mean)


def run(model: Observed, moves_from: int = 0, name: str = "zo-sgd") -> list[list[float]]:
    """What each of five steps saw of the mean."""
    model.train()
    optimizer = create_optimizer(name, model, lr=0.05, seed=1)
    x, found = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), []
    for step in range(5):
        model.moves, model.seen = step >= moves_from, []
        optimizer.step(lambda: (model(x) ** 2).mean())
        found.append(model.seen)
    return found


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("moves_from", [0, 1, 3])
@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam-conserve"])
def test_all_evaluations_of_a_step_see_the_same_buffers(replaced: bool, moves_from: int, name: str) -> None:
    model = Observed(replaced=replaced)
    seen = run(model, moves_from, name)
    assert all(len(set(step)) == 1 for step in seen), seen
    after = [*(step[0] for step in seen[1:]), float(model.mean)]
    assert [a != b for a, b in zip([0.0, *after], after, strict=False)] == [step >= moves_from for step in range(5)]


@pytest.mark.parametrize("moves_from", [0, 3])
def test_a_buffer_that_is_replaced_gives_the_bits_of_one_that_is_written_into(moves_from: int) -> None:
    first, second = Observed(replaced=False), Observed(replaced=True)
    assert run(first, moves_from) == run(second, moves_from)
    assert torch.equal(first.layer.weight, second.layer.weight)


def test_batch_norm_that_starts_late_is_still_in_the_steps_evaluations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.0), nn.Linear(4, 1)).train()
    optimizer, x, seen = create_optimizer("zo-sgd", model, lr=0.05, seed=1), torch.randn(8, 3), []

    def closure() -> Tensor:
        seen[-1].append(model[1].running_mean.clone())
        return (model(x) ** 2).mean()

    for momentum in (0.0, 0.0, 0.1, 0.1):
        model[1].momentum = momentum
        seen.append([])
        optimizer.step(closure)
    assert all(torch.equal(step[0], other) for step in seen for other in step)
    assert not seen[2][0].any() and seen[3][0].any()
