"""What the evaluations of a step see and leave behind, also where one goes wrong, and steps that a journal makes again."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from problems import flat, problem, reference_directions
from torch import nn
from torch.nn import functional as F

from zeroflow.errors import ConfigError
from zeroflow.optim import Journal, NonFiniteLoss, create_optimizer, list_optimizers


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


def test_a_loss_that_is_a_plain_number_from_outside_torch_is_fine() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = create_optimizer("zo-sgd", [parameter], lr=0.05, queries=4)
    for _ in range(200):
        optimizer.step(lambda: float(np.sum((parameter.detach().numpy() - 1.0) ** 2)))
    np.testing.assert_allclose(parameter.detach().numpy(), 1.0, atol=1e-2)


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


def test_all_seeds_are_different() -> None:
    moved = []
    for seed in (0, 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1):
        parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        create_optimizer("zo-sgd", [parameter], lr=1.0, seed=seed).step(lambda p=parameter: p.sum())
        moved.append(tuple(parameter.tolist()))
    assert len(set(moved)) == len(moved)


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
