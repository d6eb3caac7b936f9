"""Ask and tell: losses that are made elsewhere give the steps that a closure gives, to the bit."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import io
import math
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroflow.optim import NonFiniteLoss, create_optimizer, list_optimizers, optimizers
from zeroflow.optim.noise import Directions

DERIVATIVES = [*list_optimizers("fo-*"), "forward-grad", "zo-per-example"]
NAMES = [name for name in list_optimizers() if name not in DERIVATIVES]


def problem(seed: int = 0) -> tuple[nn.Module, Callable[[nn.Module, int], Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.25), nn.Linear(5, 3))
    images, labels = torch.randn(40, 6), torch.randint(3, (40,))

    def loss(model: nn.Module, step: int) -> Tensor:
        part = slice(10 * (step % 4), 10 * (step % 4) + 10)
        with torch.no_grad():
            return nn.functional.cross_entropy(model(images[part]), labels[part])

    return model, loss


def build(name: str, model: nn.Module, **options: Any) -> Any:
    if name == "zo-svrg":
        options["snapshot_every"] = 3
    return create_optimizer(
        name, model, lr=0.05, queries=max(3, optimizers.get(name).estimator.least_queries), **options
    )


def told(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor], order: int = 1) -> Tensor:
    """One step by ask and tell; candidates are evaluated in this order or the other."""
    while True:
        candidates = optimizer.ask()
        losses = {}
        for candidate in candidates[::order]:
            with candidate.shown():
                losses[candidate.number] = loss()
        if (found := optimizer.tell(losses)) is not None:
            return found


def test_one_candidate_is_shown_at_a_time() -> None:
    """And its parameters may be looked at meanwhile: they stay what they are."""
    model, loss = problem()
    optimizer = build("zo-sgd", model)
    first, second, *_ = optimizer.ask()
    with first.shown():
        torch.manual_seed(0)  # of the dropout masks
        before = loss(model, 0)
        weights = first.parameters()
        torch.manual_seed(0)
        assert torch.equal(loss(model, 0), before)
        shown = dict(model.named_parameters())
        assert all(torch.equal(value, shown[name]) for name, value in weights.items())
        with pytest.raises(RuntimeError, match="candidate 1: candidate 0 is shown, leave its block first"):
            second.parameters()
        assert all(torch.equal(value, shown[name]) for name, value in weights.items())
        with pytest.raises(RuntimeError, match="tell: candidate 0 is shown, leave its block first"):
            optimizer.tell([1.0] * 6)
    assert not all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in weights.items())
    assert optimizer.tell([1.0] * 6) is not None


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("eps or the parameters of a group", lambda optimizer: optimizer.param_groups[0].update(eps_zo=1.0)),
        ("eps or the parameters of a group", lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(2))]})),
        ("seed", lambda optimizer: setattr(optimizer, "seed", 5)),
        ("queries", lambda optimizer: setattr(optimizer, "queries", 5)),
    ],
)
def test_losses_of_candidates_that_would_be_others_now_are_refused(what: str, change: Callable[[Any], Any]) -> None:
    model = nn.Linear(3, 2)
    optimizer = create_optimizer("zo-sgd", list(model.parameters()), lr=0.1, queries=3)
    weights = copy.deepcopy(model.state_dict())
    candidates = optimizer.ask()
    change(optimizer)
    with pytest.raises(RuntimeError, match=f"tell: {what} changed after ask, so the losses are outdated; ask again"):
        optimizer.tell([1.0] * len(candidates))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert optimizer.tell([1.0] * len(optimizer.ask())) is not None


@pytest.mark.parametrize("losses", [None, 5])
def test_what_is_no_list_of_losses_is_refused(losses: Any) -> None:
    optimizer = create_optimizer("zo-sgd", nn.Linear(3, 2), lr=0.1)
    optimizer.ask()
    with pytest.raises(TypeError, match=f"tell: {losses}, expected a loss for each of 2 candidates"):
        optimizer.tell(losses)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"history": 0.5, "sparsity": 0.3}], ids=["plain", "enhanced"])
def test_told_losses_make_the_steps_of_a_closure(name: str, options: dict[str, Any]) -> None:
    model, loss = problem()
    other = copy.deepcopy(model)
    closed, open_ = build(name, model, **options), build(name, other, **options)
    for step in range(7):
        expected = closed.step(functools.partial(loss, model, step))
        found = told(open_, other, functools.partial(loss, other, step), order=-1 if step % 2 else 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two), step
    assert (closed.steps, closed.forwards) == (open_.steps, open_.forwards)


@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam-conserve", "zo-svrg", "es-cma"])
def test_state_is_kept_between_asking_and_telling_in_another_process(name: str) -> None:
    """A day may lie between the two, and between the two rounds of one step."""
    model, loss = problem()
    straight = copy.deepcopy(model)
    expected = build(name, straight)
    for step in range(6):
        expected.step(functools.partial(loss, straight, step))
    optimizer, step = build(name, model), 0
    while step < 6:
        candidates = [candidate.parameters() for candidate in optimizer.ask()]
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        losses = []
        with torch.random.fork_rng():
            for candidate in optimizer.ask():
                with candidate.shown():
                    losses.append(float(loss(model, step)))
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        model, _ = problem(seed=1)
        model.load_state_dict(state["model"])
        optimizer = build(name, model)
        optimizer.load_state_dict(state["optimizer"])
        for before, again in zip(candidates, optimizer.ask(), strict=True):
            for key, value in again.parameters().items():
                assert torch.equal(before[key], value)
        step += optimizer.tell(losses) is not None
    for one, two in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(one, two)


def judged(parameters: dict[str, Tensor]) -> float:
    """What a worker does: it has the model, and is given parameters."""
    model, loss = problem()
    model.load_state_dict(parameters)
    model.eval()
    return float(loss(model, 0))


@pytest.mark.slow
def test_candidates_as_parameters_are_judged_by_a_pool_of_processes() -> None:
    model, loss = problem()
    model.eval()
    other = copy.deepcopy(model)
    optimizer, closed = build("zo-adam", model), build("zo-adam", other)
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for _ in range(3):
            optimizer.tell(list(pool.map(judged, [candidate.parameters() for candidate in optimizer.ask()])))
            closed.step(lambda: loss(other, 0))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)  # another process may have other threads


def test_a_candidate_is_made_from_its_seed_alone() -> None:
    model, _ = problem()
    optimizer = create_optimizer("zo-sgd", [*model.parameters()], lr=0.1, queries=2, eps=0.01, seed=5)
    for candidate in optimizer.ask():
        assert candidate.seed is not None
        seed, step, query, scale = candidate.seed
        z = torch.empty_like(optimizer.flat.vector)
        Directions("gaussian", seed).fill_(z, step, query)
        expected = optimizer.flat.vector + scale * 0.01 * z
        found = torch.cat([value.flatten() for value in candidate.parameters().values()])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
        assert [*candidate.parameters()] == ["0", "1", "2", "3"]
    conserve = build("zo-sgd-conserve", model)
    conserve.tell([1.0 * n for n in range(len(conserve.ask()))])
    assert [candidate.seed is None for candidate in conserve.ask()] == [False, True, True], "a step is no direction"


def test_missing_losses_count_like_those_that_are_not_finite() -> None:
    model, _ = problem()
    other = copy.deepcopy(model)
    closed, open_ = build("zo-sgd", model), build("zo-sgd", other)
    calls = iter([1.0, 2.0, math.nan, 1.5, 1.25, 1.0])
    closed.step(lambda: next(calls))
    open_.ask()
    open_.tell({5: 1.0, 0: 1.0, 1: 2.0, 4: 1.25, 3: None})
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    before = copy.deepcopy(other.state_dict())
    open_.ask()
    assert open_.tell({}).isnan()
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pytest.raises(NonFiniteLoss):
        for _ in range(11):
            open_.ask()
            open_.tell([None] * 6)


def test_asking_twice_gives_the_same_and_moves_nothing() -> None:
    model, _ = problem()
    before = copy.deepcopy(model.state_dict())
    drawn = torch.get_rng_state()
    optimizer = build("zo-adam", model)
    first, second = ([c.parameters() for c in optimizer.ask()] for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)
    assert len({float(c["0.weight"].sum()) for c in first}) == 6
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    again = pickle.loads(pickle.dumps(optimizer))
    assert [*again.ask()[0].parameters()] == [*first[0]]


def test_batch_statistics_stay_and_schedulers_go_on() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = create_optimizer("zo-sgd", model, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    images, before = torch.randn(8, 4), model[1].running_mean.clone()
    for _ in range(2):
        told(optimizer, model, lambda: model(images).square().mean())
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert torch.equal(model[1].running_mean, before)


def test_what_does_not_belong_together_is_said() -> None:
    model, loss = problem()
    optimizer = build("zo-sgd", model)
    with pytest.raises(RuntimeError, match="call ask first"):
        optimizer.tell([1.0])
    (first, *_) = optimizer.ask()
    with pytest.raises(ValueError, match="1 losses of 6 candidates"):
        optimizer.tell([1.0])
    with pytest.raises(ValueError, match="candidate 6, expected numbers from 0 to 5"):
        optimizer.tell({6: 1.0})
    with pytest.raises(TypeError, match="tell: expected a scalar loss, got str"):
        optimizer.tell(["low"] * 6)
    with pytest.raises(RuntimeError, match="awaits its losses"):
        optimizer.step(lambda: loss(model, 0))
    optimizer.tell([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    with pytest.raises(RuntimeError, match="the step is over"):
        first.parameters()
    optimizer.ask()
    with torch.no_grad():
        model[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="changed after ask"):
        optimizer.tell([1.0] * 6)
    assert len(optimizer.ask()) == 6
    for name in DERIVATIVES:
        with pytest.raises(TypeError, match=r"use step\(closure\)"):
            create_optimizer(name, model, lr=0.1).ask()
    hybrid = build("zo-sgd", model, hybrid=1)
    with pytest.raises(TypeError, match=r"use step\(closure\)"):
        hybrid.ask()
    hybrid.step(lambda: nn.functional.cross_entropy(model(torch.ones(2, 6)), torch.zeros(2, dtype=torch.long)))
    assert len(hybrid.ask()) == 6
