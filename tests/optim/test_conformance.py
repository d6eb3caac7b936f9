"""The conformance suite: every optimizer here passes it; what the named ones promise beyond it."""

from __future__ import annotations

import copy
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT
from references import EXAMPLES, reference, signs
from torch import nn

from zeroflow.optim import Slice, create_optimizer, list_optimizers
from zeroflow.optim.testing import CHECKS, Subject, checks, subject
from zeroflow.optim.testing.problems import Quadratic, regression, theta

DOCUMENT = ROOT / "docs" / "conformance.md"


def referred(name: str, **options: Any) -> Subject:
    """A named optimizer as a subject, with its reference."""
    per_example = options.pop("per_example", False)
    return subject(name, **options, per_example=per_example, reference=reference(name, **options))


SUBJECTS = [
    *(referred(name) for name in list_optimizers()),
    referred("zo-per-example", per_example=True, queries=2), referred("zo-sgd", queries=3),
    referred("zo-svrg", queries=2, snapshot_every=3), referred("es-cma", lr=1.0, separable=True),
    referred("zo-sgd", queries=3, combine="span"),
    referred("zo-per-example", per_example=True, queries=2, normalize=True),
    # The three enhancements.
    referred("zo-sgd", history=0.6), referred("zo-sgd", sparsity=0.5), referred("zo-adam", hybrid=3),
    referred("zo-adam", history=0.6, history_of="directions", queries=2),
]  # fmt: skip
"""All checks are made of these."""

MORE_QUERIES = [
    referred(name, queries=3) for name in list_optimizers("zo-*") if name not in ("zo-cars", "zo-fzoo", "zo-sgd")
]
"""Of these, whether steps are right."""

VARIANTS = [
    # Rules with memory, other distributions, the other sign.
    referred("zo-sgd", momentum=0.9, nesterov=True, weight_decay=0.1, distribution="rademacher"),
    referred("zo-rge", queries=4, distribution="sphere"),
    referred("forward-grad", queries=2, distribution="rademacher"),
    referred("zo-sgd-sign", sign="scalar", queries=3), referred("zo-adam", betas=(0.8, 0.9), weight_decay=0.1),
    referred("zo-sgd-conserve", momentum=0.9, lr=0.1), referred("zo-adam-conserve", lr=0.5, queries=2),
    referred("zo-adamm", betas=(0.5, 0.5), weight_decay=0.1), referred("zo-radazo", betas=(0.5, 0.9)),
    # All coordinates: a finite-difference gradient.
    replace(referred("zo-cge", queries=5000), unbiased=True), referred("zo-scd", queries=5000),
    # The span of the directions.
    referred("zo-rge", queries=4, combine="span", distribution="sphere"), referred("zo-adam", queries=50, combine="span"),
    referred("forward-grad", queries=4, combine="span", distribution="rademacher", sparsity=0.5),
    referred("zo-svrg", queries=3, combine="span"),
    # A subspace of low rank that changes.
    *(referred("zo-muon", rank=2, resample_every=5, **options) for options in ({}, {"sparsity": 0.5, "history": 0.4})),
    referred("zo-muon", rank=1, queries=3, combine="span", momentum=0.9),
    # A population: the published step, another size, components held still.
    referred("es-cma", lr=1.0), referred("es-cma", lr=1.0, queries=7, eps=0.5),
    *(referred("es-cma", lr=1.0, sparsity=0.5, separable=separable) for separable in (False, True)),
    # History, sparsity, hybrid.
    referred("zo-adam-sign", history=0.8, queries=2),
    referred("zo-sgd-sign", history=0.4, sign="scalar"), referred("zo-svrg", history=0.5, snapshot_every=3),
    *(referred(name, history=0.7, history_of="directions", queries=3) for name in ("zo-sgd", "zo-sgd-sign", "forward-grad")),
    referred("zo-sgd-sign", sign="scalar", history=0.7, history_of="directions", queries=2, sparsity=0.5),
    referred("zo-rge", history=0.5, history_of="directions", queries=2, distribution="sphere"),
    referred("zo-sgd-conserve", history=0.5, history_of="directions", hybrid=2, lr=0.5),
    *(referred("zo-sgd", sparsity=s) for s in (0.1, 0.9)),
    referred("zo-sgd", sparsity=0.3, momentum=0.9, weight_decay=0.5),
    referred("zo-adam", sparsity=0.5, weight_decay=0.5),
    referred("zo-sgd-sign", sparsity=0.5), referred("zo-adam-conserve", sparsity=0.5, lr=1e-3, queries=4),
    referred("zo-svrg", sparsity=0.5, queries=2), referred("zo-rge", sparsity=0.5, distribution="sphere"),
    referred("zo-scd", sparsity=0.5, queries=5000), referred("zo-cge", sparsity=0.5, queries=5000),
    referred("zo-fzoo", sparsity=0.5), referred("forward-grad", sparsity=0.5), referred("zo-cars", sparsity=0.2),
    referred("fo-adam", sparsity=0.5, weight_decay=0.5), referred("zo-per-example", sparsity=0.5, per_example=True),
    referred("zo-sgd", hybrid=3, momentum=0.9), referred("zo-adam", hybrid=3, hybrid_lr=0.2),
    referred("zo-adam-conserve", hybrid=2, sparsity=0.5), referred("zo-svrg", hybrid=3, snapshot_every=2, history=0.5),
]  # fmt: skip
"""Of these, the checks of formulas."""

