"""Adam whose second moment is that of the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zeroflow.optim.updates.adamm import check_adam


class RAdaZO(torch.optim.Optimizer):
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) m^2;  theta -= lr m / sqrt(v + eps).

    v follows the averaged estimate instead of the noisy one, so that its noise does not shrink every step. No bias
    correction. Source: Shu et al. 2025 (R-AdaZO), Algorithm 1.

    Args:
        params: as in any ``torch.optim`` optimizer. lr: learning rate. betas: (b1, b2), both in [0, 1).
        eps_adam: inside the root. weight_decay: adds ``weight_decay * theta`` to g.
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
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = p.grad.add(p, alpha=group["weight_decay"]), self.state[p]
                if not state:
                    state.update({name: torch.zeros_like(p) for name in ("m", "v")})
                state["m"].lerp_(g, 1 - b1)
                state["v"].mul_(b2).addcmul_(state["m"], state["m"], value=1 - b2)
                p.addcdiv_(state["m"], (state["v"] + group["eps_adam"]).sqrt_(), value=-group["lr"])
