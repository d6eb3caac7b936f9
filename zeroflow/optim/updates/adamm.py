"""The AMSGrad form of Adam that ZO-AdaMM uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zeroflow.optim.updates.adamlike import AdamLike


class AdaMM(AdamLike):
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  vhat = max(vhat, v);  theta -= lr m / (sqrt(vhat) + eps).

    No bias correction. Source: Chen et al. 2019 (ZO-AdaMM), Algorithm 1.
    """

    moments = ("m", "v", "vhat")

    def move(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        b1, b2 = group["betas"]
        state["m"].lerp_(g, 1 - b1)
        state["v"].mul_(b2).addcmul_(g, g, value=1 - b2)
        torch.maximum(state["vhat"], state["v"], out=state["vhat"])
        p.addcdiv_(state["m"], state["vhat"].sqrt().add_(group["eps_adam"]), value=-group["lr"])
