"""Parameters so large that their own rounding swallows perturbations are told of, once; others are not."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroflow.optim import create_optimizer
from zeroflow.optim.optimizer import ThreeStepOptimizer

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def said(optimizer: ThreeStepOptimizer, closure: Callable[[], Any], steps: int = 1) -> list[str]:
    """What steps say of parameters that are hardly moved; it must come from the line that makes the step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step(closure)
    ours = [one for one in caught if "hardly moves" in str(one.message)]
    assert all(one.filename == __file__ for one in ours)
    return [str(one.message) for one in ours]


def of(*values: Tensor, name: str = "zo-sgd", **options: Any) -> tuple[ThreeStepOptimizer, Callable[[], Tensor]]:
    parameters = [nn.Parameter(value) for value in values]
    optimizer = create_optimizer(name, parameters, **{"lr": 1e-9, **options})
    return optimizer, lambda: sum(((p.double() + 1).log().sum() for p in parameters), torch.zeros(()))


@pytest.mark.parametrize(
    ("dtype", "eps", "size", "apart"),
    [
        (BF16, 1e-2, 1.0, None),
        (BF16, 1e-2, 4.0, None),  # four fifths of the slope are still seen
        (BF16, 1e-2, 16.0, "0.12"),
        (F16, 1e-3, 1.0, None),
        (F16, 1e-3, 16.0, "0.016"),
        (F32, 1e-3, 100.0, None),
        (F32, 1e-3, 1e5, "0.0078"),
        (F32, 2e-8, 1.5, "1.2e-07"),
        (torch.float64, 1e-3, 1e9, None),
    ],
)
def test_what_the_dtype_swallows_is_told_with_the_eps_that_it_would_take(
    dtype: torch.dtype, eps: float, size: float, apart: str | None
) -> None:
    values = torch.full((20,), size, dtype=dtype)
    found = said(*of(values, torch.zeros(5, dtype=dtype), eps=eps), steps=12)
    if apart is None:
        assert found == []
        return
    (message,) = found
    kind = str(dtype).removeprefix("torch.")
    for part in (f"eps={eps:g} ", "parameter 0:", f"about {size:.3g},", f"numbers of {kind} are {apart} apart"):
        assert part in message
    enough = float(re.search(r"eps above ([\d.e-]+)", message).group(1))  # type: ignore[union-attr]
    assert said(*of(values, eps=1.1 * enough)) == []


def test_a_model_with_few_large_values_is_not_told_and_a_deaf_norm_is_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(200, 64), nn.LayerNorm(64), nn.Linear(64, 2)).bfloat16()
    with torch.no_grad():
        model[0].weight[:5] = 30.0
        model[2].weight[0, 0] = 1e4
    tokens = torch.arange(12)

    def loss() -> Tensor:
        return model(tokens).double().square().mean()

    assert said(create_optimizer("zo-sgd", model, lr=1e-30, eps=1e-2), loss, 12) == []
    with torch.no_grad():
        model[1].weight.fill_(30.0)
    (message,) = said(create_optimizer("zo-sgd", model, lr=1e-30, eps=1e-2), loss, 12)
    assert "parameter 1.weight:" in message and "bfloat16" in message
    with torch.no_grad():
        model[1].bias.fill_(30.0)
    (message,) = said(create_optimizer("zo-sgd", model, lr=1e-30, eps=1e-2), loss, 12)
    assert "and 1 more" in message
    model[1].requires_grad_(False)
    assert said(create_optimizer("zo-sgd", model, lr=1e-30, eps=1e-2), loss) == []


