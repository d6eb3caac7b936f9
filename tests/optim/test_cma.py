"""CMA-ES as a named optimizer: the package's own results, step by step, and what a user of the others relies on."""

from __future__ import annotations

import copy
import math
import sys

import cmaes
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from zeroflow.errors import ConfigError
from zeroflow.optim import NonFiniteLoss, create_optimizer


def sphere(x: Tensor) -> Tensor:
    return x.square().sum()


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


def parameter(size: int = 10, value: float = 2.0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.full((size,), value, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize(
    ("function", "start", "steps", "reached"), [(sphere, 2.0, 300, 1e-12), (rosenbrock, 0.0, 600, 1e-9)]
)
def test_it_is_the_package_driven_with_the_same_samples(function, start, steps, reached, separable) -> None:
    """The package is told the places where the closure was asked; its mean is where the parameters are."""
    theta, seen = parameter(value=start), []
    optimizer = create_optimizer("es-cma", [theta], lr=1.0, eps=0.5, seed=3, separable=separable)
    kind = cmaes.SepCMA if separable else cmaes.CMA
    package = kind(mean=theta.detach().numpy().copy(), sigma=0.5)
    assert optimizer.queries == package.population_size == 4 + math.floor(3 * math.log(10))

    def closure() -> Tensor:
        loss = function(theta)
        seen.append((theta.detach().numpy().copy(), float(loss)))
        return loss

    for _ in range(steps):
        seen.clear()
        optimizer.step(closure)
        package.tell(list(seen))
        np.testing.assert_allclose(theta.detach().numpy(), package.mean, rtol=0, atol=1e-10)
    assert optimizer.forwards == steps * optimizer.queries
    if not (separable and function is rosenbrock):  # a curved valley is what a diagonal cannot follow
        assert float(function(theta.detach())) < reached


@pytest.mark.slow
def test_its_samples_have_the_covariance_that_it_has_learnt() -> None:
    """Where the loss is 10^4 times steeper along one axis of a turned ellipse, places spread less along it."""
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    theta, places = parameter(6), []
    scales = torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64)

    def closure() -> Tensor:
        places.append((turn @ theta).detach().clone())
        return ((turn @ theta) * scales).square().sum()

    optimizer = create_optimizer("es-cma", [theta], lr=1.0, seed=1)
    for _ in range(150):
        places.clear()
        before = (turn @ theta).detach().clone()
        optimizer.step(closure)
    optimizer.queries = 2000
    places.clear()
    before = (turn @ theta).detach().clone()
    optimizer.step(closure)
    spread = (torch.stack(places) - before).std(0)
    assert float(spread[1:].mean() / spread[0]) == pytest.approx(100, rel=0.6)
    kept = optimizer._adapted
    assert kept["generation"] == 151 and kept["C"].shape == (6, 6)


def test_losses_that_are_not_finite_are_the_worst() -> None:
    ends = []
    for bad in (math.nan, math.inf, -math.inf, 1e300):
        theta, calls = parameter(), []

        def closure(theta=theta, bad=bad, calls=calls) -> float:
            calls.append(1)
            return bad if len(calls) % 3 == 0 else float(sphere(theta.detach()))

        optimizer = create_optimizer("es-cma", [theta], lr=1.0)
        for _ in range(5):
            optimizer.step(closure)
        ends.append(theta.detach().clone())
    assert all(torch.equal(end, ends[0]) for end in ends)
    optimizer = create_optimizer("es-cma", [theta], lr=1.0, max_skipped=1)
    before, state = theta.detach().clone(), copy.deepcopy(optimizer._adapted)
    assert math.isnan(float(optimizer.step(lambda: math.nan)))
    assert torch.equal(theta, before) and optimizer._adapted == state
    with pytest.raises(NonFiniteLoss):
        optimizer.step(lambda: math.nan)


@pytest.mark.parametrize("separable", [False, True])
def test_an_error_in_a_step_leaves_the_distribution_as_it_was(separable: bool) -> None:
    """Also one that comes after the population, when the step settles what batch norm has seen."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer, calls = create_optimizer("es-cma", model, lr=1.0, queries=6, separable=separable), []
    x = torch.randn(8, 3)

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 6 + 1 + 7:
            raise KeyError("gone")
        return model(x).square().mean()

    optimizer.step(closure)
    before = copy.deepcopy((model.state_dict(), optimizer._adapted))
    with pytest.raises(KeyError):
        optimizer.step(closure)
    after = model.state_dict(), optimizer._adapted
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old if old[k] is not None)


def test_bits_do_not_depend_on_the_threads_of_blas() -> None:
    ends = []
    for threads in (1, 2):
        theta = parameter(300)
        with threadpool_limits(threads):
            optimizer = create_optimizer("es-cma", [theta], lr=1.0)
            for _ in range(4):
                optimizer.step(
                    lambda theta=theta: sum((theta.detach() * (1 + torch.arange(300) % 7)).square().tolist())
                )
        ends.append(theta.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.slow
def test_too_many_parameters_for_a_matrix_are_refused_and_a_diagonal_takes_them() -> None:
    theta = parameter(3000, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"es-cma: 3,000 trained components .* at most 2,560.*separable=True"):
        create_optimizer("es-cma", [theta], lr=1.0)
    create_optimizer("es-cma", [theta], lr=1.0, sparsity=0.5)
    optimizer, start = create_optimizer("es-cma", [theta], lr=1.0, separable=True), float(sphere(theta.detach()))
    for _ in range(200):
        optimizer.step(lambda: sphere(theta))
    assert float(sphere(theta.detach())) < 0.9 * start
    kept = sum(tensor.numel() * tensor.element_size() for tensor in optimizer.held())
    assert kept == 3000 * (4 + 3 * 8), "the parameters in float32, a diagonal and two paths in float64"


def test_a_population_needs_two() -> None:
    with pytest.raises(ConfigError, match="queries=1 for optimizer 'es-cma': expected an integer from 2 to 1,000,000"):
        create_optimizer("es-cma", [parameter()], lr=1.0, queries=1)
    theta = parameter()
    for queries in (2, 3, 4):
        optimizer = create_optimizer("es-cma", [theta], lr=1.0, queries=queries)
        with np.errstate(all="raise"):
            optimizer.step(lambda: sphere(theta))
    assert torch.isfinite(theta).all()


@pytest.mark.parametrize("package", ["cmaes", "threadpoolctl"])
def test_without_the_package_it_says_what_to_install_and_others_work(package: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs the Python package {package}: pip install"):
        create_optimizer("es-cma", [parameter()], lr=1.0)
    create_optimizer("zo-sgd", [parameter()], lr=1.0)


def test_groups_may_search_in_their_own_widths_and_lr_shortens_the_means_step_alone() -> None:
    ends = {}
    for lr in (1.0, 0.25):
        narrow, wide, places = parameter(5), parameter(5), []

        def closure(narrow=narrow, wide=wide, places=places) -> Tensor:
            places.append(torch.stack([narrow.detach() - 2, wide.detach() - 2]))
            return sphere(narrow) + sphere(wide)

        groups = [{"params": [narrow], "eps": 0.01}, {"params": [wide], "eps": 1.0}]
        optimizer = create_optimizer("es-cma", groups, lr=lr, queries=400)
        optimizer.step(closure)
        spread = torch.stack(places).std((0, 2))
        assert float(spread[0]) == pytest.approx(0.01, rel=0.1) and float(spread[1]) == pytest.approx(1.0, rel=0.1)
        ends[lr] = torch.cat([narrow, wide]).detach() - 2, optimizer._adapted
    torch.testing.assert_close(0.25 * ends[1.0][0], ends[0.25][0])
    assert torch.equal(ends[1.0][1]["C"], ends[0.25][1]["C"])


def test_the_distribution_starts_anew_when_other_components_move() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = create_optimizer("es-cma", model, lr=1.0, queries=6)
    x = torch.randn(8, 3)
    generations = []
    for frozen in (None, 0, 0, 1, None):
        for number in (0, 1):
            model[number].requires_grad_(number != frozen)
        still = copy.deepcopy(model[frozen].state_dict()) if frozen is not None else {}
        optimizer.step(lambda: model(x).square().mean())
        assert all(torch.equal(value, model[frozen].state_dict()[key]) for key, value in still.items())
        generations.append(optimizer._adapted["generation"])
    assert generations == [1, 1, 2, 1, 1]
