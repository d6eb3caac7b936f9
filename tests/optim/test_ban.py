"""The gradient ban: what it catches, what it lets through, and that forward-only trials run under it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import zeroflow
from zeroflow import GradientBanned, TrialConfig, gradient_ban, run_trial
from zeroflow.methods import FineTuning
from zeroflow.models.factory import create_backbone
from zeroflow.optim import create_optimizer, list_optimizers
from zeroflow.optim.ban import banned

VALUE = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return 2 * value

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


GRAPHS = {
    "a layer": lambda: nn.Linear(3, 2)(torch.ones(3)),
    "what saves nothing for a backward pass": lambda: VALUE + 1,
    "a view": lambda: VALUE[:2],
    "a sum": lambda: VALUE.sum(),
    "a copy": lambda: VALUE.clone(),
    "a loss": lambda: F.cross_entropy(VALUE, torch.tensor(0)),
    "an input that requires a gradient": lambda: torch.ones(2, requires_grad=True) * 3,
    "an own function": lambda: Doubled.apply(VALUE),
    "an in-place operation": lambda: torch.zeros(3).add_(VALUE),
    "torch.func": lambda: torch.func.grad(lambda x: (x * x).sum())(torch.ones(2)),
}


@pytest.mark.parametrize("build", GRAPHS.values(), ids=GRAPHS)
def test_a_graph_raises_where_it_would_be_built(build) -> None:
    build()
    with gradient_ban(), pytest.raises(GradientBanned, match="graph would be built inside a gradient ban"):
        build()
    with gradient_ban(), torch.no_grad(), torch.enable_grad(), pytest.raises(GradientBanned):
        build()
    build()


def test_a_backward_call_raises_on_a_graph_from_outside_too() -> None:
    loss = (VALUE**2).sum()
    how = ((torch.ones(()),), True, False, (VALUE,))  # gradients, keep the graph, make one, of what
    calls = (
        loss.backward,
        lambda: torch.autograd.backward(loss),
        lambda: torch.autograd.grad(loss, VALUE),
        lambda: torch.autograd.grad(loss, VALUE, is_grads_batched=True, grad_outputs=torch.ones(2)),
        lambda: torch.autograd.graph._engine_run_backward((loss,), *how),
        lambda: torch.autograd.Variable._execution_engine.run_backward((loss,), *how),
    )
    for call in calls:
        with gradient_ban(), pytest.raises(GradientBanned, match="backward pass"):
            call()
    (gradient,) = torch.autograd.grad(loss, VALUE)
    assert torch.equal(gradient, 2 * VALUE.detach()), "outside everything is as ever"


def test_what_needs_no_graph_goes_on() -> None:
    model = nn.Linear(3, 1)
    plain = model(torch.ones(3)).detach()
    with gradient_ban():
        with torch.no_grad():
            assert torch.equal(model(torch.ones(3)), plain)
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones(3), torch.ones(3))
            assert float(forward_ad.unpack_dual((dual * dual).sum()).tangent) == 6.0
        assert float(torch.ones(3).sum()) == 3.0
        # Frozen layers make no graph of images, so what does nothing but call them need not say no_grad().
        assert not create_backbone()(torch.zeros(1, 3, 28, 28)).requires_grad
        assert nn.Parameter(torch.ones(2)).requires_grad
        with torch.no_grad():
            assert torch.equal(Doubled.apply(VALUE), 2 * VALUE)


def test_bans_nest_end_with_an_error_and_are_of_one_thread() -> None:
    assert not banned() and not torch.is_anomaly_enabled()
    with pytest.raises(ZeroDivisionError), gradient_ban(), gradient_ban():
        raise ZeroDivisionError
    assert not banned() and not torch.is_anomaly_enabled()
    seen: list[object] = []

    def other() -> None:
        seen.append(torch.autograd.grad((VALUE**2).sum(), VALUE)[0])

    with gradient_ban():
        with gradient_ban():
            pass
        assert banned()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(seen) == 1, "a loader's or a neighbour's thread is free"

    @zeroflow.gradient_ban()
    def forbidden() -> torch.Tensor:
        return VALUE * 2

    for _ in range(2):
        with pytest.raises(GradientBanned):
            forbidden()


def mode() -> tuple[bool, bool]:
    """Anomaly mode, and whether it looks for nan, as torch's core has them."""
    return torch._C.is_anomaly_enabled(), torch._C.is_anomaly_check_nan_enabled()


def refused() -> None:
    with pytest.raises(GradientBanned):
        VALUE + 1


