"""Buffers that a forward pass moves: all evaluations of a step see the same ones, however they are moved and from when on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroflow.optim import Journal, create_optimizer


class Observed(nn.Module):
    """A layer whose output depends on a running mean of itself, and which notes what it saw of it.

    Args:
        how: the mean is put in the place of the old one, or written into it: as a tensor, past autograd, through numpy, or by
            torch's own kernel for batch statistics.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.how, self.moves = nn.Linear(3, 1), how, True
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("table", torch.ones(5))
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.seen.append(float(self.mean))
        if self.moves:
            self.move(h.detach())
        return h * (1 + self.mean)

    def move(self, h: Tensor) -> None:
        after = 0.5 * self.mean + 0.5 * h.mean()
        if self.how == "replaced":
            self.mean = after
        elif self.how == "written":
            self.mean.copy_(after)
        elif self.how == "data":
            self.mean.data.copy_(after)
        elif self.how == "numpy":
            self.mean.numpy()[...] = after.numpy()
        else:
            nn.functional.batch_norm(h, self.mean.view(1), torch.ones(1), training=True, momentum=0.5)


HOW = ["replaced", "written", "data", "numpy", "kernel"]


def run(model: Observed, moves_from: int = 0, name: str = "zo-sgd", *, training: bool = True) -> list[list[float]]:
    """What each of five steps saw of the mean."""
    model.train(training)
    optimizer = create_optimizer(name, model, lr=0.05, seed=1)
    x, found = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), []
    for step in range(5):
        model.moves, model.seen = step >= moves_from, []
        optimizer.step(lambda: (model(x) ** 2).mean())
        found.append(model.seen)
    return found


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("moves_from", [0, 1, 3])
@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam-conserve"])
def test_all_evaluations_of_a_step_see_the_same_buffers(how: str, training: bool, moves_from: int, name: str) -> None:
    model = Observed(how)
    seen = run(model, moves_from, name, training=training)
    assert all(len(set(step)) == 1 for step in seen), seen
    after = [*(step[0] for step in seen[1:]), float(model.mean)]
    assert [a != b for a, b in zip([0.0, *after], after, strict=False)] == [step >= moves_from for step in range(5)]


@pytest.mark.parametrize("moves_from", [0, 3])
def test_a_buffer_that_is_replaced_gives_the_bits_of_one_that_is_written_into(moves_from: int) -> None:
    first, second = Observed("written"), Observed("replaced")
    assert run(first, moves_from) == run(second, moves_from)
    assert torch.equal(first.layer.weight, second.layer.weight)


def test_batch_norm_that_starts_late_is_still_in_the_steps_evaluations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.0), nn.Linear(4, 1)).train()
    optimizer, x, seen = create_optimizer("zo-sgd", model, lr=0.05, seed=1), torch.randn(8, 3), []

    def closure() -> Tensor:
        seen[-1].append(model[1].running_mean.clone())
        return (model(x) ** 2).mean()

    for momentum in (0.0, 0.0, 0.1, 0.1):
        model[1].momentum = momentum
        seen.append([])
        optimizer.step(closure)
    assert all(torch.equal(step[0], other) for step in seen for other in step)
    assert not seen[2][0].any() and seen[3][0].any()


