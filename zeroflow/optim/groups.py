"""Convert the parameters that a user passes into ``torch.optim``'s groups, and check them; prepare the module that has them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, distributed, nn

from zeroflow.optim.executor import Executor

Parameters = nn.Module | Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]] | Iterable[dict[str, Any]]


def parameter_groups(params: Parameters) -> list[dict[str, Any]]:
    """Groups with a list of parameters each, as (name, parameter) where names are known.

    Raises:
        TypeError: something is not a floating-point parameter, or is sharded.
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
            if hasattr(parameter, "device_mesh"):
                raise TypeError(
                    f"params: {name or 'a parameter'} is sharded (DTensor, as of FSDP); expected whole parameters: processes "
                    "share the work by executor=zeroflow.optim.parallel.DistributedExecutor()"
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


BEGINNING = (
    "parameters, seed, queries or kind of optimizer",
    "all must begin alike: call torch.manual_seed before the model is made, or load the same weights",
)
"""What processes that share the work must have in common before the first step, and how; see ``Executor.agree``."""


def check_processes(params: Parameters | None, executor: Executor | None) -> bool:
    """Refuse, or warn of, processes whose parameters would drift apart: no gradient passes through ``backward`` and its hooks.

    Returns:
        Whether there are several processes.

    Raises:
        TypeError: a module wrapped by ``DistributedDataParallel``, in several processes.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    right = "executor=zeroflow.optim.parallel.DistributedExecutor()"
    if isinstance(params, nn.Module) and any(
        isinstance(m, nn.parallel.DistributedDataParallel) for m in params.modules()
    ):
        raise TypeError(
            f"params: DistributedDataParallel adds up what backward() computes, and nothing here calls it; pass the module "
            f"inside it (.module), and {right}"
        )
    if executor is None:
        warnings.warn(
            f"torch.distributed has {distributed.get_world_size()} processes, and this optimizer has no executor: each process "
            f"trains by itself, so their parameters drift apart. Pass {right}, or LocalExecutor() if that is meant",
            stacklevel=4,
        )
    return True


def enable_checkpointing(module: nn.Module | None) -> None:
    """Enable activation checkpointing of a model, by its library's name for that."""
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
        if callable(method := getattr(module, name, None)):
            method()
            return
