"""All trainable parameters as one flat float32 (or float64) vector, so that a perturbation is one fused operation.

The vector is the master copy: perturbations and updates are applied to it and written into the model's own parameters, which
keep their storages, layouts and dtypes (so they can be saved, tied, shared and moved as usual). A step smaller than the
rounding of a half-precision parameter is not lost, and a perturbation is undone exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from zeroflow.optim.surroundings import forget_copies

_FULL, _HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)


class FlatParameters:
    """One vector ``vector`` ``[d]`` that holds all parameters, in the order given.

    Args:
        parameters: trainable floating-point parameters on one device; half precision may be mixed with float32, float64
            only with itself.

    Attributes:
        masters: what an update rule modifies: the slices of the vector in the parameters' shapes, in the same order.
        half: the lowest precision among the parameters, or None.

    Raises:
        ValueError: there are no parameters, their dtypes or devices do not fit into one vector, or two share memory.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        if not sum(p.numel() for p in parameters):
            raise ValueError("params: expected at least one parameter that requires a gradient, found none")
        kinds, devices = {p.dtype for p in parameters}, {p.device for p in parameters}
        if len(devices) > 1:
            raise ValueError(f"params: expected one device, found {', '.join(sorted(map(str, devices)))}")
        if kinds - {*_FULL, *_HALF} or (torch.float64 in kinds and len(kinds) > 1):
            raise ValueError(f"params: expected float32, bfloat16, float16 or only float64, found {_names(kinds)}")
        _refuse_shared_memory(parameters)
        self.parameters = list(parameters)
        self.half = next((kind for kind in _HALF if kind in kinds), None)
        dtype = torch.float64 if torch.float64 in kinds else torch.float32
        self.vector = torch.cat([p.detach().reshape(-1).to(dtype) for p in parameters])
        self.masters = [nn.Parameter(view, requires_grad=False) for view in self.views(self.vector)]
        self._kinds = self._seen()
        self._made_in_inference = any(p.is_inference() for p in parameters)

    def bind(self) -> None:
        """Make the masters slices of the vector again, since a deep copy does not preserve that."""
        for master, view in zip(self.masters, self.views(self.vector), strict=True):
            master.data = view

    @property
    def size(self) -> int:
        """Number of scalars, d."""
        return self.vector.numel()

    @property
    def outdated(self) -> bool:
        """Whether a parameter's dtype, device or shape has changed since (``module.half()``, ``module.to(...)``)."""
        return self._kinds != self._seen()

    def sample(self) -> bytes:
        """Bytes that tell other parameters from these: how many there are, and some of their values."""
        some = self.vector[:: max(1, self.size // 2**16)]
        return b"%d " % self.size + some.cpu().numpy().tobytes()

    def slices(self) -> Iterator[tuple[nn.Parameter, slice]]:
        """Each parameter with its place in the vector."""
        first = 0
        for parameter in self.parameters:
            yield parameter, slice(first, first + parameter.numel())
            first += parameter.numel()

    def filled(self, value: Callable[[nn.Parameter], float]) -> Tensor:
        """A vector ``[d]`` with one number for all components of a parameter."""
        found = torch.empty_like(self.vector)
        for parameter, place in self.slices():
            found[place] = value(parameter)
        return found

    def views(self, vector: Tensor) -> list[Tensor]:
        """Slices of ``vector`` ``[d]`` in the shapes of the parameters, sharing its memory."""
        shapes = [parameter.shape for parameter in self.parameters]
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def show(self, vector: Tensor | None = None) -> None:
        """Write ``vector`` ``[d]`` into the model's parameters, rounded if in half precision; default: the masters."""
        # Parameters that were made in inference mode change only there.
        with torch.inference_mode() if self._made_in_inference else torch.no_grad():
            torch._foreach_copy_(tuple(self.parameters), tuple(self.views(self.vector if vector is None else vector)))
        forget_copies()

    @torch.no_grad()
    def refresh(self) -> bool:
        """Read back parameters that were changed from outside, such as by a loaded state dict; returns whether any were."""
        changed = False
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            shown = master if parameter.dtype == master.dtype else master.to(parameter.dtype)
            if not torch.equal(parameter, shown):
                master.copy_(torch.where(parameter == shown, master, parameter.to(master.dtype)))
                changed = True
        return changed

    def _seen(self) -> list[tuple[torch.dtype, torch.device, torch.Size]]:
        return [(p.dtype, p.device, p.shape) for p in self.parameters]


def _refuse_shared_memory(parameters: Sequence[nn.Parameter]) -> None:
    """Two parameters that share a number would each train it: the last one would win."""
    sharing: dict[tuple[int, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.numel() and isinstance(parameter, nn.Parameter) and parameter.device.type != "meta":
            sharing.setdefault((parameter.untyped_storage().data_ptr(), parameter.dtype), []).append(parameter)
    for members in sharing.values():
        if len(members) == 1:
            continue
        ends = [
            p.storage_offset() + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) for p in members
        ]
        taken = torch.zeros(max(ends) + 1, dtype=torch.bool)
        for parameter in members:
            place = taken.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
            if place.any():
                raise ValueError(
                    f"params: a parameter of shape {tuple(parameter.shape)} shares memory with another one; to tie layers give "
                    "them one and the same parameter (head.weight = embedding.weight)"
                )
            place.fill_(True)


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """A parameter as a matrix: ``[m, all other dimensions]``; one row where it has fewer than two."""
    rows = parameter.shape[0] if parameter.ndim > 1 else 1
    return rows, parameter.numel() // max(rows, 1)


def _names(kinds: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
