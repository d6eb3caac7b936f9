"""Convert the parameters that a user passes into ``torch.optim``'s groups, and check them; prepare the module that has them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy

from zeroflow.optim.executor import Executor
from zeroflow.optim.flat import FlatParameters

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
            _refuse_strange(name or "a parameter", parameter)
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


def _refuse_strange(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that is not one tensor with a number of its own for every component."""
    if hasattr(parameter, "device_mesh"):
        raise TypeError(
            f"params: {name} is sharded (DTensor, as of FSDP); expected whole parameters: processes share the work by "
            "executor=zeroflow.optim.parallel.DistributedExecutor()"
        )
    if is_lazy(parameter):
        raise TypeError(f"params: {name} has no shape yet, as its module is lazy; run the module once before")
    if parameter.layout is not torch.strided:
        kind = str(parameter.layout).removeprefix("torch.")
        raise TypeError(f"params: {name} has the layout {kind}; expected a dense tensor")
    if any(not stride and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
        raise TypeError(
            f"params: {name} is expanded, so that several components are one number; expected a tensor of its own"
        )


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
        TypeError: a module wrapped by ``DistributedDataParallel`` or ``FullyShardedDataParallel``, in several processes.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    right = "executor=zeroflow.optim.parallel.DistributedExecutor()"
    kinds = {_wrapped_by(m) for m in params.modules()} if isinstance(params, nn.Module) else set()
    if "DistributedDataParallel" in kinds:
        raise TypeError(
            f"params: DistributedDataParallel adds up what backward() computes, and nothing here calls it; pass the module "
            f"inside it (.module), or one to which replicate() was not applied, and {right}"
        )
    if "FullyShardedDataParallel" in kinds:
        raise TypeError(
            f"params: FullyShardedDataParallel keeps a part of the parameters in each process, whose directions would be the same "
            f"for all parts; expected whole parameters: processes share the work by {right}"
        )
    if executor is None:
        warnings.warn(
            f"torch.distributed has {distributed.get_world_size()} processes, and this optimizer has no executor: each process "
            f"trains by itself, so their parameters drift apart. Pass {right}, or LocalExecutor() if that is meant",
            stacklevel=4,
        )
    return True


_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "DDP": "DistributedDataParallel",  # a base that ``replicate`` gives to a module's class
    "FullyShardedDataParallel": "FullyShardedDataParallel",
}


def _wrapped_by(module: nn.Module) -> str | None:
    """Which of torch's wrappers a module is; None for any other one."""
    bases = (base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch."))
    return next((_WRAPPERS[name] for name in bases if name in _WRAPPERS), None)


def enable_checkpointing(module: nn.Module | None) -> None:
    """Enable activation checkpointing of a model, by its library's name for that."""
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
        if callable(method := getattr(module, name, None)):
            method()
            return


def trained_components(
    module: nn.Module | None, flat: FlatParameters, mask: Tensor | None, *, exact: bool
) -> Tensor | None:
    """Components that a step trains as ones and zeros ``[d]``, None for all.

    Args:
        module: the parameters' own, where it is known.
        flat: the parameters; those frozen since are not trained.
        mask: of ``sparsity``, where there is one.
        exact: whether the step has the exact gradient, which torch makes zero for an embedding's padding vector; without it, such
            vectors are left out here.
    """
    padding = [] if exact or module is None else list(_padding_places(module, flat))
    if all(p.requires_grad for p in flat.parameters) and not padding:
        return mask
    free = flat.filled(lambda p: float(p.requires_grad))
    for place in padding:
        free[place] = 0.0
    return free if mask is None else free.mul_(mask)


def warn_of_untrained(module: nn.Module | None, flat: FlatParameters) -> bool:
    """Warn of parameters of the module that the optimizer was given which have come, or require gradients, since; whether it did."""
    if module is None:
        return False
    known = set(map(id, flat.parameters))
    others = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in known]
    if others:
        named = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        warnings.warn(
            f"the module has parameters that this optimizer was not given when it was made and does not train: {named}; "
            "optimizer.add_param_group adds them",
            stacklevel=5,
        )
    return bool(others)


def _padding_places(module: nn.Module, flat: FlatParameters) -> Iterator[slice]:
    """Where the vectors of a module's embeddings lie that stand for padding; of a tied weight none, which others read too."""
    embeddings = [
        part
        for part in module.modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.padding_idx is not None
    ]
    if not embeddings:
        return  # as of nearly all modules, in every step
    places = {id(parameter): place for parameter, place in flat.slices()}
    users = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)
    for part in embeddings:
        if id(part.weight) in places and users[id(part.weight)] == 1:
            start = places[id(part.weight)].start + (part.padding_idx or 0) * part.embedding_dim
            yield slice(start, start + part.embedding_dim)


def refuse_renormalised(module: nn.Module | None) -> None:
    """Refuse embeddings that shorten their vectors in a forward pass: an evaluation leaves parameters as they are.

    Raises:
        TypeError: there is one that is trained.
    """
    for name, part in () if module is None else module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None and part.weight.requires_grad:
            raise TypeError(
                f"params: {name or 'the module'} has max_norm={part.max_norm}, by which a forward pass shortens its vectors; "
                "expected an embedding without it (shorten vectors after a step, or freeze it)"
            )
