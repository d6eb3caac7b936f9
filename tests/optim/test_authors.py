"""The authors' own optimizer as an oracle: given its directions, ours takes its steps, but for what is written down.

``authors/recorded.json`` holds what ``infty`` 0.1.2 did (``authors/record.py``); the package is not needed here. The table of
differences in ``docs/conformance.md`` names the tests below.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from authors.record import FILE, PUBLISHED, loss_of, network
from places import ROOT
from torch import Tensor, nn

from zeroflow import TrialConfig
from zeroflow.errors import ConfigError
from zeroflow.optim import ThreeStepOptimizer, create_optimizer, noise

RECORDED = json.loads(FILE.read_text())
RUNS: dict[str, dict[str, Any]] = RECORDED["runs"]
FACTS: dict[str, Any] = RECORDED["facts"]
EPS = 1e-3
ADAM = {"lr": 0.02}
SAME = {"atol": 1e-6, "rtol": 0.0}


def thetas(name: str) -> Tensor:
    """Their parameters before and after each step, ``[steps + 1, 20]``."""
    return torch.tensor(RUNS[name]["theta"], dtype=torch.float64)


def parameters_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())]).double()


def started(name: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The network with the parameters that they started from."""
    model, place = network(dtype), 0
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(thetas(name)[0, place : place + p.numel()].view(p.shape))
            place += p.numel()
    return model


def loss_at(theta: Tensor) -> float:
    model = network()
    torch.nn.utils.vector_to_parameters(torch.zeros_like(theta), model.parameters())
    place = 0
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(theta[place : place + p.numel()].view(p.shape))
            place += p.numel()
        return float(loss_of(model))


def slope(theta: Tensor, z: Tensor) -> float:
    """(L(theta + eps z) - L(theta - eps z)) / 2 eps."""
    return (loss_at(theta + EPS * z) - loss_at(theta - EPS * z)) / (2 * EPS)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """``ours(run, name, ...)``: our parameters before and after each step, given the directions of that run of theirs.

    ``build(model)`` gives parameters or groups; ``after(optimizer)`` makes what is called after each step.
    """

    def follow(
        run: str,
        name: str,
        dtype: torch.dtype = torch.float64,
        build: Callable[[nn.Module], Any] = lambda model: model,
        after: Callable[[ThreeStepOptimizer], Callable[[], None]] = lambda optimizer: lambda: None,
        **options: Any,
    ) -> Tensor:
        drawn = torch.tensor(RUNS[run]["directions"], dtype=torch.float64)
        monkeypatch.setattr(
            noise.Directions, "fill_", lambda self, out, step, query: out.copy_(drawn[step, query % drawn.shape[1]])
        )
        if options.get("sparsity"):  # theirs are the components whose direction is zero
            monkeypatch.setattr(noise, "mask", lambda like, seed, sparsity: (drawn[0, 0] != 0).to(like))
        model = started(run, dtype)
        settings = {"lr": 0.1, "queries": drawn.shape[1], "eps": EPS, **options}
        optimizer = create_optimizer(name, build(model), **settings)
        found, follows = [parameters_of(model)], after(optimizer)
        for losses in RUNS[run]["losses"]:
            loss = optimizer.step(lambda: loss_of(model, dtype))
            if len(found) == 1 and "conserve" not in name:  # later ones are at other places where theirs deviates
                near = losses[-1] if name == "zo-rge" else statistics.fmean(losses)
                assert float(loss) == pytest.approx(near, abs=1e-6)
            follows()
            found.append(parameters_of(model))
        return torch.stack(found)

    return follow


@pytest.mark.parametrize(
    ("run", "name", "options"),
    [
        ("zo-sgd", "zo-sgd", {}),
        ("zo-sgd q=3", "zo-sgd", {}),
        ("zo-sgd published", "zo-sgd", PUBLISHED),
        ("zo-sgd one-sided", "zo-rge", {}),
        ("zo-sgd float32", "zo-sgd", {"lr": 1e-3, "dtype": torch.float32}),
        ("zo-sgd-sign", "zo-sgd-sign", {"lr": 0.01, "sign": "scalar"}),
        ("zo-sgd-sign q=3", "zo-sgd-sign", {"lr": 0.01, "sign": "scalar"}),
        ("zo-adam", "zo-adam", ADAM),
        ("zo-adam q=3", "zo-adam", ADAM),
        ("zo-adam-sign", "zo-adam-sign", {**ADAM, "sign": "scalar"}),
        ("forward-grad", "forward-grad", {}),
        ("sparsity", "zo-sgd", {"sparsity": 0.6}),
        ("sparsity q=3", "zo-adam", {**ADAM, "sparsity": 0.6}),
        ("conserve", "zo-sgd-conserve", {"lr": 10.0}),
        ("history", "zo-sgd", {"history": 0.9, "history_of": "directions"}),
        ("history q=3", "zo-sgd", {"history": 0.6, "history_of": "directions"}),
        ("history sign", "zo-sgd-sign", {"lr": 0.01, "sign": "scalar", "history": 0.9, "history_of": "directions"}),
        ("history adam", "zo-adam", {**ADAM, "sparsity": 0.6, "history": 0.9, "history_of": "directions"}),
    ],
)
def test_the_same_directions_make_the_same_steps(
    run: str, name: str, options: dict[str, Any], ours: Callable[..., Tensor]
) -> None:
    theirs = thetas(run)
    assert float((theirs[-1] - theirs[0]).abs().max()) > 1e-4
    torch.testing.assert_close(ours(run, name, **options), theirs, **SAME)


