"""Whether parameters are so large that their own rounding swallows perturbations.

The numbers of a dtype lie the further apart the larger they are: bfloat16's near 16 by 0.125, float32's near 1e5 by 0.008. What is
added to a parameter and smaller than half of that is rounded away, and both evaluations see the same weights. A float32 master
copy does not help, since the model computes with the rounded one. So that is told.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeroflow.optim.composition import Composition
from zeroflow.optim.flat import FlatParameters

_SAMPLE = 2**20


@dataclass
class Swallowed:
    """Looks now and then, and warns once of a parameter of which more than half is not moved by its perturbations.

    It looks at the first step and at ten times the last step it looked at, since values grow; and after changes of what is
    trained, or of eps to less than half.

    Attributes:
        composition: whose perturbations they are.
    """

    composition: Composition
    _told: bool = False
    _next: int = 0
    _seen: tuple[int, torch.dtype | None] | None = None
    _eps: Sequence[float] = ()

    def look(
        self, step: int, flat: FlatParameters, groups: Sequence[Mapping[str, Any]], names: Callable[[], list[str]]
    ) -> None:
        """Look, if it is time to.

        Args:
            step: number of the step that is about to be made.
            flat: the parameters.
            groups: which have them, with their ``"eps_zo"``.
            names: gives the parameters' names, in the order of ``flat``.
        """
        method = self.composition
        if self._told or not (method.check_precision and method.estimator.uses_eps) or method.is_exact(step):
            return
        eps, seen = [float(group["eps_zo"]) for group in groups], (flat.size, flat.half)
        changed = seen != self._seen or any(new < old / 2 for new, old in zip(eps, self._eps, strict=False))
        if step < self._next and not changed:
            return
        self._next, self._seen, self._eps = 10 * max(step, 1), seen, eps
        of = {parameter: size for group, size in zip(groups, eps, strict=True) for parameter in group["params"]}
        named = [
            (name, p, of[p])
            for name, p in zip(names(), flat.parameters, strict=True)
            # Per example a matrix is not displaced itself: the displacement is a product of its own.
            if p.requires_grad and p.numel() and not (method.estimator.per_example and p.ndim == 2)
        ]
        counts = [_beyond(p, _reach(method, flat.size) * size) for _, p, size in named]
        shares = torch.stack(counts).tolist() if counts else []
        deaf = [one for one, share in zip(named, shares, strict=True) if share > one[1].numel() / 2]
        if deaf:
            self._told = True
            unit = _component(method, flat.size)
            warnings.warn(_message(*max(deaf, key=lambda one: one[1].numel()), unit, len(deaf) - 1), stacklevel=7)


def _component(method: Composition, size: int) -> float:
    """Typical size of a direction's components that are not zero."""
    free = max(size * (1 - method.sparsity), 1)
    return 1 / math.sqrt(free) if method.estimator.distribution == "sphere" else 1.0


def _reach(method: Composition, size: int) -> float:
    """How large a direction's components get: of normal ones 5 % are beyond two standard deviations, signs are all alike."""
    alike = method.estimator.distribution in ("rademacher", "coordinate")
    return (1.0 if alike else 2.0) * _component(method, size)


def _beyond(parameter: nn.Parameter, displacement: float) -> torch.Tensor:
    """How many components are so large that a displacement is less than half of the way to the next number."""
    kind = torch.finfo(parameter.dtype)
    ratio = 2 * displacement / kind.eps
    if not 2 * ratio < kind.max:
        return torch.zeros((), dtype=torch.int64, device=parameter.device)
    # Numbers are as far apart from one power of two to the next: the bound is the first one with a distance above.
    size = parameter.detach().abs()
    return torch.count_nonzero((size >= math.ldexp(1.0, math.frexp(ratio)[1])) & size.isfinite())


def _message(name: str, parameter: nn.Parameter, eps: float, unit: float, others: int) -> str:
    values = parameter.detach().reshape(-1)
    some = values[:: max(1, len(values) // _SAMPLE)].abs().float()
    size = float(some[some.isfinite()].median())
    kind = str(parameter.dtype).removeprefix("torch.")
    apart = math.ldexp(torch.finfo(parameter.dtype).eps, math.frexp(size)[1] - 1)
    known = f"parameter {name}" + (f" and {others} more" if others else "")
    finer = "float64" if kind == "float32" else "float32"
    return (
        f"eps={eps:g} hardly moves {known}: its values are about {size:.3g}, where the numbers of {kind} are {apart:.2g} apart, so "
        f"most perturbations are rounded away and little is learnt of it. It would take an eps above {apart / 2 / unit:.2g}, or {finer}; "
        "or leave it out (requires_grad=False). check_precision=False silences this"
    )
