"""What per-example directions are refused for: examples whose losses depend on each other, whenever they begin to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zeroflow.optim import create_optimizer


def test_per_example_refuses_examples_that_meet() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(8, 6), torch.randint(3, (8,))
    with pytest.raises(TypeError, match="they interact"):
        create_optimizer("zo-per-example", model, lr=0.1).step(
            lambda: F.cross_entropy(model(x), y, reduction="none") + 10 * model(x).mean()
        )


class Centred(nn.Module):
    """Has no buffers, and takes the mean of the mini-batch away in training mode alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0) if self.training else x


@pytest.mark.parametrize("known", [True, False], ids=["module", "parameters"])
@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm1d(6, affine=False), Centred], ids=["norm", "centred"])
def test_examples_that_meet_in_another_mode_alone_are_found_there(layer: Any, known: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), layer(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    optimizer = create_optimizer("zo-per-example", model if known else list(model.parameters()), lr=1e-3)
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert optimizer.forwards == 2 * 2 + 5
    model.train()
    with pytest.raises(TypeError, match="interact"):
        optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))


class Loss(nn.Module):
    """Of logits; with ``meets`` those of all examples are compared with each other."""

    def __init__(self, meets: bool = False) -> None:
        super().__init__()
        self.meets = meets

    def forward(self, out: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out @ out.T if self.meets else out, torch.arange(len(out)) % 6, reduction="none")


class Trainer:
    def __init__(self, model: nn.Module, x: torch.Tensor, criterion: nn.Module) -> None:
        self.model, self.x, self.criterion = model, x, criterion

    def __call__(self) -> torch.Tensor:
        return self.criterion(self.model(self.x))


WAYS: dict[str, Callable[[nn.Module, torch.Tensor, nn.Module], Callable[[], torch.Tensor]]] = {
    "closure": lambda model, x, criterion: lambda: criterion(model(x)),
    "partial": lambda model, x, criterion: functools.partial(Trainer.__call__, Trainer(model, x, criterion)),
    "method": lambda model, x, criterion: Trainer(model, x, criterion).__call__,
    "object": Trainer,
    "list": lambda model, x, criterion: lambda several=[criterion]: several[0](model(x)),  # type: ignore[misc]
}


@pytest.mark.parametrize("way", WAYS)
def test_examples_that_meet_in_another_loss_alone_are_found_there(way: str) -> None:
    """However the loss comes into the closure, and if each step has one of its own; what was verified is not verified again."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 6), torch.randn(32, 4)
    optimizer = create_optimizer("zo-per-example", model, lr=1e-3)
    for _ in range(3):
        optimizer.step(WAYS[way](model, x, Loss()))
        optimizer.step(lambda: (model(x) ** 2).sum(1))
    assert optimizer.forwards == 6 * 2 + 2 * 5
    with pytest.raises(TypeError, match="interact"):
        optimizer.step(WAYS[way](model, x, Loss(meets=True)))


@pytest.mark.parametrize("how", ["times", "alpha", "numpy"])
def test_examples_that_meet_in_a_term_whose_weight_begins_at_zero_are_found_then(how: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 6), torch.randn(32, 4)
    optimizer = create_optimizer("zo-per-example", model, lr=1e-3)
    weight: Any = np.float32(0.0) if how == "numpy" else 0.0

    def losses() -> torch.Tensor:
        out = model(x)
        own, together = out.square().sum(1), out.mean(0).square().sum().expand(32)
        return torch.add(own, together, alpha=weight) if how == "alpha" else own + weight * together

    for _ in range(3):
        optimizer.step(losses)
    assert optimizer.forwards == 3 * 2 + 5
    weight = np.float32(0.1) if how == "numpy" else 0.1
    with pytest.raises(TypeError, match="interact"):
        optimizer.step(losses)


def test_modes_that_change_between_steps_or_inside_cost_nothing() -> None:
    torch.manual_seed(0)
    model, teacher, x = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1)), nn.Dropout(), torch.randn(32, 4)
    optimizer = create_optimizer("zo-per-example", model, lr=1e-3)

    def losses() -> torch.Tensor:
        model.train()
        teacher.eval()
        found = F.cross_entropy(model(x), teacher(x).argmax(1), reduction="none")
        teacher.train()
        return found

    for _ in range(4):
        optimizer.step(losses)
        model.eval()
    assert optimizer.forwards == 4 * 2 + 5


@pytest.mark.parametrize("eps", [1e-3, 1e-4])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["none", "triplet", "contrast", "rank", "standardised", "entropy", "scale", "even"])
def test_examples_that_meet_in_the_loss_are_found_whatever_the_loss(
    kind: str, seed: int, size: int, eps: float
) -> None:
    torch.manual_seed(seed)
    x, key = torch.randn(size, 12), torch.randn(size, 4)
    model, head = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4)), nn.Linear(4, 4, bias=False)
    nn.init.zeros_(head.weight)
    if kind == "even":
        model.requires_grad_(False)

    def losses() -> torch.Tensor:
        out = model(x)
        plain = F.cross_entropy(out, key.argmax(1), reduction="none")
        if kind == "triplet":
            near, far = ((out - out.roll(by, 0)).square().sum(1) for by in (1, 2))
            return F.relu(near - far + 1)
        if kind == "contrast":
            own = F.normalize(out)
            return F.cross_entropy(2 * own @ own.T, torch.arange(size), reduction="none")
        if kind == "rank":
            return F.softplus(-(out[:, 0] - out[:, 0].mean()) * key[:, 0].sign())
        if kind == "even":  # in the displacement of a head that is zero
            return F.cross_entropy(
                head(out) / (1e-3 + head(out).square().mean().sqrt()), key.argmax(1), reduction="none"
            )
        if kind == "standardised":
            return ((out - out.mean(0)) / out.std(0) - key).square().mean(1)
        if kind == "entropy":
            share = out.softmax(1).mean(0)
            return plain + 0.1 * (share * share.log()).sum()
        return plain / (1 + 0.1 * out.std()) if kind == "scale" else plain

    optimizer = create_optimizer("zo-per-example", head if kind == "even" else model, lr=1e-3, eps=eps, seed=seed)
    if kind == "none":
        optimizer.step(losses)
        assert optimizer.forwards == 2 + 5
        return
    with pytest.raises(TypeError, match="interact"):
        optimizer.step(losses)
