"""``zo-muon``: directions in a subspace of low rank that comes from the seed alone, and steps of one size in all of it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroflow.errors import ConfigError
from zeroflow.optim import create_optimizer
from zeroflow.optim.testing import checks, subject
from zeroflow.optim.testing.problems import Places


def problem(seed: int = 0) -> tuple[nn.Module, Any]:
    """A convolution and a linear layer in float64, and their loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 9)).double()
    x, y = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randn(8, 9, dtype=torch.float64)
    return model, lambda: (model(x) - y).square().mean()


def weights(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """Parts of a vector in the order of parameters' names, as matrices."""
    named = sorted(model.named_parameters())
    parts = vector.split([p.numel() for _, p in named])
    return {name: part.view(len(p) if p.ndim > 1 else 1, -1) for (name, p), part in zip(named, parts, strict=True)}


def displaced(steps: int, **options: Any) -> tuple[nn.Module, list[Tensor]]:
    """The places that each step looks at, ``[queries, d]``."""
    model, loss = problem()
    optimizer, places = create_optimizer("zo-muon", model, lr=1e-2, **options), Places(model, loss)
    found = []
    for _ in range(steps):
        places.watch()
        optimizer.step(places)
        found.append(places.matrix())
    return model, found


def test_a_matrix_is_moved_in_a_subspace_of_its_rank_until_that_is_drawn_anew() -> None:
    model, steps = displaced(4, rank=2, resample_every=2, queries=5)

    def columns(some: list[Tensor], name: str) -> int:
        """Dimensions that the columns of a matrix's displacements span."""
        return int(
            torch.linalg.matrix_rank(torch.cat([weights(model, z)[name] for step in some for z in step], 1), rtol=1e-6)
        )

    for name, rows in (("0.weight", 6), ("3.weight", 9)):
        assert columns(steps[:1], name) == columns(steps[:2], name) == columns(steps[2:], name) == 2
        assert columns(steps, name) == min(4, rows)
    # Nothing is lost of a bias: as many dimensions as there are directions.
    biases = torch.cat([weights(model, z)["3.bias"] for step in steps for z in step])
    assert int(torch.linalg.matrix_rank(biases, rtol=1e-6)) == 9


def test_a_full_rank_is_no_subspace() -> None:
    _, (places,) = displaced(1, rank=64, queries=40)
    found = places / 1e-3
    assert abs(float(found.square().mean()) - 1) < 0.05  # Gaussian of variance 1, whatever the basis


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_step_is_as_long_in_every_direction_of_the_subspace_whatever_the_scale_of_the_loss(scale: float) -> None:
    model, loss = problem()
    before = torch.cat([p.detach().reshape(-1).clone() for _, p in sorted(model.named_parameters())])
    create_optimizer("zo-muon", model, lr=0.1, rank=3).step(lambda: scale * loss())
    after = torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())])
    for name, part in weights(model, (before - after) / 0.1).items():
        sizes = torch.linalg.svdvals(part)
        rank = 3 if "weight" in name else 1
        assert all(0.6 < size < 1.3 for size in sizes[:rank]) and all(size < 1e-4 for size in sizes[rank:]), (
            name,
            sizes,
        )


@pytest.mark.slow
def test_bases_are_in_no_state_and_a_run_resumes_between_and_across_them() -> None:
    model, loss = problem()
    optimizer = create_optimizer("zo-muon", model, lr=1e-2, rank=2, queries=2)
    optimizer.step(loss)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert file.tell() < 8_000 and not optimizer.state and len(optimizer.held()) == 1  # the master copy
    one = subject("zo-muon", rank=2, resample_every=3, queries=2)
    checks.check_resumes_bit_for_bit(one)
    checks.check_results_do_not_depend_on_who_evaluates(one, steps=5)


def test_a_flat_loss_moves_nothing() -> None:
    model, _ = problem()
    before = [p.detach().clone() for p in model.parameters()]
    create_optimizer("zo-muon", model, lr=1.0).step(lambda: 1.0)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0: expected an integer >= 1"),
        ({"rank": 2.5}, "rank=2.5.*an integer"),
        ({"resample_every": -1}, "resample_every=-1: expected an integer >= 1"),
        ({"combine": "sum"}, "combine='sum': expected 'mean' or 'span'"),
        ({"distribution": "gaussian"}, "unknown option 'distribution'"),
        ({"ranks": 4}, "did you mean 'rank'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_optimizer("zo-muon", nn.Linear(2, 2), lr=0.1, **options)