def test_values_that_grow_a_smaller_eps_and_new_parameters_are_looked_at() -> None:
    optimizer, loss = of(torch.ones(8))
    assert said(optimizer, loss, 5) == []
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].fill_(1e6)
    assert len(said(optimizer, loss, 20)) == 1
    optimizer, loss = of(torch.ones(8))
    assert said(optimizer, loss, 3) == []
    optimizer.param_groups[0]["eps_zo"] = 1e-8
    assert len(said(optimizer, loss)) == 1
    optimizer, loss = of(torch.ones(8))
    assert said(optimizer, loss, 3) == []
    optimizer.add_param_group({"params": [nn.Parameter(torch.full((3,), 1e6))]})
    (message,) = said(optimizer, loss)
    assert "parameter 1:" in message
    optimizer, loss = of(torch.ones(8), eps=1e-2)
    assert said(optimizer, loss, 3) == []
    optimizer.param_groups[0]["params"][0].data = torch.full((8,), 16.0, dtype=BF16)
    assert len(said(optimizer, loss)) == 1


def test_each_group_has_its_own_eps() -> None:
    small, large = nn.Parameter(torch.ones(8)), nn.Parameter(torch.full((8,), 1e6))

    def loss() -> Tensor:
        return small.double().sum() + large.double().sum()

    def groups(eps: float) -> list[dict[str, Any]]:
        return [{"params": [small]}, {"params": [large], "eps": eps}]

    assert said(create_optimizer("zo-sgd", groups(1.0), lr=1e-9), loss) == []
    (message,) = said(create_optimizer("zo-sgd", groups(1e-2), lr=1e-9), loss)
    assert message.startswith("eps=0.01 ") and "parameter 1:" in message


def test_how_large_a_direction_is_depends_on_its_distribution() -> None:
    """Near 20,000 float32's numbers are 0.002 apart: signs times 0.0009 move none of them, normal numbers many."""
    values = torch.full((400,), 2e4)
    assert len(said(*of(values, eps=9e-4, distribution="rademacher"))) == 1
    assert said(*of(values, eps=9e-4)) == []
    assert len(said(*of(values, eps=9e-3, distribution="sphere", name="zo-rge"))) == 1
    assert said(*of(values, eps=9e-2, distribution="sphere", name="zo-rge")) == []


def test_a_matrix_that_is_displaced_by_a_product_of_its_own_is_not_told() -> None:
    model, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    nn.init.constant_(model.weight, 1e6)
    for name, expected in (("zo-per-example", 0), ("zo-sgd", 1)):
        optimizer = create_optimizer(name, model, lr=1e-9)
        per_example = optimizer.per_example
        assert len(said(optimizer, lambda per=per_example: model(x).mean(1) if per else model(x).mean())) == expected


def test_who_does_not_ask_for_it_or_displaces_nothing_is_not_told() -> None:
    values = torch.full((8,), 1e6)
    assert len(said(*of(values, hybrid=2), steps=2)) == 0
    assert len(said(*of(values, hybrid=2), steps=3)) == 1
    assert said(*of(values, check_precision=False), steps=12) == []
    for name in ("forward-grad", "fo-sgd"):
        assert said(*of(values, name=name)) == []


def test_who_asks_and_tells_is_told() -> None:
    optimizer, _ = of(torch.full((8,), 1e6), name="zo-sgd-conserve")
    with pytest.warns(UserWarning, match="hardly moves") as caught:
        for _ in range(3):
            told = None
            while told is None:
                told = optimizer.tell([1.0 + candidate.number for candidate in optimizer.ask()])
    assert sum("hardly moves" in str(one.message) for one in caught) == 1


def test_values_of_a_run_that_has_diverged_are_no_matter_of_eps() -> None:
    parameter = nn.Parameter(torch.ones(8))
    optimizer = create_optimizer("zo-sgd", [parameter], lr=100.0)
    assert said(optimizer, lambda: parameter.double().square().mean(), 12) == []
    assert float(parameter.detach().abs().median()) > 1e6


def test_a_mask_of_infinite_values_is_not_told() -> None:
    """An attention mask that somebody left among the parameters."""
    mask = nn.Parameter(torch.full((4, 4), -math.inf).triu(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_optimizer("zo-sgd", [mask], lr=0.1).step(lambda: (mask.exp().sum() - 1).square())