def test_history_is_one_of_estimates(ours: Callable[..., Tensor]) -> None:
    theirs, mine = thetas("history"), ours("history", "zo-sgd", history=0.9)
    theta, h, expected = theirs[0], None, [theirs[0]]
    for (z,) in torch.tensor(RUNS["history"]["directions"], dtype=torch.float64):
        estimate = slope(theta, z) * z
        h = estimate if h is None else 0.1 * estimate + 0.9 * h
        theta = theta - 0.1 * h
        expected.append(theta)
    torch.testing.assert_close(mine, torch.stack(expected), **SAME)
    assert float((theirs - mine).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("run", "name", "options"),
    [
        ("conserve momentum", "zo-sgd-conserve", {"lr": 10.0, **PUBLISHED}),
        ("conserve adam", "zo-adam-conserve", {"lr": 0.3}),
        ("conserve history", "zo-sgd-conserve", {"lr": 10.0, "history": 0.9, "history_of": "directions"}),
    ],
)
def test_a_conservative_step_never_makes_its_mini_batch_worse(
    run: str, name: str, options: dict[str, Any], ours: Callable[..., Tensor]
) -> None:
    theirs, mine = ([loss_at(theta) for theta in path] for path in (thetas(run), ours(run, name, **options)))
    # What they undo by steps of -2 and +1 through the rule is not undone where it has moments, or mixes directions again.
    assert any(after > before + 1e-3 for before, after in itertools.pairwise(theirs))
    assert all(after <= before for before, after in itertools.pairwise(mine))
    assert mine[-1] < mine[0] - 1e-3


