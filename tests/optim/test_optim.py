"""Optimizers against independent references, and what a user of ``torch.optim`` relies on."""

from __future__ import annotations

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zeroflow.errors import ConfigError
from zeroflow.optim import Journal, NonFiniteLoss, OptimizerInfo, create_optimizer, list_optimizers, register_optimizer
from zeroflow.optim.estimators import SPSA, Backpropagation, Estimator

PAPER = [
    "fo-adam", "fo-sgd", "forward-grad", "zo-adam", "zo-adam-conserve", "zo-adam-sign", "zo-sgd", "zo-sgd-conserve",
    "zo-sgd-sign",
]  # fmt: skip
FORWARD_ONLY = [name for name in PAPER if not name.startswith("fo-")]


def problem(dtype: torch.dtype = torch.float32, dropout: float = 0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3)).to(dtype)
    x, y = torch.randn(40, 6, dtype=dtype), torch.randint(3, (40,))

    def loss(other: nn.Module | None = None) -> torch.Tensor:
        return F.cross_entropy((other or model)(x), y)

    return model, loss


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())])


def reference_directions(seed: int, step: int, queries: int, size: int) -> np.ndarray:
    """The documented noise scheme, written with NumPy alone."""
    return np.stack(
        [
            np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, query, step])).standard_normal(size)
            for query in range(queries)
        ]
    )


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


@pytest.mark.parametrize("name", PAPER)
def test_state_dict_resumes_bit_for_bit(name: str) -> None:
    def build():
        model, loss = problem(dropout=0.3)
        optimizer = create_optimizer(name, model, lr=0.01, queries=2, seed=4)
        return model, loss, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

    model, loss, optimizer, scheduler = build()
    for step in range(10):
        if step == 5:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
        optimizer.step(loss)
        scheduler.step()
    finished = flat(model)

    model, loss, optimizer, scheduler = build()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    for _ in range(5):
        optimizer.step(loss)
        scheduler.step()
    assert torch.equal(flat(model), finished)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "raise"])
def test_parameters_are_restored_exactly_when_an_evaluation_goes_wrong(bad: float | str) -> None:
    model, loss = problem()
    before, calls = flat(model), []

    def closure() -> torch.Tensor | float:
        calls.append(1)
        if len(calls) < 2:
            return loss()
        if bad == "raise":
            raise KeyError("simulator failed")
        return float(bad)

    optimizer = create_optimizer("zo-sgd", model, lr=0.1, max_skipped=0)
    with pytest.raises(KeyError if bad == "raise" else NonFiniteLoss):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)


def test_queries_without_a_finite_loss_are_left_out() -> None:
    """With query 1 of 3 spoilt, the step is that of queries 0 and 2."""
    model, loss = problem(torch.float64)
    before, calls = flat(model).numpy().copy(), []

    def closure() -> torch.Tensor | float:
        calls.append(1)
        return math.nan if len(calls) == 4 else loss()

    create_optimizer("zo-sgd", model, lr=0.1, queries=3, seed=1).step(closure)
    moved = flat(model).numpy() - before
    z = reference_directions(1, 0, 3, len(before))
    # The step lies in the span of z_0 and z_2 alone.
    basis = np.linalg.qr(z[[0, 2]].T)[0]
    np.testing.assert_allclose(basis @ (basis.T @ moved), moved, atol=1e-12)
    assert np.linalg.norm(moved) > 0


def test_steps_without_any_finite_loss_change_nothing_and_end_after_so_many_in_a_row() -> None:
    model, loss = problem()
    optimizer = create_optimizer("zo-adam", model, lr=0.1, max_skipped=3)
    optimizer.step(loss)
    before, moments = flat(model), copy.deepcopy(optimizer.state_dict()["state"])
    bad = [math.nan, math.inf, math.nan, math.nan]
    for value in bad[:3]:
        assert math.isnan(float(optimizer.step(lambda value=value: value)))
    optimizer.step(loss)  # one good step, and the count starts again
    after = flat(model)
    for value in bad[:3]:
        optimizer.step(lambda value=value: value)
    assert torch.equal(flat(model), after) and not torch.equal(after, before)
    assert moments.keys() == optimizer.state_dict()["state"].keys()
    with pytest.raises(NonFiniteLoss, match=r"4 steps in a row.*Lower lr"):
        optimizer.step(lambda: math.nan)