def test_it_cannot_be_switched_off_with_anomaly_mode() -> None:
    with gradient_ban():
        for _ in range(2):
            torch.autograd.set_detect_anomaly(False)
            refused()
        with torch.autograd.set_detect_anomaly(False, check_nan=False):
            refused()
        refused()
    assert mode() == (False, True)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("check_nan", [True, False])
@pytest.mark.parametrize("first", ["ban", "anomaly mode"])
@pytest.mark.parametrize("longest", ["ban", "anomaly mode"])
def test_anomaly_mode_begins_and_ends_as_without_a_ban(first: str, longest: str, check_nan: bool) -> None:
    contexts = {"ban": gradient_ban}
    contexts["anomaly mode"] = lambda: torch.autograd.detect_anomaly(check_nan)
    second, shortest = (next(name for name in contexts if name != other) for other in (first, longest))
    begun = {}
    for name in (first, second):
        begun[name] = contexts[name]()
        begun[name].__enter__()
    assert mode() == (True, check_nan)
    refused()
    begun[shortest].__exit__(None, None, None)
    if longest == "ban":
        refused()
        assert not torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()
    else:
        assert (VALUE + 1).requires_grad and mode() == (True, check_nan)
    begun[longest].__exit__(None, None, None)
    assert mode() == (False, True)


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_a_free_thread_may_have_nan_in_its_gradients() -> None:
    found: list[object] = []

    def other() -> None:
        value = torch.tensor([1.0, 0.0], requires_grad=True)
        try:
            found.extend(torch.autograd.grad((value * 0).sqrt().sum(), value))
        except RuntimeError as error:
            found.append(str(error))

    for asked in (False, True):
        with torch.autograd.set_detect_anomaly(asked), gradient_ban():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    free, checked = found
    assert isinstance(free, torch.Tensor) and free.isnan().all()
    assert isinstance(checked, str) and "returned nan values" in checked, "who asks for the check has it"


@pytest.mark.parametrize("name", list_optimizers())
def test_forward_pass_optimizers_step_inside_it_and_first_order_ones_cannot(name: str) -> None:
    torch.manual_seed(0)
    model, images, labels = nn.Linear(4, 3), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = create_optimizer(name, model, lr=0.01)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(images), labels, reduction="none" if optimizer.per_example else "mean")

    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    with gradient_ban():
        if name.startswith("fo-"):
            with pytest.raises(GradientBanned):
                optimizer.step(loss, [loss])
        else:
            optimizer.step(loss, [loss])
    after = nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(after, before) == name.startswith("fo-")


@pytest.mark.parametrize(
    ("settings", "within"),
    [
        ({"optimizer": "zo-sgd"}, True), ({"optimizer": "forward-grad"}, True), ({"optimizer": "zo-per-example"}, True),
        ({"optimizer": "fo-sgd"}, False), ({"optimizer": "zo-sgd", "hybrid_epochs": 1}, False),
        ({"optimizer": "zo-sgd", "optimizer_options": {"hybrid": 1}}, False), ({"method": "simplecil"}, True),
    ],
)  # fmt: skip
def test_forward_only_trials_run_under_it(
    settings: dict, within: bool, some_drawings: str, tiny_vit: dict, monkeypatch
) -> None:
    seen: list[bool] = []
    end = zeroflow.methods.Method.set_grad_checkpointing
    monkeypatch.setattr(
        zeroflow.methods.Method, "set_grad_checkpointing", lambda *a: (seen.append(banned()), end(*a))[1]
    )
    base = {**tiny_vit, "dataset": some_drawings, "tasks": 10, "stop_after": 1, "epochs": 1, "batch_size": 24}
    run_trial(
        TrialConfig.from_dict({**base, "method": "finetune", **settings}), on_stage=lambda *a: seen.append(banned())
    )
    assert seen and set(seen) == {within}
    assert not banned()


def test_a_method_that_takes_a_gradient_ends_a_forward_only_trial(
    some_drawings: str, tiny_vit: dict, monkeypatch
) -> None:
    original = FineTuning.end_task

    def learns_in_secret(self, batches) -> None:
        torch.autograd.grad(self.head.weight.square().sum(), self.head.weight)
        original(self, batches)

    monkeypatch.setattr(FineTuning, "end_task", learns_in_secret)
    base = {**tiny_vit, "dataset": some_drawings, "tasks": 10, "stop_after": 1, "epochs": 1, "batch_size": 24}
    run_trial(TrialConfig.from_dict({**base, "method": "finetune", "optimizer": "fo-sgd"}))
    with pytest.raises(GradientBanned, match="graph would be built"):
        run_trial(TrialConfig.from_dict({**base, "method": "finetune", "optimizer": "zo-sgd"}))