def test_a_conservative_step_takes_several_queries() -> None:
    assert FACTS["a conservative step of two queries"] == "AssertionError"
    model = network()
    optimizer = create_optimizer("zo-sgd-conserve", model, lr=3.0, queries=2)
    losses = [float(loss_of(model).detach())]
    for _ in range(5):
        optimizer.step(lambda: loss_of(model))
        losses.append(float(loss_of(model).detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_a_scheduler_of_the_optimizer_sets_its_learning_rate(ours: Callable[..., Tensor]) -> None:
    def halved(optimizer: ThreeStepOptimizer) -> Callable[[], None]:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5).step

    assert torch.equal(thetas("schedule of the wrapper"), thetas("zo-sgd"))  # theirs has no effect
    mine = ours("schedule of the base", "zo-sgd", after=halved)
    torch.testing.assert_close(mine, thetas("schedule of the base"), **SAME)
    assert float((mine - thetas("zo-sgd")).abs().max()) > 1e-3


def test_forward_gradients_obey_the_rule_that_the_user_gives(ours: Callable[..., Tensor]) -> None:
    run = "forward-grad base"
    theirs, zs = thetas(run), torch.tensor(RUNS[run]["directions"], dtype=torch.float64)
    assert zs.shape[1] == 1 and RUNS[run]["settings"]["args"]["q"] == 3  # other queries are never made

    # lr and weight decay are the wrapper's, without momentum and without decay of biases: two groups.
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        named = sorted(model.named_parameters())
        return [
            {"params": [(n, p) for n, p in named if ("bias" in n) == bias], "weight_decay": 0.0 if bias else 0.2}
            for bias in (False, True)
        ]

    torch.testing.assert_close(ours(run, "forward-grad", build=groups), theirs, **SAME)
    # What the rule they are given would do, and ours does.
    theta, buffer, expected = theirs[0], 0.0, [theirs[0]]
    for (z,) in zs:
        buffer = 0.9 * buffer + slope(theta, z) * z
        theta = theta - 0.5 * buffer
        expected.append(theta)
    mine = ours(run, "forward-grad", lr=0.5, momentum=0.9)
    torch.testing.assert_close(mine, torch.stack(expected), atol=1e-5, rtol=0.0)  # differences instead of derivatives
    assert float((mine - theirs).abs().max()) > 1e-2


def test_sparsity_is_the_share_that_is_held_still() -> None:
    for ratio, held in FACTS["share that sparsity holds still"].items():
        below = statistics.NormalDist().cdf(float(ratio))  # they compare a normal number with the ratio
        error = 5 * math.sqrt(below * (1 - below) / 10_100)
        assert abs(held - below) < error and abs(held - float(ratio)) > 0.08 - error
        optimizer = create_optimizer("zo-sgd", nn.Linear(100, 100), lr=1.0, sparsity=float(ratio))
        before = optimizer.flat.vector.clone()
        module = optimizer._module
        optimizer.step(lambda module=module: module(torch.ones(1, 100)).square().mean())
        share = float((optimizer.flat.vector == before).double().mean())
        assert abs(share - float(ratio)) < 0.03


def test_weight_decay_leaves_alone_what_sparsity_holds_still(ours: Callable[..., Tensor]) -> None:
    run = "sparsity weight decay"
    theirs, mine = thetas(run), ours(run, "zo-sgd", sparsity=0.6, weight_decay=0.5)
    still = torch.tensor(RUNS[run]["directions"][0][0]) == 0
    assert 0 < int(still.sum()) < len(still)
    assert bool((theirs[1, still] != theirs[0, still]).all())
    assert torch.equal(mine[:, still], mine[:1, still].expand(len(mine), -1))
    torch.testing.assert_close(mine[1, ~still], theirs[1, ~still], **SAME)


def test_a_step_of_length_zero_moves_no_bit(ours: Callable[..., Tensor]) -> None:
    theirs = thetas("lr 0 float32")
    assert not torch.equal(theirs[-1], theirs[0])
    mine = ours("lr 0 float32", "zo-sgd", lr=0.0, dtype=torch.float32)
    assert torch.equal(mine, mine[:1].expand_as(mine))


def test_a_model_is_evaluated_and_left_in_its_own_mode() -> None:
    assert not FACTS["training mode after a step"]
    without = loss_at(thetas("zo-sgd")[0])
    assert FACTS["losses of a step in training mode with dropout"] == pytest.approx([without] * 2, abs=1e-3)
    model = nn.Sequential(network(), nn.Dropout(0.5)).train()
    loss = create_optimizer("zo-sgd", model, lr=0.1).step(lambda: loss_of(model))
    assert model.training and all(module.training for module in model.modules())
    assert abs(float(loss) - without) > 1e-2  # dropout was on


def test_the_callers_random_numbers_go_on() -> None:
    assert FACTS["the caller's numbers after a step"] != FACTS["the caller's numbers"]
    model = network()
    optimizer = create_optimizer("zo-sgd", model, lr=0.1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    optimizer.step(lambda: loss_of(model))
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_not_a_number_moves_nothing() -> None:
    model = network()
    before = parameters_of(model)
    assert FACTS["parameters that are not a number after a NaN"] == len(before)
    create_optimizer("zo-sgd", model, lr=0.1).step(lambda: loss_of(model) * torch.nan)
    assert torch.equal(parameters_of(model), before)


@pytest.mark.parametrize("options", [{}, {"history": 0.5, "history_of": "directions", "queries": 2}])
def test_a_run_that_was_saved_ends_with_the_same_bits(options: dict[str, Any]) -> None:
    assert FACTS["uninterrupted"] != FACTS["resumed"]
    options = {"lr": 0.1, "sparsity": 0.3, "weight_decay": 5e-4, "momentum": 0.9, **options}

    def steps(model: nn.Module, optimizer: ThreeStepOptimizer, count: int) -> None:
        for _ in range(count):
            optimizer.step(lambda: loss_of(model))

    whole, first, second = network(), network(), network()
    steps(whole, create_optimizer("zo-sgd", whole, seed=7, **options), 4)
    before = create_optimizer("zo-sgd", first, seed=7, **options)
    steps(first, before, 2)
    second.load_state_dict(first.state_dict())
    after = create_optimizer("zo-sgd", second, seed=8, **options)
    after.load_state_dict(before.state_dict())
    steps(second, after, 2)
    assert torch.equal(parameters_of(second), parameters_of(whole))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zo-sgd", {"history_of": "direction", "history": 0.5}, "history_of='direction'.*'estimates' or 'directions'"),
        ("zo-sgd", {"history_of": "directions"}, "together with history > 0"),
        ("zo-sgd", {"history_of": True, "history": 0.5}, "history_of=True.*a string"),
        ("zo-svrg", {"history_of": "directions", "history": 0.5}, "zo-svrg needs the estimate itself"),
        ("fo-sgd", {"history_of": "directions", "history": 0.5}, "needs the estimator.*got Backpropagation"),
        ("zo-per-example", {"history_of": "directions", "history": 0.5}, "got PerExample"),
        ("zo-sgd", {"history_off": "directions"}, "history_of"),
    ],
)
def test_a_history_that_cannot_be_had_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_optimizer(name, nn.Linear(2, 2), lr=0.1, **options)


def test_a_cell_keeps_its_id_unless_directions_are_mixed() -> None:
    def cell(**options: Any) -> str:
        return TrialConfig.from_dict({"optimizer": "zo-sgd", "optimizer_options": {"history": 0.9, **options}}).cell_id

    assert cell() == cell(history_of="estimates") != cell(history_of="directions")
    with pytest.raises(ConfigError, match="together with history"):
        TrialConfig.from_dict({"optimizer": "zo-sgd", "optimizer_options": {"history_of": "directions"}})


def test_what_is_written_down_names_its_tests() -> None:
    document = (ROOT / "docs" / "conformance.md").read_text()
    section = document.split("## The authors' package")[1].split("\n## ")[0]
    named = set(re.findall(r"`(test_\w+)`", section))
    assert named and named <= {name for name in globals() if name.startswith("test_")}
    assert RECORDED["package"] in section and RECORDED["command"] in section