@pytest.mark.parametrize("name", ["zo-sgd", "forward-grad"])
def test_all_evaluations_of_a_step_see_the_same_dropout_mask(name: str) -> None:
    """With eps far below rounding, all evaluations are at the same point: any difference would be another mask."""
    model, loss = problem(dropout=0.5)
    values: list[float] = []

    def closure() -> torch.Tensor:
        value = loss()
        values.append(float(value.detach()))
        return value

    optimizer = create_optimizer(name, model, lr=1e-12, eps=1e-12, queries=3)
    torch.manual_seed(1)
    following = torch.rand(1)
    torch.manual_seed(1)
    optimizer.step(closure)
    assert len(values) > 1 and len(set(values)) == 1
    assert torch.equal(torch.rand(1), following), "the caller's own random numbers moved"
    optimizer.step(closure)
    assert values[-1] != values[0], "another step must have another mask"


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


def test_the_order_of_named_parameters_does_not_matter() -> None:
    results = []
    for turned in (False, True):
        model, loss = problem()
        named = list(model.named_parameters())
        optimizer = create_optimizer("zo-sgd", named[::-1] if turned else named, lr=0.1, seed=2)
        for _ in range(3):
            optimizer.step(loss)
        results.append(flat(model))
    assert torch.equal(*results)


def test_groups_have_their_own_lr_and_eps() -> None:
    model, loss = problem()
    still = model[0].weight.detach().clone()
    groups = [
        {"params": [model[0].weight], "lr": 0.0},
        {"params": [model[0].bias, model[3].weight, model[3].bias], "eps_zo": 1e-2},
    ]
    optimizer = create_optimizer("zo-sgd", groups, lr=0.1)
    before = model[3].weight.detach().clone()
    optimizer.step(loss)
    assert torch.equal(model[0].weight, still)
    assert not torch.equal(model[3].weight, before)


def test_groups_may_be_generators_and_are_left_alone() -> None:
    model, loss = problem()
    group = {"params": model[0].parameters(), "lr": 0.1}
    optimizer = create_optimizer("zo-sgd", [group, {"params": model[3].weight}], lr=0.1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 1]
    assert set(group) == {"params", "lr"}
    before = model[3].weight.detach().clone()
    optimizer.step(loss)
    assert not torch.equal(model[3].weight, before)


def test_a_module_that_moves_to_new_storage_is_still_trained() -> None:
    model, loss = problem()
    optimizer = create_optimizer("zo-sgd", model, lr=0.1, queries=4)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    start = float(loss().detach())
    for _ in range(50):
        optimizer.step(loss)
    assert float(loss().detach()) < start


