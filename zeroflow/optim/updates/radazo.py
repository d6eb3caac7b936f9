"""Adam whose second moment is that of the first."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zeroflow.optim.updates.adamlike import AdamLike


class RAdaZO(AdamLike):
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) m^2;  theta -= lr m / sqrt(v + eps).

    v follows the averaged estimate instead of the noisy one, so that its noise does not shrink every step. No bias
    correction. Source: Shu et al. 2025 (R-AdaZO), Algorithm 1.
    """

    moments = ("m", "v")

    def move(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        b1, b2 = group["betas"]
        state["m"].lerp_(g, 1 - b1)
        state["v"].mul_(b2).addcmul_(state["m"], state["m"], value=1 - b2)
        p.addcdiv_(state["m"], (state["v"] + group["eps_adam"]).sqrt_(), value=-group["lr"])
