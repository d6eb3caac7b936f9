"""Whether a loss is computed precisely enough for a finite difference to mean anything.

A perturbation of size eps changes the loss by about eps; a forward pass in half precision rounds it by about the dtype's
machine epsilon (bfloat16 0.0078, float16 0.00098, relative). Below that the difference is rounding noise and training
walks at random, without any error. So a smaller eps is refused. What the rounding of large parameters does to perturbations is told
by ``zeroflow.optim.swallowed``.
"""

from __future__ import annotations

import ctypes
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zeroflow.errors import ConfigError
from zeroflow.optim.closure import Closure

_HALF = (torch.bfloat16, torch.float16)
_PRODUCTS = ("mm", "mv", "dot", "linear", "conv", "attention", "embedding", "rnn", "lstm", "gru")


class PrecisionWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how a loss is computed in ``with watch:``.

    Attributes:
        half: ``torch.bfloat16`` or ``torch.float16`` if any layer's product (matrix, convolution, attention, recurrence) was of half
            precision, else None.
        compiled: whether code of ``torch.compile`` was called. Where anybody looks on it falls back to torch's own kernels.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.half: torch.dtype | None = None
        self.compiled = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.compiled = self.compiled or _inside_compiled(sys._getframe())
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) and result else result
        if half_precision(first) is not None and any(part in func.__name__ for part in _PRODUCTS):
            self.half = half_precision(first)
        return result


def _inside_compiled(frame: FrameType | None) -> bool:
    """Whether a frame is of a call to what ``torch.compile`` returned."""
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return True
        frame = frame.f_back
    return False


class AskAgain(Exception):
    """An answer does not count: the closure has to be asked once more."""


def watched(closure: Closure) -> tuple[Any, torch.dtype | None, bool]:
    """A closure's answer, the half precision that it computes in, if it does, and whether the answer counts.

    It does not where ``torch.compile`` has a part in it: torch's own kernels draw other random numbers than compiled ones, so its
    dropout masks are not those of the evaluations that follow.
    """
    answer: Any = None
    try:
        with PrecisionWatch() as watch:
            answer = closure()
    except Exception:
        if not watch.compiled:  # such code may also refuse to run where anybody looks on
            raise
    return answer, watch.half or half_precision(answer), not watch.compiled


def half_precision(value: Any) -> torch.dtype | None:
    """A value's dtype if it is a half-precision tensor."""
    return value.dtype if isinstance(value, Tensor) and value.dtype in _HALF else None


def rounding(answer: Any) -> float:
    """Relative rounding error of a closure's answer; 0: unknown.

    A number in double precision that single precision has too was computed in that (as by ``float(loss)``): of truly double
    ones it is one in 2^29. Whole numbers tell nothing, as they are in both.
    """
    if isinstance(answer, Tensor):
        if not answer.is_floating_point():
            return 0.0
        if answer.dtype != torch.float64 or not answer.numel():
            return float(torch.finfo(answer.dtype).eps)
        answer = answer.detach().as_subclass(Tensor).reshape(-1)[-1].item()
    elif hasattr(answer, "dtype") and hasattr(answer, "item") and getattr(answer, "size", 1) == 1:
        answer = answer.item()  # NumPy's
    if not isinstance(answer, float):
        return 0.0
    single = ctypes.c_float(answer).value == answer and not answer.is_integer()
    return float(torch.finfo(torch.float32 if single else torch.float64).eps)


def smallest_eps(half: torch.dtype) -> float:
    """The smallest sensible perturbation size where losses are computed in ``half``: its machine epsilon."""
    return float(torch.finfo(half).eps)


def check_eps(eps: float, half: torch.dtype) -> None:
    """Refuse an ``eps`` that half precision swallows.

    Raises:
        ConfigError: with the reason and the smallest sensible eps.
    """
    least = smallest_eps(half)
    if eps < least:
        name = str(half).removeprefix("torch.")
        raise ConfigError(
            f"eps={eps:g} is too small for a loss computed in {name}: its rounding, about {least:.2g} of every value, "
            f"swallows the difference; the smallest sensible eps is {least:.2g} (or evaluate in float32, or give "
            "check_precision=False where only frozen parts are that coarse)"
        )
