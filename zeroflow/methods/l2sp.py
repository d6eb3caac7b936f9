"""L2-SP: stay near the starting point.

Source: Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018, Eq. 4. A task starts
where the previous task ended; the first one starts at the pretrained model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroflow.methods.method import register_method
from zeroflow.methods.penalty import Penalised


@register_method("l2-sp", "as finetune, held near the values that a task starts from")
class L2SP(Penalised):
    """``L_reg = 1/2 |theta - theta_start|^2`` over all values except the head's new rows.

    The published penalty has a second term, weight decay of new values: that is an option of optimizers.
    """

    def _start(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters() if name.startswith("tuning.")}

    def penalty(self) -> Tensor:
        return 0.5 * torch.stack([change.square().sum() for _, change in self.moved()]).sum()