class Growing(nn.Module):
    """A layer with a queue of what it saw, and a sum that is None until it sees something; its output depends on both."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.in_place = nn.Linear(3, 1), in_place
        self.register_buffer("queue", torch.zeros(0))
        self.register_buffer("total", None)
        self.seen: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.seen.append((len(self.queue), self.total is None))
        extra = self.queue.sum() if self.total is None else self.total
        longer = torch.cat([self.queue, x.mean().reshape(1)])
        self.queue = self.queue.resize_(len(longer)).copy_(longer) if self.in_place else longer
        self.total = x.mean() if self.total is None else self.total + x.mean()
        return h * (1 + extra)


@pytest.mark.parametrize("name", ["fo-sgd", "zo-sgd", "zo-rge", "zo-sgd-conserve"])
@pytest.mark.parametrize("in_place", [False, True])
def test_buffers_that_grow_or_begin_as_none_move_once_a_step(name: str, in_place: bool) -> None:
    model = Growing(in_place).train()
    optimizer = create_optimizer(name, model, lr=0.05, seed=1)
    x = torch.ones(8, 3)
    for step in range(4):
        model.seen = []
        optimizer.step(lambda: (model(x) ** 2).mean())
        assert set(model.seen) == {(step, step == 0)}, "all evaluations of a step see the same"
        assert len(model.queue) == step + 1 and model.total == step + 1.0


def test_a_buffer_that_grows_is_refused_where_a_log_would_have_to_know(tmp_path: Path) -> None:
    model = Growing().train()
    optimizer = create_optimizer("zo-sgd", model, lr=0.05, executor=Journal(tmp_path / "log"))
    with pytest.raises(
        ValueError, match=r"buffer 'queue' of Growing goes from shape \(0,\) to \(1,\) in an evaluation"
    ):
        optimizer.step(lambda: (model(torch.ones(8, 3)) ** 2).mean())


def test_a_buffer_that_moves_in_evaluation_mode_is_put_back_too(tmp_path: Path) -> None:
    """As an observer's does; a log or other processes would have to know of it, which is refused."""
    model = Observed("written").eval()
    optimizer = create_optimizer("zo-sgd", model, lr=0.05, seed=1, queries=3)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model.seen = []
        optimizer.step(lambda: (model(x) ** 2).mean())
        assert len(set(model.seen)) == 1, model.seen
    logged = create_optimizer("zo-sgd", model, lr=0.05, executor=Journal(tmp_path / "log"))
    with pytest.raises(
        ValueError, match="'mean' of Observed moves in an evaluation, and its module is in evaluation mode"
    ):
        logged.step(lambda: (model(x) ** 2).mean())


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(8, 3))])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_models_buffers_are_put_back_too(compiled: Any) -> None:
    x, found = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), []
    for wrap in (lambda m: m, compiled):
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
        start = int(model.state_dict()["1.num_batches_tracked"])
        optimizer = create_optimizer("zo-adam", model, lr=0.05, seed=1)
        for _ in range(3):
            optimizer.step(lambda model=model: (model(x) ** 2).mean())  # type: ignore[misc]
        assert int(model.state_dict()["1.num_batches_tracked"]) == start + 3
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_a_buffer_that_begins_to_move_in_evaluation_mode_is_noticed(how: str) -> None:
    model = Observed(how).eval()
    optimizer = create_optimizer("zo-sgd", model, lr=0.0, seed=1, queries=3)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    mean = 0.0
    for step in range(4):
        model.moves, model.seen = step >= 2, []
        optimizer.step(lambda: (model(x) ** 2).mean())
        assert len(set(model.seen)) == 1, model.seen
        mean = 0.5 * mean + 0.5 * float(model.layer(x).detach().mean()) if model.moves else mean
        assert float(model.mean) == pytest.approx(mean, abs=1e-6)


class Masked(nn.Module):
    """A layer behind a buffer, which it changes once it is told how."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.register_buffer("mask", mask)
        self.change: Any = lambda mask: mask

    def forward(self, x: Tensor) -> Tensor:
        self.mask = self.change(self.mask)
        return self.layer(x) + (self.mask.to_dense() if self.mask.layout is not torch.strided else self.mask).sum()


CONSTANT = {
    "expanded": lambda: torch.ones(1, 4).expand(4, 4),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "large": lambda: torch.zeros(2**20 + 1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", CONSTANT)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_buffer_that_cannot_be_put_back_may_stand_still_and_is_refused_once_it_moves(
    kind: str, training: bool
) -> None:
    model, x = Masked(CONSTANT[kind]()).train(training), torch.ones(8, 4)
    optimizer = create_optimizer("zo-sgd", model, lr=0.01)
    for _ in range(3):
        optimizer.step(lambda: (model(x) ** 2).mean())
    model.change = (lambda mask: mask.add_(1)) if kind == "large" else (lambda mask: 2 * mask)
    before = model.mask
    with pytest.raises(ValueError, match=r"buffer 'mask' of Masked, .* begins to move: it is too large"):
        optimizer.step(lambda: (model(x) ** 2).mean())
    assert model.mask is before


@pytest.mark.parametrize("kind", ["expanded", "large"])
def test_writing_past_the_version_of_a_buffer_that_cannot_be_put_back_is_noticed(kind: str) -> None:
    """An observer's codebook, say, that begins to learn: it would learn in every evaluation of a step."""
    model, x = Masked(CONSTANT[kind]()), torch.ones(8, 4)
    optimizer = create_optimizer("zo-sgd", model, lr=0.01)
    optimizer.step(lambda: (model(x) ** 2).mean())

    def moved(mask: Tensor) -> Tensor:
        version = mask._version
        mask.numpy()[...] += 1
        assert mask._version == version
        return mask

    model.change = moved
    with pytest.raises(ValueError, match=r"buffer 'mask' of Masked, .* begins to move: it is too large"):
        for _ in range(2):
            optimizer.step(lambda: (model(x) ** 2).mean())


