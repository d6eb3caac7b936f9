"""What a user of ``torch.optim`` relies on: groups, states, copies, models that change under an optimizer, and what is refused."""

from __future__ import annotations

import copy
import math
import re
import warnings

import pytest
import torch
from problems import PAPER, flat, problem
from torch import nn

from zeroflow.errors import ConfigError
from zeroflow.optim import create_optimizer, list_optimizers


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


@pytest.mark.parametrize("how", ["unfrozen", "replaced", "neither"])
def test_parameters_that_come_later_are_told_once(how: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)
    model[0].requires_grad_(False)
    optimizer = create_optimizer("zo-sgd", model, lr=0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(3):
            optimizer.step(lambda: model(x).square().mean())
            if step == 0 and how == "unfrozen":
                model[0].requires_grad_(True)
            if step == 0 and how == "replaced":
                model[2] = nn.Linear(4, 1)
    told = [str(each.message) for each in seen]
    name = {"unfrozen": "0.weight, 0.bias;", "replaced": "2.weight, 2.bias;"}.get(how)
    assert [f"does not train: {name}" in text for text in told] == ([True] if name else [])


@pytest.mark.parametrize("name", list_optimizers())
def test_a_closure_that_forgets_to_return_its_loss_is_told_and_not_asked_again(name: str) -> None:
    model, loss = problem()
    called, before = [], flat(model)
    optimizer = create_optimizer(name, model, lr=0.1)

    def forgets() -> None:
        called.append(loss())
        assert len(called) < 100, "asked again and again"

    with pytest.raises(TypeError, match=r"^closure: .*loss"):
        optimizer.step(forgets)
    assert len(called) == 1 and torch.equal(flat(model), before)
