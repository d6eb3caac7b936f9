"""The AMSGrad form of Adam that ZO-AdaMM uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class AdaMM(torch.optim.Optimizer):
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  vhat = max(vhat, v);  theta -= lr m / (sqrt(vhat) + eps).

    No bias correction. Source: Chen et al. 2019 (ZO-AdaMM), Algorithm 1.

    Args:
        params: as in any ``torch.optim`` optimizer. lr: learning rate. betas: (b1, b2), both in [0, 1).
        eps_adam: keeps the quotient finite where no gradient was seen. weight_decay: adds ``weight_decay * theta`` to g.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps_adam: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        check_adam(betas, eps_adam, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps_adam": eps_adam, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from ``param.grad``."""
        for group in self.param_groups:
            (b1, b2), eps = group["betas"], group["eps_adam"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = p.grad.add(p, alpha=group["weight_decay"]), self.state[p]
                if not state:
                    state.update({name: torch.zeros_like(p) for name in ("m", "v", "vhat")})
                state["m"].lerp_(g, 1 - b1)
                state["v"].mul_(b2).addcmul_(g, g, value=1 - b2)
                torch.maximum(state["vhat"], state["v"], out=state["vhat"])
                p.addcdiv_(state["m"], state["vhat"].sqrt().add_(eps), value=-group["lr"])


def check_adam(betas: tuple[float, float], eps_adam: float, weight_decay: float) -> None:
    """Refuse hyper-parameters of an Adam-like rule that make no sense."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas!r}: expected two numbers in [0, 1)")
    for name, value in (("eps_adam", eps_adam), ("weight_decay", weight_decay)):
        if value < 0:
            raise ValueError(f"{name}={value!r}: expected a number >= 0")
