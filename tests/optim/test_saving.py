"""Saving and loading in every way that others' code does it: groups own hyper-parameters, and nothing is lost on the way."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from zeroflow.optim import ThreeStepOptimizer, create_optimizer, list_optimizers

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = list_optimizers()
RULES = {"zo-sgd": {"momentum": 0.9, "history": 0.3, "sparsity": 0.2}, "zo-svrg": {"snapshot_every": 3}}


def build(name: str, dtype: torch.dtype = torch.float32, **options) -> tuple[nn.Module, Callable, ThreeStepOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(20, 6, dtype=dtype), torch.randint(3, (20,))
    options = {"lr": 0.05, "queries": 2, **RULES.get(name, {}), **options}
    if dtype != torch.float32:
        options["eps"] = 0.1
    return model, lambda: F.cross_entropy(model(x), y), create_optimizer(name, model, **options)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())])


@pytest.mark.parametrize("key", ["weight_decay", "lr", "eps_zo", "betas", "momentum"])
def test_what_is_set_in_a_group_stays_through_saving_and_loading(key: str) -> None:
    value = (0.5, 0.6) if key == "betas" else 0.5
    _, _, optimizer = build("zo-adam" if key == "betas" else "zo-sgd")
    optimizer.param_groups[0][key] = value
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][key] == value
    _, _, other = build("zo-adam" if key == "betas" else "zo-sgd")
    other.load_state_dict(saved)
    assert other.param_groups[0][key] == value


@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam", "fo-sgd"])
@pytest.mark.parametrize("kind", [OneCycleLR, CyclicLR])
def test_a_schedule_of_momentum_goes_on_where_it_was(name: str, kind: type) -> None:
    """Saved after the scheduler's step, which has changed the groups and not yet the rule."""

    def start():
        model, loss, optimizer = build(name, momentum=0.9) if name.endswith("sgd") else build(name)
        if kind is OneCycleLR:
            return model, loss, optimizer, OneCycleLR(optimizer, 0.1, total_steps=12)
        return model, loss, optimizer, CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, cycle_momentum=True)

    model, loss, optimizer, schedule = start()
    saved = []
    for _ in range(8):
        optimizer.step(loss)
        schedule.step()
        saved.append(copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict())))
    whole = flat(model)
    model, loss, optimizer, schedule = start()
    for part, state in zip((model, optimizer, schedule), saved[3], strict=True):
        part.load_state_dict(state)
    for _ in range(4):
        optimizer.step(loss)
        schedule.step()
    assert torch.equal(flat(model), whole)


def run(name: str, between: Callable, dtype: torch.dtype = torch.float32, steps: int = 4) -> tuple[Tensor, Tensor]:
    """(parameters of a run in one go, of one that was saved in the middle and loaded into another)."""
    model, loss, optimizer = build(name, dtype)
    for number in range(2 * steps):
        if number == steps:
            other_model, other_loss, other = build(name, dtype)
            other_model.load_state_dict(copy.deepcopy(model.state_dict()))
            other = between(model, optimizer, other_model, other) or other
        optimizer.step(loss)
    for _ in range(steps):
        other.step(other_loss)
    return flat(model), flat(other_model)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_torchs_distributed_checkpoint_functions_carry_everything(name: str, flatten: bool) -> None:
    def between(model, optimizer, other_model, other) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        set_optimizer_state_dict(other_model, other, state, options=options)

    assert torch.equal(*run(name, between))


