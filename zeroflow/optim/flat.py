"""All trainable parameters as one flat vector, so that a perturbation is one fused operation.

Every parameter's storage becomes a view of the vector. Values stay; sharing ends only if somebody gives a parameter a new
storage (``module.to(...)``), which is noticed at the next step and mended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class FlatParameters:
    """One vector ``live`` ``[d]`` whose slices are the parameters' storages, in the order given.

    Args:
        parameters: trainable parameters of one floating dtype on one device.

    Raises:
        ValueError: no parameters, or more than one dtype or device among them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            raise ValueError("params: expected at least one parameter that requires a gradient, found none")
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) > 1:
            raise ValueError(f"params: expected one dtype and device, found {sorted(map(str, kinds))}")
        if parameters[0].dtype not in (torch.float32, torch.float64):
            # A perturbation of the usual size is lost in the rounding of a half-precision parameter.
            raise ValueError(f"params: expected float32 or float64 parameters, found {parameters[0].dtype}")
        self.parameters = list(parameters)
        self._adopt()

    @property
    def size(self) -> int:
        """Number of scalars, d."""
        return self.live.numel()

    def slices(self) -> Iterator[tuple[nn.Parameter, slice]]:
        """Each parameter with its place in the vector."""
        first = 0
        for parameter in self.parameters:
            yield parameter, slice(first, first + parameter.numel())
            first += parameter.numel()

    def views(self, vector: Tensor) -> list[Tensor]:
        """Slices of ``vector`` ``[d]`` in the shapes of the parameters, sharing its memory."""
        return [vector[place].view_as(parameter) for parameter, place in self.slices()]

    def refresh(self) -> None:
        """Adopt the parameters anew if one has been given another storage since."""
        origin = self.live.untyped_storage().data_ptr()
        if any(p.untyped_storage().data_ptr() != origin for p in self.parameters):
            self._adopt()

    @torch.no_grad()
    def _adopt(self) -> None:
        self.live = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        for parameter, view in zip(self.parameters, self.views(self.live), strict=True):
            parameter.data = view
