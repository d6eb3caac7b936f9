"""The rule, as it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zeroflow.optim.directions.direction import Step
from zeroflow.optim.updates.rule import Rule, Update


@dataclass(frozen=True)
class Plain(Update):
    """theta <- rule(theta, vector). Source: ZeroFlow, Algorithm 1, step 3. Cost: no forward pass."""

    def __call__(self, rule: Rule, vector: Tensor, step: Step) -> None:
        rule.apply(vector)