@pytest.mark.parametrize("name", ["zo-adam", "zo-svrg", "zo-sgd", "es-cma", "fo-adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distributed_checkpoint_on_disk_carries_everything(name: str, dtype: torch.dtype, tmp_path) -> None:
    """Loaded as torch documents it: into the state of a fresh optimizer, in place."""

    def between(model, optimizer, other_model, other) -> None:
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
        state = {"optimizer": get_optimizer_state_dict(other_model, other)}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(other_model, other, state["optimizer"])

    assert torch.equal(*run(name, between, dtype))


@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam", "fo-adam", "es-cma"])
def test_asking_for_the_state_changes_nothing(name: str) -> None:
    """torch makes a step without a closure to have state made, where there is none yet."""
    ends = []
    for asks in (False, True):
        model, loss, optimizer = build(name)
        if asks:
            before = flat(model).clone()
            get_optimizer_state_dict(model, optimizer)
            assert torch.equal(flat(model), before) and all(p.grad is None for p in model.parameters())
        for _ in range(3):
            optimizer.step(loss)
        ends.append(flat(model))
    assert torch.equal(*ends)


def test_a_step_without_a_closure_is_still_refused() -> None:
    _, loss, optimizer = build("zo-sgd")
    with pytest.raises(TypeError, match="expected a closure"):
        optimizer.step()
    loss().backward()
    with pytest.raises(TypeError, match="expected a closure"):
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_an_optimizer_can_be_pickled_with_its_model(name: str, way: str) -> None:
    def between(model, optimizer, other_model, other):
        if way == "pickle":
            twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
        else:
            file = io.BytesIO()
            torch.save((model, optimizer), file)
            file.seek(0)
            twin, copied = torch.load(file, weights_only=False)
        for ours, theirs in zip(other_model.children(), list(twin.children()), strict=True):
            for key, parameter in list(theirs._parameters.items()):
                setattr(ours, key, parameter)
        copied._module = other_model
        return copied

    assert torch.equal(*run(name, between, steps=2))


def test_a_file_of_an_earlier_version_is_loaded() -> None:
    """Its own state stood beside torch's keys, with the moments in it."""
    model, loss, optimizer = build("zo-adam")
    for _ in range(3):
        optimizer.step(loss)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].pop("zeroflow")
    rule = {"state": copy.deepcopy(state["state"]), "param_groups": state["param_groups"]}
    state["zeroflow"] = {
        "steps": 3,
        "forwards": 12,
        "equivalents": 12,
        "skipped": 0,
        "seed": 0,
        "queries": 2,
        "size": flat(model).numel(),
        "memory": {},
        "mask": None,
        "masters": None,
        "rule": rule,
    }
    saved = copy.deepcopy(model.state_dict())
    optimizer.step(loss)
    other_model, other_loss, other = build("zo-adam")
    other_model.load_state_dict(saved)
    other.load_state_dict(state)
    other.step(other_loss)
    assert torch.equal(flat(other_model), flat(model)) and other.forwards == 16


@pytest.mark.parametrize(
    ("name", "options"),
    [("zo-adam", {}), ("zo-rge", {}), ("zo-sgd-sign", {}), ("fo-sgd", {}), ("zo-sgd-conserve", {}), ("zo-sgd", {"sparsity": 0.9})],
)  # fmt: skip
def test_the_state_of_another_kind_of_optimizer_is_refused(name: str, options: dict) -> None:
    """It would be taken for its own: without the mask, all weights move under ``sparsity``."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    own = create_optimizer("zo-sgd", model, lr=0.1)
    own.step(lambda: model.weight.square().sum())
    state = own.state_dict()
    with pytest.raises(ValueError, match=r"state_dict: of SPSA.* sparsity=0; this optimizer is "):
        create_optimizer(name, model, lr=0.1, **options).load_state_dict(state)
    create_optimizer("zo-sgd", model, lr=0.3, momentum=0.5, seed=7).load_state_dict(state)


class Unsorted(nn.Module):
    """Its parameters are not registered in the order of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.a = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam", "fo-sgd"])
def test_the_state_of_parameters_in_another_order_is_refused(name: str) -> None:
    model, other = Unsorted(), Unsorted()
    named = create_optimizer(name, model, lr=0.1)
    for made in (create_optimizer(name, other, lr=0.1), create_optimizer(name, other.named_parameters(), lr=0.1)):
        made.load_state_dict(named.state_dict())
    unnamed = create_optimizer(name, other.parameters(), lr=0.1)
    for source, target in ((named, unnamed), (unnamed, named)):
        with pytest.raises(ValueError, match="parameters were in another order, or others: those with names"):
            target.load_state_dict(source.state_dict())
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="parameters were in another order, or others"):
        create_optimizer(name, [bias, weight], lr=0.1).load_state_dict(
            create_optimizer(name, [weight, bias], lr=0.1).state_dict()
        )


@pytest.mark.parametrize("name", ["fo-adam", "zo-adam", "zo-adam-sign", "zo-adam-conserve", "zo-adamm", "zo-radazo"])
def test_a_group_has_an_adams_epsilon_of_its_own(name: str) -> None:
    found = []
    for way in ("option", "group", "group that is added"):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        first, second = [model.weight], [model.bias]
        if way == "option":
            optimizer = create_optimizer(name, [*first, *second], lr=0.1, eps_adam=1.0)
        elif way == "group":
            optimizer = create_optimizer(name, [{"params": [*first, *second], "eps_adam": 1.0}], lr=0.1)
        else:
            optimizer = create_optimizer(name, [{"params": first, "eps_adam": 1.0}], lr=0.1)
            optimizer.add_param_group({"params": second, "eps_adam": 1.0})
        for _ in range(3):
            optimizer.step(lambda model=model: model(torch.ones(4, 3)).square().mean())
        found.append(flat(model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