def test_buffers_made_in_inference_mode_move_once_a_step() -> None:
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
            optimizer = create_optimizer("zo-sgd", model, lr=0.1, queries=4)
            x = torch.randn(16, 3)
            losses = [float(optimizer.step(lambda model=model, x=x: model(x).square().mean())) for _ in range(3)]  # type: ignore[misc]
            assert int(model[1].num_batches_tracked) == 3
            found.append((losses, model[1].running_mean.tolist()))
    assert found[0] == found[1]


def test_a_buffer_in_another_memory_format_moves_as_its_like() -> None:
    found = []
    for format_ in (torch.contiguous_format, torch.channels_last):
        model = Masked(torch.ones(1, 2, 3, 4).contiguous(memory_format=format_))
        model.change = lambda mask: mask.mul_(2)
        optimizer = create_optimizer("zo-sgd", model, lr=0.01)
        for _ in range(2):
            optimizer.step(lambda model=model: (model(torch.ones(8, 4)) ** 2).mean())  # type: ignore[misc]
        found.append(model.mask.flatten().tolist())
    assert found[0] == found[1] == [4.0] * 24


class RunningMax(nn.Module):
    """An observer of activations: it moves where they are larger than ever before, so in displaced evaluations and not at theta."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.calls = nn.Linear(3, 2), 0
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.layer(x)
        self.largest = torch.maximum(self.largest, h.detach().abs().max())
        return h / (1 + self.largest)


@pytest.mark.parametrize("name", ["zo-sgd", "zo-sgd-conserve", "zo-rge"])
def test_every_forward_pass_counts_also_one_after_which_no_buffer_moves(name: str) -> None:
    model, x = RunningMax(), torch.ones(4, 3)
    optimizer = create_optimizer(name, model, lr=0.01, eps=0.1)
    for _ in range(12):
        optimizer.step(lambda: model(x).square().mean())
    assert optimizer.forwards == model.calls


def test_training_with_quantisation_in_view_begins_with_its_observers_empty() -> None:
    """Those of single channels resize their buffers in place, in the first forward pass."""
    from torch.ao import quantization

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(16, 3)
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    prepared = quantization.prepare_qat(model.train())
    calls: list[int] = []
    prepared.register_forward_hook(lambda *_: calls.append(1))
    optimizer = create_optimizer("zo-sgd", prepared, lr=0.01)
    losses = [float(optimizer.step(lambda: (prepared(x) - 1).square().mean())) for _ in range(5)]
    assert optimizer.forwards == len(calls) and max(losses) < 10
    assert prepared[0].weight_fake_quant.scale.shape == (4,)


def test_a_large_buffer_that_is_a_view_of_a_parameter_stands_still() -> None:
    model, x = nn.Linear(1025, 1024), torch.ones(2, 1025)
    model.register_buffer("shown", model.weight.data)
    optimizer = create_optimizer("zo-sgd", model, lr=0.01)
    for _ in range(3):
        optimizer.step(lambda: model(x).square().mean())