STEPS = [
    checks.check_update_lies_along_perturbations, checks.check_trajectory_follows_the_formula,
    checks.check_snapshot_is_a_copy_and_both_estimates_share_directions,
]  # fmt: skip
FORMULAS = [
    *STEPS, checks.check_estimate_is_unbiased, checks.check_mask_holds_the_same_components_still_everywhere,
    checks.check_keeps_the_best_and_forgets_rejected_moments,
]  # fmt: skip


def labelled(one: Subject) -> str:
    return f"{one.name} q={one.queries}".replace(" ", ",")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "check"),
    [
        pytest.param(one, check, id=f"{labelled(one)}-{check.__name__.removeprefix('check_')}")
        for ones, wanted in ((SUBJECTS, CHECKS), (VARIANTS, FORMULAS), (MORE_QUERIES, STEPS))
        for one in ones
        for check in wanted
        if CHECKS[check](one)
    ],
)
@pytest.mark.filterwarnings("ignore:zo-per-example")
def test_conforms(one: Subject, check: Callable[[Subject], None]) -> None:
    check(one)


# What the named optimizers promise beyond the suite.


def test_svrg_follows_its_formula_with_mini_batches_and_full_closures() -> None:
    """Mini-batches are quadratics of their own; the full loss at a snapshot is the mean over four of them."""
    parts = [Quadratic(seed) for seed in range(4)]
    model = parts[0]
    for part in parts[1:]:
        part.bias, part.weight = model.bias, model.weight
    start = theta(model).numpy()
    optimizer = create_optimizer("zo-svrg", model, lr=0.02, queries=2, seed=5, snapshot_every=3)
    for step in range(8):
        optimizer.step(parts[step % 4], full=parts)
    follow = reference(
        "zo-svrg",
        lr=0.02,
        queries=2,
        snapshot_every=3,
        batch=lambda t: parts[t % 4].value,
        full=lambda x: float(np.mean([part.value(x) for part in parts])),
    )
    np.testing.assert_allclose(theta(model).numpy(), follow(None, None, start, 5, 8), rtol=0, atol=1e-8)


def test_svrgs_full_loss_is_the_mean_over_all_examples_whatever_the_mini_batches() -> None:
    """Of a linear loss the slopes are known: directions times the mean of all data, not of two unequal means."""
    data = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data[48:] += 10

    def slopes(*cuts: int) -> dict[int, float]:
        weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = create_optimizer("zo-svrg", [weight], lr=1.0, queries=3)
        parts = [
            Slice(lambda a=a, b=b: (data[a:b] @ weight).mean(), 0, b - a, b - a) for a, b in itertools.pairwise(cuts)
        ]
        optimizer.step(parts[0], parts)
        return optimizer._memory["full_slopes"]  # of theta = 0, where the step began

    whole = slopes(0, 50)
    assert slopes(0, 48, 50) == pytest.approx(whole, abs=1e-12) and slopes(0, 1, 2, 50) == pytest.approx(
        whole, abs=1e-12
    )


