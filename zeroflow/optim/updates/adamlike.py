"""What the rules with Adam's hyper-parameters have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class AdamLike(torch.optim.Optimizer):
    """A rule with moments that start at zero; a subclass says which, and what a step is.

    Args:
        params: as in any ``torch.optim`` optimizer.
        lr: learning rate.
        betas: (b1, b2), both in [0, 1).
        eps_adam: keeps the quotient finite where no gradient was seen.
        weight_decay: adds ``weight_decay * theta`` to g.
    """

    moments: tuple[str, ...]

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps_adam: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas!r}: expected two numbers in [0, 1)")
        for name, value in (("eps_adam", eps_adam), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value!r}: expected a number >= 0")
        super().__init__(params, {"lr": lr, "betas": betas, "eps_adam": eps_adam, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from ``param.grad``."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update({name: torch.zeros_like(p) for name in self.moments})
                self.move(p, p.grad.add(p, alpha=group["weight_decay"]), state, group)

    @abstractmethod
    def move(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Update the moments in ``state`` and the parameter ``p`` from its gradient ``g``, all in place."""
