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
from zeroflow.models.backbone import create_backbone
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
    calls = (
        loss.backward,
        lambda: torch.autograd.backward(loss),
        lambda: torch.autograd.grad(loss, VALUE),
        lambda: torch.autograd.grad(loss, VALUE, is_grads_batched=True, grad_outputs=torch.ones(2)),
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