def test_svrg_takes_a_snapshot_anew_for_a_layer_that_thaws() -> None:
    """At a snapshot the estimate is that of zo-sgd; along directions that left the layer out it would be none of its gradient."""
    found = []
    for name in ("zo-svrg", "zo-sgd"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        x = torch.randn(8, 4, dtype=torch.float64)
        optimizer = create_optimizer(name, model, lr=0.1, queries=4, seed=3)
        for frozen in (True, False):
            model[0].requires_grad_(not frozen)
            optimizer.step(lambda model=model, x=x: model(x).square().mean())
        found.append((optimizer.flat.vector.clone(), optimizer.forwards))
    (svrg, made), (plain, _) = found
    torch.testing.assert_close(svrg, plain, rtol=0, atol=1e-11)
    assert made == 2 * 3 * 8


def test_svrg_tells_any_set_of_trained_components_from_another() -> None:
    """Also sets that have as many positions, the same sum of them and of their squares."""
    blocks = [nn.Parameter(torch.zeros(3)) for _ in range(8)]
    optimizer = create_optimizer("zo-svrg", blocks, lr=0.1, queries=2)
    passes = []
    for trained in ({0, 3, 5, 6}, {0, 3, 5, 6}, {1, 2, 4, 7}):
        for number, block in enumerate(blocks):
            block.requires_grad_(number in trained)
        before = optimizer.forwards
        optimizer.step(lambda: sum(block.sum() for block in blocks))
        passes.append(optimizer.forwards - before)
    assert passes == [12, 8, 12]


def test_svrg_takes_no_snapshot_of_a_loss_that_is_not_finite() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = create_optimizer("zo-svrg", [weight], lr=0.01, queries=2, seed=1)
    plain = nn.Parameter(torch.ones(3))
    spsa = create_optimizer("zo-sgd", [plain], lr=0.01, queries=2, seed=1)
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"zo-svrg: no direction of step \d has a finite loss on all of the training data"
        ):
            optimizer.step(lambda: weight.square().sum(), [lambda: weight.sum(), lambda: math.nan])
        spsa.step(lambda: plain.square().sum())
    assert torch.equal(weight, plain), "the estimate without a correction"
    with pytest.raises(TypeError, match="step: full=generator: expected a list of closures"):
        optimizer.step(lambda: weight.square().sum(), (f for f in [lambda: weight.sum()]))  # type: ignore[arg-type]


def linear_problem(examples: int) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, *(torch.randn(examples, width, generator=generator, dtype=torch.float64) for width in (4, 3))


