"""An int8 backbone: weights and activations of every linear layer in eight bits, on torch's quantised CPU kernels.

Each weight row and each activation row (a token) has its own scale, computed from the row itself: there is no calibration, and
an image's features do not depend on the other images. Patch embedding, norms and attention products stay float32.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from zeroflow.errors import ConfigError
from zeroflow.models.backbone import Backbone


class Int8Linear(nn.Module):
    """``x W^T + b`` with ``x`` and ``W`` rounded to int8, row by row: exact integer products, summed in 32 bits.

    Args:
        layer: the layer to quantise; its float weights are not kept.

    Raises:
        ConfigError: this build of torch has no int8 kernels for this processor.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        if not {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines):
            raise ConfigError("access='int8': torch has no int8 linear kernel for this processor; expected x86")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        weight = layer.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).double()
        zero = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch announces the end of quantised tensors, which only pack weights here
            rounded = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.nbytes = weight.numel() + 8 * len(weight)
        # Without VNNI, pairs of products are summed in 16 bits, which the full range would overflow.
        self.top = 127 if torch.cpu._is_vnni_supported() else 63

    def unseen_weights(self) -> dict[str, Tensor]:
        """The packed weights, which are not tensors of the module: integers and their scales."""
        packed, _ = torch.ops.quantized.linear_unpack(self.packed)
        return {"packed": packed.int_repr(), "scales": packed.q_per_channel_scales()}

    def forward(self, values: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``.

        Raises:
            RuntimeError: a gradient is required; there is none.
        """
        if torch.is_grad_enabled() and values.requires_grad:
            raise RuntimeError("an int8 layer has no derivative; evaluate it under torch.no_grad()")
        largest = values.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        found: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            values / largest, 1 / self.top, self.top + 1, self.packed
        )
        return found * largest if self.bias is None else torch.addcmul(self.bias, found, largest)


def quantised(backbone: Backbone) -> Backbone:
    """Replace every linear layer of a backbone by an ``Int8Linear``, in place; returns the backbone."""
    unseen = 0
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                layer = Int8Linear(child)
                setattr(module, name, layer)
                unseen += layer.nbytes
    backbone.unseen_bytes = unseen
    return backbone
