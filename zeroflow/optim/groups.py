"""Convert the parameters that a user passes into ``torch.optim``'s groups, and check them; prepare the module that has them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

Parameters = nn.Module | Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]] | Iterable[dict[str, Any]]


def parameter_groups(params: Parameters) -> list[dict[str, Any]]:
    """Groups with a list of parameters each, as (name, parameter) where names are known.

    Raises:
        TypeError: something is not a floating-point parameter.
        ValueError: there are no parameters, one is frozen or given twice, or a number of a group is out of range.
    """
    if isinstance(params, nn.Module):
        params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(f"params: expected a module, parameters or groups, got a single {type(params).__name__}")
    items: list[Any] = list(params)
    if not items:
        raise ValueError("params: expected at least one parameter that requires a gradient, found none")
    groups = [dict(group) for group in (items if isinstance(items[0], dict) else [{"params": items}])]
    seen: set[int] = set()
    for number, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f"params: group {number} has no 'params', only {', '.join(map(repr, group))}")
        members = group["params"]
        group["params"] = [members] if isinstance(members, Tensor) else list(members)
        for item in group["params"]:
            name, parameter = item if isinstance(item, tuple) else ("", item)
            if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
                found = str(parameter.dtype) if isinstance(parameter, Tensor) else type(parameter).__name__
                raise TypeError(
                    f"params: expected floating-point parameters, found {f'{name} of ' if name else ''}{found}"
                )
            if not parameter.requires_grad:
                raise ValueError(f"params: {name or 'a parameter'} is frozen (requires_grad=False); leave it out")
            if id(parameter) in seen:
                raise ValueError(f"params: {name or 'a parameter'} is given twice")
            seen.add(id(parameter))
        if "eps" in group:  # what everybody writes; the key is another one because Adam's own is "eps"
            group["eps_zo"] = group.pop("eps")
        for key in ("lr", "eps_zo"):
            value = group.get(key)
            if value is None or isinstance(value, Tensor):
                continue
            right = (
                isinstance(value, int | float) and math.isfinite(value) and (value > 0 or (key == "lr" and value == 0))
            )
            if not right:
                raise ValueError(
                    f"params: {key}={value!r} of a group: expected a number {'>=' if key == 'lr' else '>'} 0"
                )
    return groups


def enable_checkpointing(module: nn.Module | None) -> None:
    """Enable activation checkpointing of a model, by its library's name for that."""
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
        if callable(method := getattr(module, name, None)):
            method()
            return