def test_a_loss_that_is_a_plain_number_from_outside_torch_is_fine() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = create_optimizer("zo-sgd", [parameter], lr=0.05, queries=4)
    for _ in range(200):
        optimizer.step(lambda: float(np.sum((parameter.detach().numpy() - 1.0) ** 2)))
    np.testing.assert_allclose(parameter.detach().numpy(), 1.0, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "zo-sdg"}, "zo-sgd"),
        ({"queries": 0}, "queries=0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentun": 0.9}, "momentum"),
        ({"momentum": -1.0}, "momentum"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings_are_refused_by_name(change: dict, message: str) -> None:
    settings = {"name": "zo-sgd", "lr": 0.1, **change}
    with pytest.raises(ConfigError, match=message):
        create_optimizer(settings.pop("name"), nn.Linear(2, 2), **settings)


def test_parameters_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        create_optimizer("zo-sgd", [], lr=0.1)
    with pytest.raises(ValueError, match="frozen"):
        create_optimizer("zo-sgd", nn.Linear(2, 2).requires_grad_(False).parameters(), lr=0.1)
    with pytest.raises(TypeError, match="floating"):
        create_optimizer("zo-sgd", [torch.zeros(2, dtype=torch.long)], lr=0.1)
    with pytest.raises(ConfigError, match=r"eps=0.001 is too small .* bfloat16.*0.0078"):
        create_optimizer("zo-sgd", nn.Linear(2, 2).bfloat16(), lr=0.1)
    with pytest.raises(TypeError, match="scalar"):
        create_optimizer("zo-sgd", nn.Linear(2, 2), lr=0.1).step(lambda: torch.zeros(2))


class Normed(nn.Module):
    """A model with batch norm, and a constant buffer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.ones(3))
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x)))) * self.constant


@pytest.mark.parametrize("name", list_optimizers())
def test_a_model_with_batch_norm_trains_and_its_statistics_see_each_batch_once(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = Normed(), torch.randn(30, 6) + 1, torch.randint(3, (30,))
    twin = copy.deepcopy(model)
    optimizer = create_optimizer(name, model, lr=0.0 if name != "zo-cars" else 1e-30, queries=3)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    twin(x)
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    assert torch.equal(model.norm.running_var, twin.norm.running_var)
    assert int(model.norm.num_batches_tracked) == 1
    optimizer = create_optimizer(name, model, lr=0.5 if name == "zo-cars" else 0.01, queries=3)
    before = flat(model)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert not torch.equal(flat(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_steps_smaller_than_their_rounding_add_up_and_resume(dtype: torch.dtype) -> None:
    """1000 steps of 1e-5 on weights of 1, whose rounding is 1e-3 and more."""

    def build():
        parameter = nn.Parameter(torch.ones(8, dtype=dtype))
        return parameter, create_optimizer("fo-sgd", [parameter], lr=1e-5, momentum=0.5)

    parameter, optimizer = build()
    for step in range(1000):
        if step == 500:
            saved = copy.deepcopy((parameter.detach(), optimizer.state_dict()))
        optimizer.step(lambda: parameter.float().sum())
    assert abs(float(parameter.detach().double().mean()) - 0.98) < 0.004
    finished = optimizer.flat.vector.clone()
    parameter, optimizer = build()
    parameter.data.copy_(saved[0])
    optimizer.load_state_dict(saved[1])
    for _ in range(500):
        optimizer.step(lambda: parameter.float().sum())
    assert torch.equal(optimizer.flat.vector, finished)


def test_an_eps_that_autocast_would_swallow_is_refused_and_a_larger_one_is_not() -> None:
    model, loss = problem()

    def closure() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss()

    before = flat(model)
    with pytest.raises(ConfigError, match=r"eps=0.001 .* bfloat16.* 0.0078"):
        create_optimizer("zo-sgd", model, lr=0.1).step(closure)
    assert torch.equal(flat(model), before)
    create_optimizer("zo-sgd", model, lr=0.1, eps=1e-2).step(closure)
    create_optimizer("zo-sgd", model, lr=0.1, check_precision=False).step(closure)
    with pytest.raises(ConfigError, match="bfloat16"):
        create_optimizer("zo-sgd", model, lr=0.1).step(lambda: loss().bfloat16())


def test_a_model_made_half_precision_later_keeps_a_master_copy() -> None:
    model, _ = problem()
    optimizer = create_optimizer("fo-sgd", model, lr=1e-5)
    model.bfloat16()
    before = optimizer.flat.vector.clone()
    for _ in range(5):
        optimizer.step(lambda: sum(p.float().sum() for p in model.parameters()))
    torch.testing.assert_close(before.float() - optimizer.flat.vector, torch.full_like(before, 5e-5), rtol=0.1, atol=0)


@pytest.mark.parametrize("options", [{"history": 0.5}, {"sparsity": 0.5}, {}])
@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam", "zo-svrg", "es-cma"])
def test_a_group_may_be_added_in_the_middle(name: str, options: dict) -> None:
    model, loss = problem()
    optimizer = create_optimizer(name, model[0], lr=0.01, **options)
    optimizer.step(loss)
    mask = optimizer._mask.clone() if options.get("sparsity") else None
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.1})
    before = model[3].weight.detach().clone()
    for _ in range(3):
        optimizer.step(loss)
    assert not torch.equal(model[3].weight, before)
    if mask is not None:  # the components that were there keep their roles
        places = dict(optimizer.flat.slices())
        now = torch.cat([optimizer._mask[places[p]] for _, p in sorted(model[0].named_parameters())])
        assert torch.equal(now, mask)


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    model, loss = problem()
    optimizer = create_optimizer("zo-sgd", model, lr=0.01)
    with pytest.raises(ValueError, match="float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 1
    optimizer.step(loss)


@pytest.mark.parametrize("name", list_optimizers())
def test_parameters_frozen_later_and_parameters_out_of_use_stay(name: str) -> None:
    model, loss = problem()
    spare = nn.Parameter(torch.ones(5))
    options = {} if name in ("zo-cars", "es-cma") else {"weight_decay": 0.1}
    optimizer = create_optimizer(name, [*model.parameters(), spare], lr=0.01, **options)
    model[0].requires_grad_(False)
    frozen, other = model[0].weight.detach().clone(), model[3].weight.detach().clone()
    for _ in range(2):
        optimizer.step(loss)
    assert torch.equal(model[0].weight, frozen) and not torch.equal(model[3].weight, other)
    if name.startswith("fo-"):
        assert torch.equal(spare, torch.ones(5)), "as in torch, weight decay does not move what has no gradient"


@pytest.mark.parametrize("name", [name for name in list_optimizers() if name != "zo-per-example"])
def test_a_group_that_is_to_be_maximised_is_or_is_refused(name: str) -> None:
    p = nn.Parameter(torch.ones(4))

    def loss() -> torch.Tensor:
        return -(p**2).sum()

    try:
        optimizer = create_optimizer(name, [{"params": [p], "maximize": True}], lr=0.01, queries=4)
    except ValueError as error:
        assert re.search("maximize=True of a group: .*; negate the loss instead", str(error))
        with pytest.raises(ValueError, match="maximize=True"):
            optimizer = create_optimizer(name, [p], lr=0.01, queries=4)
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "maximize": True})
        return
    before = float(loss().detach())
    for _ in range(30):
        optimizer.step(loss)
    assert float(loss().detach()) > before


def test_parameters_that_share_memory_are_refused_and_parts_of_one_storage_are_not() -> None:
    """Each would train what they share, and the last one would win."""
    tied, whole = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)), torch.zeros(4, 6)
    tied[1].weight.data = tied[0].weight.data
    for params in (tied, [nn.Parameter(whole[:3]), nn.Parameter(whole[2:])]):
        for name in ("fo-sgd", "zo-sgd"):
            with pytest.raises(ValueError, match="shares memory with another one"):
                create_optimizer(name, params, lr=0.1)
    tied[1].weight = tied[0].weight
    create_optimizer("zo-sgd", tied, lr=0.1)
    left, right = nn.Parameter(whole[:, ::2]), nn.Parameter(whole[:, 1::2])
    create_optimizer("fo-sgd", [left, right], lr=1.0).step(lambda: left.sum() + 2 * right.sum())
    assert torch.equal(whole, torch.tensor([-1.0, -2.0] * 3).expand(4, 6))


@pytest.mark.parametrize("name", list_optimizers())
def test_a_parameter_without_values_beside_others_is_no_obstacle(name: str) -> None:
    empty, matrix = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2, 2))
    optimizer = create_optimizer(name, [empty, matrix], lr=0.01)
    losses = [float(optimizer.step(lambda: (matrix**2).sum() + empty.sum())) for _ in range(3)]
    assert all(map(math.isfinite, losses)) and not torch.equal(matrix, torch.ones(2, 2))


def test_all_seeds_are_different() -> None:
    moved = []
    for seed in (0, 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1):
        parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        create_optimizer("zo-sgd", [parameter], lr=1.0, seed=seed).step(lambda p=parameter: p.sum())
        moved.append(tuple(parameter.tolist()))
    assert len(set(moved)) == len(moved)


def test_a_model_can_be_saved_as_ever(tmp_path) -> None:
    import safetensors.torch

    model, loss = problem()
    optimizer = create_optimizer("zo-sgd", model, lr=0.1)
    optimizer.step(loss)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model[3].bias, tmp_path / "bias.pt")
    assert (tmp_path / "bias.pt").stat().st_size < 2500
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())


def test_values_loaded_into_the_model_are_what_the_next_step_starts_from() -> None:
    model, loss = problem()
    optimizer = create_optimizer("zo-sgd", model, lr=0.0)
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    optimizer.step(loss)
    assert all(not p.any() for p in model.parameters())


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


def test_a_group_may_have_its_own_eps() -> None:
    """The slope of x^3 by differences of size eps is 3 x^2 + eps^2: it tells which eps was used."""
    for name in ("zo-cge", "zo-scd"):
        one, two = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
        groups = [{"params": [one], "eps": 0.1}, {"params": [two], "eps": 0.2}]
        create_optimizer(name, groups, lr=1.0, queries=2).step(lambda one=one, two=two: (one**3 + two**3).sum())
        one_sided = name == "zo-cge"
        for parameter, eps in ((one, 0.1), (two, 0.2)):
            expected = 3 + eps**2 + (3 * eps if one_sided else 0)
            assert 1 - parameter.item() == pytest.approx(expected, abs=1e-9)


def test_a_copy_of_an_optimizer_and_its_model_goes_on_alone() -> None:
    model, loss = problem()
    optimizer = create_optimizer("zo-adam", model, lr=0.01)
    optimizer.step(loss)
    other_model, other = copy.deepcopy((model, optimizer))
    before = flat(model)
    other.step(lambda: loss(other_model))
    assert torch.equal(flat(model), before) and not torch.equal(flat(other_model), before)
    optimizer.step(loss)
    assert torch.equal(flat(model), flat(other_model))


def test_an_error_while_a_step_is_tried_leaves_no_trace() -> None:
    model, loss = problem()
    optimizer = create_optimizer("zo-adam-conserve", model, lr=0.01)
    optimizer.step(loss)
    before, moments, calls = flat(model), copy.deepcopy(optimizer.inner.state_dict()), []

    def closure() -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("out of quota")
        return loss()

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)
    after = optimizer.inner.state_dict()["state"]
    assert all(torch.equal(after[i][k], v) for i, state in moments["state"].items() for k, v in state.items())


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


def test_per_example_refuses_examples_that_meet() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(8, 6), torch.randint(3, (8,))
    with pytest.raises(TypeError, match="Examples interact"):
        create_optimizer("zo-per-example", model, lr=0.1).step(
            lambda: F.cross_entropy(model(x), y, reduction="none") + 10 * model(x).mean()
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zo-sgd", {"q": 3}, "queries"),
        ("zo-sgd", {"eps_zo": 1e-3}, "'eps'"),
        ("zo-sgd", {"weight_decay": "1e-4"}, "weight_decay='1e-4'.*a number"),
        ("zo-sgd", {"weight_decay": math.nan}, "weight_decay=nan"),
        ("zo-sgd", {"nesterov": "yes"}, "True or False"),
        ("zo-per-example", {"normalize": 1}, "normalize=1.*True or False"),
        ("zo-adam", {"betas": [0.9]}, "2 numbers"),
        ("zo-sgd", {"sparsity": 1.0}, "sparsity=1.0"),
        ("zo-sgd", {"sparsity": math.nan}, "sparsity=nan"),
        ("zo-sgd", {"history": -0.1}, "history=-0.1"),
        ("zo-sgd", {"hybrid_lr": 0.1}, "together with hybrid"),
        ("zo-rge", {"distribution": "normal"}, "'gaussian', 'rademacher' or 'sphere'"),
        ("zo-sgd-sign", {"sign": "vector"}, "elementwise"),
        ("zo-adam-sign", {"sign": "scalar", "combine": "span"}, "combine='span': .*'mean' with sign='scalar'"),
        (
            "zo-rge",
            {"history": 0.5, "history_of": "directions", "combine": "span"},
            "'mean' with history_of='directions'",
        ),
    ],
)
def test_bad_options_are_refused_by_name(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_optimizer(name, nn.Linear(2, 2), lr=0.1, **options)


def test_states_of_others_are_refused() -> None:
    model, _ = problem()
    optimizer = create_optimizer("zo-sgd", model, lr=0.1)
    with pytest.raises(ValueError, match="zeroflow"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    with pytest.raises(ValueError, match="trained components"):
        optimizer.load_state_dict(create_optimizer("zo-sgd", nn.Linear(2, 2), lr=0.1).state_dict())


FORWARD_PASS = [name for name in list_optimizers() if not name.startswith("fo-")]


@pytest.mark.parametrize("name", FORWARD_PASS)
def test_a_journal_replays_steps_without_a_forward_pass(name: str, tmp_path) -> None:
    """Cut off in the middle of a record, then gone on from the start: the same bits, and only the rest is evaluated."""

    def run(steps: int, path) -> tuple[torch.Tensor, int]:
        model, _ = problem(dropout=0.2)
        calls = []
        torch.manual_seed(3)
        x, y = torch.randn(40, 6), torch.randint(3, (40,))

        def closure() -> torch.Tensor:
            calls.append(1)
            return F.cross_entropy(model(x), y)

        journal = Journal(path)
        options = {"snapshot_every": 3} if name == "zo-svrg" else {}
        optimizer = create_optimizer(name, model, lr=0.01, queries=3, executor=journal, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(steps):
                optimizer.step(closure)
        journal.close()
        return flat(model), len(calls)

    whole, all_calls = run(8, tmp_path / "whole")
    run(5, tmp_path / "cut")
    with (tmp_path / "cut").open("ab") as file:
        file.write((tmp_path / "whole").read_bytes()[:13])
    resumed, calls = run(8, tmp_path / "cut")
    assert torch.equal(resumed, whole)
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert calls < 0.6 * all_calls
    again, calls = run(8, tmp_path / "cut")
    assert torch.equal(again, whole) and calls == 0


def test_a_journal_of_another_run_is_refused(tmp_path) -> None:
    model, loss = problem()
    journal = Journal(tmp_path / "losses")
    create_optimizer("zo-sgd", model, lr=0.01, queries=3, executor=journal).step(loss)
    journal.close()
    optimizer = create_optimizer("zo-sgd", model, lr=0.01, queries=2, executor=Journal(tmp_path / "losses"))
    with pytest.raises(ValueError, match="another run"):
        optimizer.step(loss)


@pytest.mark.parametrize(("name", "estimator"), [("my-rmsprop", Backpropagation()), ("fo-mine", SPSA())])
def test_a_name_says_whether_gradients_are_exact(name: str, estimator: Estimator) -> None:
    """Reports tell their readers by it what was trained by forward passes alone."""
    with pytest.raises(
        ConfigError, match="the name of one with exact gradients begins with 'fo-', that of any other does not"
    ):
        register_optimizer(OptimizerInfo(name, "made by a test", estimator, torch.optim.RMSprop, {}, 0.1))
    assert name not in list_optimizers()
