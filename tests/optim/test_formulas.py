"""Optimizers against independent references: formulas, torch's own, timm's rules."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from problems import PAPER, flat, problem, reference_directions
from torch import nn
from torch.nn import functional as F

from zeroflow.errors import ConfigError
from zeroflow.optim import OptimizerInfo, create_optimizer, list_optimizers, register_optimizer
from zeroflow.optim.estimators import SPSA, Backpropagation, Estimator

FORWARD_ONLY = [name for name in PAPER if not name.startswith("fo-")]


def test_the_papers_nine_names_exist() -> None:
    assert set(PAPER) <= set(list_optimizers())
    assert list_optimizers("fo-[as]*") == ["fo-adam", "fo-sgd", "fo-sgd-checkpoint"]


@pytest.mark.parametrize("queries", [1, 3])
def test_spsa_sgd_follows_its_formula_on_a_quadratic(queries: int) -> None:
    """theta_{t+1} = theta_t - lr * mean_i g_i z_i, with L, g and z computed by NumPy."""
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(5, 5))
    matrix = matrix @ matrix.T
    theta = rng.normal(size=5)
    parameter = nn.Parameter(torch.tensor(theta))
    optimizer = create_optimizer("zo-sgd", [parameter], lr=0.01, queries=queries, eps=1e-3, seed=7)
    constant = torch.tensor(matrix)

    def loss(at: np.ndarray) -> float:
        return float(0.5 * at @ matrix @ at)

    for step in range(20):
        optimizer.step(lambda: 0.5 * parameter @ constant @ parameter)
        z = reference_directions(7, step, queries, 5)
        slopes = [(loss(theta + 1e-3 * d) - loss(theta - 1e-3 * d)) / 2e-3 for d in z]
        theta = theta - 0.01 * np.mean([g * d for g, d in zip(slopes, z, strict=True)], axis=0)
    np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=0, atol=1e-12)


def test_forward_gradient_is_the_true_slope_along_z() -> None:
    model, loss = problem(torch.float64)
    names = sorted(dict(model.named_parameters()))
    gradient = torch.autograd.grad(loss(), [dict(model.named_parameters())[name] for name in names])
    gradient = torch.cat([g.reshape(-1) for g in gradient]).numpy()
    before = flat(model).numpy().copy()
    create_optimizer("forward-grad", model, lr=0.5, queries=2, seed=3).step(loss)
    z = reference_directions(3, 0, 2, len(before))
    expected = before - 0.5 * np.mean([(gradient @ d) * d for d in z], axis=0)
    np.testing.assert_allclose(flat(model).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "rule"), [("fo-sgd", torch.optim.SGD), ("fo-adam", torch.optim.Adam)])
def test_first_order_equals_torch_bit_for_bit(name: str, rule: type[torch.optim.Optimizer]) -> None:
    ours, our_loss = problem()
    theirs, their_loss = problem()
    extra = {"momentum": 0.9} if name == "fo-sgd" else {}
    mine = create_optimizer(name, ours, lr=0.05, weight_decay=0.01, **extra)
    reference = rule(theirs.parameters(), lr=0.05, weight_decay=0.01, **extra)
    for _ in range(10):
        mine.step(our_loss)
        reference.zero_grad()
        their_loss().backward()
        reference.step()
    assert torch.equal(flat(ours), flat(theirs))


def test_zo_adam_is_torchs_adam_on_the_estimate() -> None:
    model, loss = problem(torch.float64)
    twin = copy.deepcopy(model)
    reference = torch.optim.Adam(twin.parameters(), lr=0.01)
    optimizer = create_optimizer("zo-adam", model, lr=0.01, seed=5)
    names = sorted(dict(model.named_parameters()))
    for step in range(5):
        z = torch.tensor(reference_directions(5, step, 1, flat(model).numel())[0])
        sides, first = [], 0
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            first = 0
            with torch.no_grad():
                for name in names:
                    p = dict(moved.named_parameters())[name]
                    p += sign * 1e-3 * z[first : first + p.numel()].view_as(p)
                    first += p.numel()
                sides.append(float(loss(moved)))
        slope = (sides[0] - sides[1]) / 2e-3
        first = 0
        for name in names:
            p = dict(twin.named_parameters())[name]
            p.grad = slope * z[first : first + p.numel()].view_as(p)
            first += p.numel()
        reference.step()
        optimizer.step(loss)
    torch.testing.assert_close(flat(model), flat(twin), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_estimate_is_unbiased() -> None:
    """The mean of many estimates approaches the gradient as fast as its variance says, within 5 standard errors."""
    model, loss = problem(torch.float64)
    gradient = torch.autograd.grad(loss(), list(dict(sorted(model.named_parameters())).values()))
    gradient = torch.cat([g.reshape(-1) for g in gradient])
    before, samples = flat(model), 400
    estimates = []
    for seed in range(samples):
        twin = copy.deepcopy(model)
        create_optimizer("zo-sgd", twin, lr=1.0, seed=seed).step(lambda twin=twin: loss(twin))
        estimates.append(before - flat(twin))
    stacked = torch.stack(estimates)
    error = (stacked.mean(0) - gradient).abs() / (stacked.std(0) / math.sqrt(samples))
    assert float(error.max()) < 5


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_no_graph_is_ever_built(name: str) -> None:
    model, loss = problem()
    seen = []

    def closure() -> torch.Tensor:
        value = loss()
        seen.append(value.requires_grad or value.grad_fn is not None)
        return value

    optimizer = create_optimizer(name, model, lr=1e-3, queries=2)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: pytest.fail("a tensor was saved for backward"), lambda t: t
    ):
        optimizer.step(closure)
    assert seen and not any(seen)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", PAPER)
def test_each_optimizer_lowers_the_loss(name: str) -> None:
    model, loss = problem()
    optimizer = create_optimizer(name, model, lr=0.01 if "adam" in name or "sign" in name else 0.1, queries=4)
    start = float(loss().detach())
    for _ in range(100):
        optimizer.step(loss)
    assert float(loss().detach()) < start - 0.1


def test_conserve_keeps_the_best_and_forgets_rejected_moments() -> None:
    model, loss = problem()
    optimizer = create_optimizer("zo-adam-conserve", model, lr=5.0)  # steps far too large: most make it worse
    last = float(loss().detach())
    rejected = 0
    for _ in range(30):
        before, moments = flat(model), copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.step(loss)
        now = float(loss().detach())
        assert now <= last
        if torch.equal(flat(model), before):
            rejected += 1
            after = optimizer.state_dict()["state"]
            assert after.keys() == moments.keys()
            for key, state in moments.items():
                for name, value in state.items():
                    assert torch.equal(after[key][name], value)
        last = now
    assert rejected > 5


def test_any_rule_of_timm_is_a_third_step() -> None:
    from timm.optim import create_optimizer_v2

    from zeroflow.optim import OptimizerInfo, ThreeStepOptimizer
    from zeroflow.optim.estimators import SPSA

    def run(steps: int, resume_at: int | None = None) -> torch.Tensor:
        def build():
            model, loss = problem()
            info = OptimizerInfo(
                "zo-lookahead",
                "",
                SPSA(),
                lambda groups, lr: create_optimizer_v2(groups, "lookahead_lion", lr=lr),
                {},
                0.0,
            )
            return model, loss, ThreeStepOptimizer(model, info.compose(1e-3, {}), queries=2)

        model, loss, optimizer = build()
        for step in range(steps):
            if step == resume_at:
                state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model, loss, optimizer = build()
                model.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
            optimizer.step(loss)
        return flat(model)

    assert torch.equal(run(12), run(12, resume_at=8))


def test_forward_mode_refuses_a_loss_without_derivative() -> None:
    model, loss = problem()
    with pytest.raises(TypeError, match="no derivative"):
        create_optimizer("forward-grad", model, lr=0.01).step(lambda: loss().detach())


def test_per_example_losses_beside_hybrid_and_odd_batches() -> None:
    """Batches of 20, 1 and 7, with the exact gradient first."""
    model, _ = problem()
    optimizer = create_optimizer("zo-per-example", model, lr=0.01, hybrid=1, hybrid_lr=0.1)
    torch.manual_seed(1)
    for size in (20, 20, 1, 7, 20):
        x, y = torch.randn(size, 6), torch.randint(3, (size,))
        before = flat(model)
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
        assert not torch.equal(flat(model), before)


def test_normalized_slopes_leave_out_what_is_not_finite_and_do_not_know_the_scale_of_the_loss() -> None:
    """Of a single example the sign is left; an example without a finite loss counts neither in the mean nor in the spread."""

    def moved(scale: float, broken: bool = False, size: int = 8) -> torch.Tensor:
        model, _ = problem()
        torch.manual_seed(1)
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        optimizer = create_optimizer("zo-per-example", model, lr=1.0, normalize=True)
        before = flat(model)

        def losses() -> torch.Tensor:
            found = scale * F.cross_entropy(model(x[:size]), y[:size], reduction="none")
            return torch.where(torch.arange(size) == 2, math.nan, found) if broken else found

        optimizer.step(losses)
        return before - flat(model)

    torch.testing.assert_close(moved(1.0), moved(1000.0), rtol=1e-2, atol=1e-2)
    found = moved(1.0, broken=True)
    assert found.isfinite().all() and found.any()
    assert set(moved(1.0, size=1).abs().round(decimals=4).tolist()) == {1.0}
    still = moved(0.0)
    assert not still.any()


@pytest.mark.parametrize(("name", "estimator"), [("my-rmsprop", Backpropagation()), ("fo-mine", SPSA())])
def test_a_name_says_whether_gradients_are_exact(name: str, estimator: Estimator) -> None:
    """Reports tell their readers by it what was trained by forward passes alone."""
    with pytest.raises(
        ConfigError, match="the name of one with exact gradients begins with 'fo-', that of any other does not"
    ):
        register_optimizer(OptimizerInfo(name, "made by a test", estimator, torch.optim.RMSprop, {}, 0.1))
    assert name not in list_optimizers()
