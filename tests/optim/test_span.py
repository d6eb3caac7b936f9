"""The projection on the span of a step's directions: exact where they span everything, never longer than the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zeroflow.errors import ConfigError
from zeroflow.optim import create_optimizer


def estimate(
    name: str, size: int, queries: int, combine: str, seed: int = 0, eps: object = 1e-4
) -> tuple[Tensor, Tensor]:
    """(gradient, estimate) of a linear loss, whose differences are exact."""
    gradient = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = create_optimizer(name, [theta], lr=1.0, queries=queries, seed=seed, combine=combine, eps=eps)
    optimizer.step(lambda: theta @ gradient)
    return gradient, -theta.detach()


@pytest.mark.parametrize("name", ["zo-sgd", "zo-rge", "forward-grad"])
@pytest.mark.parametrize("queries", [12, 30])
def test_as_many_queries_as_components_give_the_gradient_itself(name: str, queries: int) -> None:
    gradient, found = estimate(name, 12, queries, "span")
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zo-sgd", "zo-rge", "forward-grad"])
def test_the_projection_is_nearer_than_the_mean_and_never_longer_than_the_gradient(name: str) -> None:
    cosines = {"mean": [], "span": []}
    for seed in range(40):
        for combine, found in cosines.items():
            gradient, vector = estimate(name, 50, 16, combine, seed)
            found.append(float(torch.cosine_similarity(gradient, vector, dim=0)))
            if combine == "span":
                assert float(vector.norm()) <= float(gradient.norm()) * (1 + 1e-6)
                # What is left of the gradient is at right angles to what was found.
                assert abs(float((gradient - vector) @ vector)) < 1e-5
    assert sum(cosines["span"]) > 1.08 * sum(cosines["mean"])


def test_groups_with_an_eps_of_their_own_still_get_the_gradient() -> None:
    gradient = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = [nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2)]
    groups = [{"params": [part], "eps": eps} for part, eps in zip(parts, (1e-3, 1e-2), strict=True)]
    create_optimizer("zo-sgd", groups, lr=1.0, queries=8, combine="span").step(lambda: torch.cat(parts) @ gradient)
    torch.testing.assert_close(-torch.cat(parts).detach(), gradient, rtol=1e-6, atol=1e-6)


def test_a_query_without_a_finite_loss_leaves_the_span_of_the_others() -> None:
    gradient = torch.randn(3, dtype=torch.float64)
    theta, calls = nn.Parameter(torch.zeros(3, dtype=torch.float64)), []

    def closure() -> Tensor | float:
        calls.append(1)
        return float("nan") if len(calls) == 4 else theta @ gradient

    create_optimizer("zo-sgd", [theta], lr=1.0, queries=4, combine="span").step(closure)
    torch.testing.assert_close(-theta.detach(), gradient, rtol=1e-6, atol=1e-6)


def test_another_way_to_combine_is_refused() -> None:
    with pytest.raises(ConfigError, match="combine='sum': expected 'mean' or 'span'"):
        create_optimizer("zo-sgd", [nn.Parameter(torch.zeros(3))], lr=1.0, combine="sum")
