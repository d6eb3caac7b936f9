"""All trainable parameters as one flat float32 (or float64) vector, so that a perturbation is one fused operation.

Where the parameters have that precision themselves, their storages become views of the vector. Half-precision parameters
keep their storages; the vector is then their master copy: perturbations and updates are made in float32 and rounded on
the way into the model, so that a step smaller than the rounding is not lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

_FULL, _HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)


class FlatParameters:
    """One vector ``vector`` ``[d]`` that holds all parameters, in the order given.

    Args:
        parameters: trainable floating-point parameters on one device; half precision may be mixed with float32, float64
            only with itself.

    Attributes:
        masters: what an update rule works on: the slices of the vector in the parameters' shapes, in the same order.
        half: the lowest precision among the parameters, or None.

    Raises:
        ValueError: no parameters, or dtypes or devices that cannot stand in one vector.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            raise ValueError("params: expected at least one parameter that requires a gradient, found none")
        kinds, devices = {p.dtype for p in parameters}, {p.device for p in parameters}
        if len(devices) > 1:
            raise ValueError(f"params: expected one device, found {sorted(map(str, devices))}")
        if kinds - {*_FULL, *_HALF} or (torch.float64 in kinds and len(kinds) > 1):
            raise ValueError(f"params: expected float32, bfloat16, float16 or only float64, found {_names(kinds)}")
        self.parameters = list(parameters)
        self.half = next((kind for kind in _HALF if kind in kinds), None)
        self.vector = torch.cat([p.detach().reshape(-1).to(self._dtype(kinds)) for p in parameters])
        self.masters = [nn.Parameter(view, requires_grad=False) for view in self.views(self.vector)]
        self._adopt()

    @staticmethod
    def _dtype(kinds: set[torch.dtype]) -> torch.dtype:
        return torch.float64 if torch.float64 in kinds else torch.float32

    @property
    def size(self) -> int:
        """Number of scalars, d."""
        return self.vector.numel()

    def slices(self) -> Iterator[tuple[nn.Parameter, slice]]:
        """Each parameter with its place in the vector."""
        first = 0
        for parameter in self.parameters:
            yield parameter, slice(first, first + parameter.numel())
            first += parameter.numel()

    def views(self, vector: Tensor) -> list[Tensor]:
        """Slices of ``vector`` ``[d]`` in the shapes of the parameters, sharing its memory."""
        return [vector[place].view(parameter.shape) for parameter, place in self.slices()]

    @torch.no_grad()
    def show(self, vector: Tensor | None = None) -> None:
        """Let the model's parameters be ``vector`` ``[d]``, rounded where they are half precision; default: its own."""
        if self.half is None:
            if vector is not None:
                self.vector.copy_(vector)
            return
        for parameter, view in zip(self.parameters, self.views(self.vector if vector is None else vector), strict=True):
            parameter.copy_(view)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what others did to the parameters since: new storages (``module.to``), new values."""
        if self.half is not None:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                moved = parameter != master.to(parameter.dtype)
                if moved.any():
                    master.copy_(torch.where(moved, parameter.to(master.dtype), master))
            return
        origin = self.vector.untyped_storage().data_ptr()
        if any(p.untyped_storage().data_ptr() != origin for p in self.parameters):
            self.vector = torch.cat([p.detach().reshape(-1) for p in self.parameters])
            self._adopt()

    @torch.no_grad()
    def _adopt(self) -> None:
        for parameter, master, view in zip(self.parameters, self.masters, self.views(self.vector), strict=True):
            master.data = view
            if self.half is None:
                parameter.data = view


def _names(kinds: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
