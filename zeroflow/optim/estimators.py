"""Step 1: a gradient estimate from function values. Each class states its formula, its source and its cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from zeroflow.optim.objective import Objective, Shift


class Estimator(ABC):
    """Turns answers of an ``Objective`` into (loss, gradient estimate ``[d]``)."""

    uses_queries: ClassVar[bool] = True
    """Whether the number of queries matters."""
    uses_eps: ClassVar[bool] = True
    """Whether the perturbation size matters."""

    @abstractmethod
    def forwards(self, queries: int) -> int:
        """Forward passes of one step."""

    @abstractmethod
    def estimate(self, objective: Objective, queries: int) -> tuple[float, Tensor]:
        """The loss near theta and the estimate ``[d]``, a new tensor."""


def combine(objective: Objective, coefficients: list[float]) -> Tensor:
    """Sum over queries i of coefficients[i] * z_i, ``[d]``; directions are regenerated one at a time, in query order."""
    total = torch.zeros_like(objective.flat.live)
    for query, coefficient in enumerate(coefficients):
        total.add_(objective.direction(query), alpha=coefficient)
    return total


class SPSA(Estimator):
    """Two-sided simultaneous perturbation with q queries.

    g_i = (L(theta + eps z_i) - L(theta - eps z_i)) / 2 eps;  estimate = mean over i of g_i z_i,  z_i ~ N(0, I).
    Source: Spall 1992; MeZO (Malladi et al. 2023), definition 1; ZeroFlow, Eq. 1. Cost: 2q forward passes.
    """

    def forwards(self, queries: int) -> int:
        return 2 * queries

    def estimate(self, objective: Objective, queries: int) -> tuple[float, Tensor]:
        losses = objective.losses([Shift(sign, query) for query in range(queries) for sign in (1.0, -1.0)])
        halves = [(plus - minus) / 2 for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        estimate = combine(objective, [half / queries for half in halves]).div_(objective.eps)
        return sum(losses) / len(losses), estimate


class ForwardGradient(Estimator):
    """Forward gradient: the exact directional derivative along random directions, by forward-mode differentiation.

    g_i = dL(theta)/d z_i;  estimate = mean over i of g_i z_i. No eps. Source: Baydin et al. 2022, Eq. 1; Ren et al. 2023.
    Cost: q forward passes that carry a tangent (each about three plain ones), no graph.
    """

    uses_eps = False

    def forwards(self, queries: int) -> int:
        return queries

    def estimate(self, objective: Objective, queries: int) -> tuple[float, Tensor]:
        answers = objective.slopes(queries)
        estimate = combine(objective, [slope / queries for _, slope in answers])
        return sum(loss for loss, _ in answers) / queries, estimate


class Backpropagation(Estimator):
    """The exact gradient, as the reference that forward-pass methods are measured against.

    Cost: one forward and one backward pass (about two forwards), and the memory of the graph.
    """

    uses_queries = False
    uses_eps = False

    def forwards(self, queries: int) -> int:
        return 1

    def estimate(self, objective: Objective, queries: int) -> tuple[float, Tensor]:
        return objective.gradient()