def test_a_layer_called_by_keywords_has_directions_for_each_example_too() -> None:
    """Its weights are the second positional argument of torch's function only where people write it so."""

    def losses(call: Callable[..., torch.Tensor], model: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (call(x, model) - y).square().mean(1)

    found = []
    for call in (
        lambda x, m: nn.functional.linear(x, m.weight, m.bias),
        lambda x, m: nn.functional.linear(x, bias=m.bias, weight=m.weight),
        lambda x, m: nn.functional.linear(input=x, weight=m.weight, bias=m.bias),
    ):
        model, x, y = linear_problem(8)
        optimizer = create_optimizer("zo-per-example", model, lr=0.1, queries=2)
        optimizer.step(partial(losses, call, model, x, y))
        found.append(theta(model))
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_per_example_directions_follow_their_formula_example_by_example(queries: int, normalize: bool) -> None:
    """z_n = Z * (r_n s_n^T) for the weight, Z * signs for the bias; the step is the mean of g_n z_n, by brute force.

    With ``normalize`` of g_n over the standard deviation of g_1 ... g_N.
    """
    n, lr, eps, seed = 6, 0.1, 1e-3, 9
    model, x, y = linear_problem(n)
    weight, bias = (p.detach().numpy().copy() for p in (model.weight, model.bias))
    optimizer = create_optimizer(
        "zo-per-example", model, lr=lr, eps=eps, seed=seed, queries=queries, normalize=normalize
    )
    assert optimizer.per_example
    for step in range(4):
        optimizer.step(lambda: (model(x) - y).square().sum(1))
        change_w, change_b = np.zeros_like(weight), np.zeros_like(bias)
        for query in range(queries):
            base = signs(seed, step, query, 15)  # in the order of names: bias, then weight
            base_b, base_w = base[:3], base[3:].reshape(3, 4)
            own = signs(seed, step, query, n * (3 + 3 + 4), EXAMPLES).reshape(n, 10)  # of each: bias, rows, columns
            slopes, places = [], []
            for i in range(n):
                z_b, z_w = base_b * own[i, :3], base_w * np.outer(own[i, 3:6], own[i, 6:])

                sides = []
                for side in (eps, -eps):
                    output = (weight + side * z_w) @ x[i].numpy() + bias + side * z_b
                    sides.append(np.sum((output - y[i].numpy()) ** 2))
                slopes.append((sides[0] - sides[1]) / (2 * eps))
                places.append((z_w, z_b))
            spread = np.std(slopes) if normalize else 1.0
            for g, (z_w, z_b) in zip(slopes, places, strict=True):
                change_w += g / spread * z_w / (n * queries)
                change_b += g / spread * z_b / (n * queries)
        weight, bias = weight - lr * change_w, bias - lr * change_b
        np.testing.assert_allclose(model.weight.detach().numpy(), weight, rtol=0, atol=1e-8)
        np.testing.assert_allclose(model.bias.detach().numpy(), bias, rtol=0, atol=1e-8)


@pytest.mark.parametrize("sizes", [(6, 3, 6), (6, 1, 6), (1, 6)], ids=str)
def test_per_example_directions_take_mini_batches_of_any_size(sizes: tuple[int, ...]) -> None:
    """The last mini-batch of an epoch is smaller, at times a single example."""
    model, x, y = linear_problem(6)
    optimizer = create_optimizer("zo-per-example", model, lr=0.05)
    for size in sizes:
        before = theta(model)
        optimizer.step(lambda size=size: (model(x[:size]) - y[:size]).square().sum(1))
        assert not torch.equal(theta(model), before)


@pytest.mark.slow
def test_a_thousand_steps_of_length_zero_leave_every_bit() -> None:
    checks.check_parameters_are_restored_exactly(subject("zo-sgd", weight_decay=0.1, momentum=0.9), steps=1000)


def test_half_precision_parameters_are_restored_exactly() -> None:
    model, loss = regression(dtype=torch.bfloat16)
    optimizer, before = create_optimizer("zo-sgd", model, lr=0.0, eps=0.05, queries=2), theta(model)
    for _ in range(100):
        optimizer.step(loss)
    assert torch.equal(theta(model), before)


@pytest.mark.parametrize("name", ["zo-sgd", "zo-cge", "zo-adam-conserve"])
def test_a_saved_run_goes_on_in_an_optimizer_built_with_another_seed(name: str) -> None:
    """The seed is part of the state, and with it everything that is made of the seed: directions and the mask."""
    model, loss = regression()
    optimizer = create_optimizer(name, model, lr=0.01, seed=1, sparsity=0.5, queries=2)
    for _ in range(3):
        optimizer.step(loss)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in range(3):
        optimizer.step(loss)
    whole = theta(model)

    model, loss = regression()
    optimizer = create_optimizer(name, model, lr=0.01, seed=2, sparsity=0.5, queries=2)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for _ in range(3):
        optimizer.step(loss)
    assert torch.equal(theta(model), whole)


def test_batch_norm_is_trained_with_its_network() -> None:
    model, loss = regression(nn.BatchNorm1d(5))
    optimizer = create_optimizer("zo-sgd", model, lr=0.05, queries=4)
    start = float(loss().detach())
    for _ in range(50):
        optimizer.step(loss)
    assert float(loss().detach()) < 0.8 * start


@pytest.mark.slow
def test_the_example_in_the_document_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 40
    run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert (
        "FAILED check_parameters_are_restored_exactly" in run.stdout
        and "ok     check_estimate_is_unbiased" in run.stdout
    )
