"""Linear layers whose weights are frozen, on the faster kernel."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


class FrozenLinear(nn.Linear):
    """A linear layer that takes oneDNN's kernel while its weights are frozen: the same numbers to float32 rounding.

    ATen's own float32 path calls MKL, which leaves about half the speed of some x86 processors unused
    (``benchmarks/frozen_linear.py``).
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _ONEDNN or self.weight.requires_grad or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        # Nowhere else: a function of its own makes a node of a graph even where nothing asks for one.
        if (torch.is_grad_enabled() and input.requires_grad) or forward_ad._current_level >= 0:
            return cast(Tensor, _Product.apply(input, self.weight, self.bias))
        return _product(input, self.weight, self.bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], ""))


class _Product(torch.autograd.Function):
    """oneDNN's linear layer with frozen weights: differentiable with respect to its input, backwards and forwards."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradients[0].contiguous(), weight.t(), None), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return _product(tangents[0], weight, None)


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
