"""Step 3: from a direction to new parameters. Any ``torch.optim`` optimizer, bare or guarded."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor

from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.objective import Objective, Shift


class Update(Protocol):
    """Moves the parameters along ``-direction``."""

    def forwards(self) -> int:
        """Forward passes of one update."""
        ...

    def __call__(
        self, inner: torch.optim.Optimizer, flat: FlatParameters, direction: Tensor, objective: Objective
    ) -> None:
        """Apply one update. ``inner`` holds hyper-parameters and moments; ``direction`` is ``[d]``."""
        ...


class Plain:
    """theta <- inner(theta, direction). Source: ZeroFlow, Algorithm 1, step 3. Cost: no forward pass."""

    def forwards(self) -> int:
        return 0

    def __call__(
        self, inner: torch.optim.Optimizer, flat: FlatParameters, direction: Tensor, objective: Objective
    ) -> None:
        for parameter, gradient in zip(flat.parameters, flat.views(direction), strict=True):
            parameter.grad = gradient
        inner.step()
        for parameter in flat.parameters:
            parameter.grad = None


class Conserve:
    """Take the step only where it helps: keep the best of theta, theta - step, theta + step on the same mini-batch.

    Unless theta - step is kept, the inner optimizer's moments return to what they were, so a rejected step leaves no trace.
    Source: ZeroFlow, Section 3.1; Kim et al. 2021 (CARS). Cost: 3 forward passes.
    """

    def __init__(self) -> None:
        self.plain = Plain()

    def forwards(self) -> int:
        return 3

    def __call__(
        self, inner: torch.optim.Optimizer, flat: FlatParameters, direction: Tensor, objective: Objective
    ) -> None:
        before = flat.live.clone()
        moments = {parameter: copy.deepcopy(state) for parameter, state in inner.state.items()}
        self.plain(inner, flat, direction, objective)
        step = before - flat.live
        flat.live.copy_(before)
        losses = objective.losses([Shift(0.0), Shift(-1.0, vector=step), Shift(1.0, vector=step)])
        best = losses.index(min(losses))  # staying wins a tie
        flat.live.copy_((before, before - step, before + step)[best])
        if best != 1:
            inner.state.clear()
            inner.state.update(moments)
