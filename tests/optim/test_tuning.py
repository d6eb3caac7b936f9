"""lr and eps chosen on one's own model: within the budget, with nothing left behind, and good enough to train with."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from zeroflow.errors import ConfigError
from zeroflow.optim import create_optimizer, list_optimizers, optimizers, tune

DIGITS = load_digits()
ORDER = torch.randperm(len(DIGITS.target), generator=torch.Generator().manual_seed(0))
IMAGES, LABELS = torch.tensor(DIGITS.data / 16.0, dtype=torch.float32)[ORDER], torch.tensor(DIGITS.target)[ORDER]
Closures = list[Callable[[], Tensor]]


def network(*last: nn.Module, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), *last, nn.Linear(width, 10))


def closures(model: nn.Module, each: bool = False, batch: int = 100) -> Closures:
    def of(first: int) -> Callable[[], Tensor]:
        part = slice(first, first + batch)
        return lambda: nn.functional.cross_entropy(
            model(IMAGES[part]), LABELS[part], reduction="none" if each else "mean"
        )

    return [of(first) for first in range(0, 1400, batch)]


def options(name: str) -> dict[str, bool]:
    return {"separable": True} if name == "es-cma" else {}


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(IMAGES[1400:]).argmax(1) == LABELS[1400:]).double().mean())


@pytest.mark.parametrize("constants", [(0.0, 0.0, 0.0, 0.0), (3.0, 0.0, 0.0, 0.0), (0.0, 3.0, 3.0, 3.0)])
def test_mini_batches_of_other_losses_bend_nothing(constants: tuple[float, ...]) -> None:
    """A bowl's trace and lr are the same whatever its closures have beside it."""
    theta = nn.Parameter(torch.ones(50, dtype=torch.float64))
    found = tune([lambda c=c: theta.square().sum() / 2 + c for c in constants], [theta], "zo-sgd", queries=1)
    assert found.lr == pytest.approx(1 / 50, rel=0.8)
    reference = tune([lambda: theta.square().sum() / 2] * 4, [theta], "zo-sgd", queries=1)
    assert found.lr == pytest.approx(reference.lr, rel=1e-6)


class Running(nn.Module):
    """Less a running mean, which is changed where it is, or replaced."""

    def __init__(self, replaced: bool) -> None:
        super().__init__()
        self.replaced = replaced
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        now = 0.9 * self.mean + 0.1 * x.mean(0)
        if self.replaced:
            self.mean = now
        else:
            self.mean.copy_(now)
        return x - self.mean


@pytest.mark.parametrize("name", ["zo-sgd", "fo-sgd"])
def test_buffers_that_a_module_replaces_are_those_of_before(name: str) -> None:
    found = []
    for replaced in (False, True):
        model = nn.Sequential(Running(replaced), network())
        buffer = model[0].mean
        found.append(tune(closures(model)[:3], model, name, budget=300))
        assert model[0].mean is buffer and not buffer.any()
    assert found[0] == found[1]


@pytest.mark.parametrize("name", list_optimizers())
def test_it_keeps_within_its_budget_and_leaves_nothing_behind(name: str) -> None:
    each = name == "zo-per-example"
    model = network(nn.LayerNorm(16) if each else nn.BatchNorm1d(16), nn.Dropout(0.3))
    count = 0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    def counted(one: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            nonlocal count
            count += 1
            return one()

        return closure

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tune([*map(counted, closures(model, each))], model, name, queries=2, budget=700, **options(name))
    assert count <= found.forwards <= 700
    assert found.forwards >= 100
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert drawn[1] == random.getstate() and (drawn[2] == np.random.get_state()[1]).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.lr > 0 and found.eps > 0 and math.isfinite(found.loss[1])
    assert name in str(found) and f"lr={found.lr:.3g}" in str(found)


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("zo-adam", "forward-grad")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zo-sgd", "zo-fzoo", "es-cma", *LONG])
def test_what_it_chooses_trains(name: str) -> None:
    """A network that first order takes to 97 %, from 8,000 forward passes; the registered lr would not do."""
    model = network(width=32)
    batches = closures(model)
    found = tune(batches, model, name, **options(name))
    assert found.learns
    optimizer = create_optimizer(name, model, **found.arguments)
    step = 0
    while optimizer.equivalents + found.forwards < 8000:
        optimizer.step(batches[step % len(batches)])
        step += 1
    assert accuracy(model) > 0.85 * 0.97


@pytest.mark.slow
def test_a_loss_that_moves_in_steps_gets_an_eps_that_bridges_them() -> None:
    model = network(width=32)

    def of(one: slice) -> Callable[[], Tensor]:
        return lambda: (model(IMAGES[one]).argmax(1) != LABELS[one]).double().mean()

    steps = [of(slice(first, first + 100)) for first in range(0, 1400, 100)]
    found = tune(steps, model, "zo-adam", budget=1000)
    assert found.eps >= 0.03
    assert tune(closures(model), model, "zo-adam", budget=1000).eps < found.eps
    optimizer = create_optimizer("zo-adam", model, **found.arguments)
    for number in range(2000):
        optimizer.step(steps[number % len(steps)])
    assert accuracy(model) > 0.5


@pytest.mark.slow
def test_the_same_question_has_the_same_answer() -> None:
    found = []
    for noise in (1, 2):
        model = network(nn.Dropout(0.5))
        torch.manual_seed(noise)
        found.append(tune(closures(model), model, "zo-sgd", seed=3))
    assert found[0] == found[1]
    model = network(nn.Dropout(0.5))
    assert tune(closures(model), model, "zo-sgd", seed=4).runs != found[0].runs


def test_a_loss_that_diverges_everywhere_ends_in_an_error_and_one_that_is_flat_is_told() -> None:
    model = network()
    with pytest.raises(ValueError, match="no finite loss"):
        tune(lambda: torch.tensor(math.nan), model, "zo-sgd")
    found = tune(lambda: torch.tensor(1.0), model, "zo-sgd")
    assert not found.learns and "no run lowers the loss" in str(found)


def test_bad_input_is_told_before_any_work() -> None:
    model = network()

    def never() -> Tensor:
        raise AssertionError("asked")

    with pytest.raises(ConfigError, match="zo-adam"):
        tune(never, model, "zo-adan")
    with pytest.raises(ConfigError, match=r"budget=50 .*expected at least \d+"):
        tune(never, model, "zo-sgd", budget=50)
    with pytest.raises(ConfigError, match="expected a closure"):
        tune([], model, "zo-sgd")
    with pytest.raises(ConfigError, match="momentum"):
        tune(never, model, "zo-sgd", momentun=0.9)


def test_without_lr_the_default_is_taken_and_said() -> None:
    with pytest.warns(UserWarning, match=r"zo-adam: lr=0.001, the default.*tune"):
        optimizer = create_optimizer("zo-adam", network())
    assert optimizer.param_groups[0]["lr"] == optimizers.get("zo-adam").default_lr
