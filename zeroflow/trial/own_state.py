"""Whether a method or a classifier of somebody's own goes on after an interruption as if there had been none.

What it keeps in buffers, parameters and modules is saved with every finished task; a plain attribute is not. Before the second and
the third task, a twin takes up the work where an interrupted cell would. Where it differs, the cell is refused: an interruption
would change its numbers, and nobody would see it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zeroflow.errors import ConfigError
from zeroflow.methods import Method

TASKS = range(1, 3)
"""The tasks before which twins are compared."""

_OF_THE_LIBRARY = frozenset(
    [*vars(nn.Module()), "backbone", "options", "criterion", "images_passed", "images_worked", "frozen_spaces"]
)
"""Attributes that every method has."""


def is_own(method: Method) -> bool:
    """Whether a method, or the classifier that it asks, is of somebody's own."""
    return next(_parts(method), None) is not None


@contextmanager
def undisturbed_randomness() -> Iterator[None]:
    """torch's random numbers go on outside as if nothing had been drawn inside."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def check_resumable(method: Method, twin: Method, begin: Callable[[], None]) -> None:
    """Let a twin begin the task that a method has begun, and refuse plain attributes in which they differ then.

    Args:
        method: has begun the task.
        twin: took over its state of before.
        begin: has the twin begin it.

    Raises:
        ConfigError: which class and attribute, and what to write.
    """
    own = (
        "what lasts from task to task must be a buffer, self.register_buffer({!r}, ...): a plain attribute is not saved"
    )
    try:
        with undisturbed_randomness():
            begin()
    except Exception as error:
        name = getattr(error, "name", None) or "name"
        raise ConfigError(
            f"{type(method).__name__}: after an interruption it could not begin a task: {type(error).__name__}: {error}; "
            + own.format(name)
        ) from error
    for part, other in zip(_parts(method), _parts(twin), strict=True):
        mine, theirs = _plain(part), _plain(other)
        for name in mine:
            if name not in theirs or not _same(mine[name], theirs[name]):
                raise ConfigError(
                    f"{type(part).__name__}.{name} would be lost where a cell is interrupted; {own.format(name)}"
                )


def check_frozen(method: Method, trainable: Mapping[str, nn.Parameter]) -> None:
    """Refuse to train the backbone itself: it counts as frozen, so that its weights are not saved and its features are kept.

    Raises:
        ConfigError: which parameters, and what to do.
    """
    frozen = set(map(id, method.backbone.parameters()))
    if named := [name for name, value in trainable.items() if id(value) in frozen]:
        raise ConfigError(
            f"{type(method).__name__} trains {named[0]}{f' and {len(named) - 1} more' if named[1:] else ''} of the backbone itself, "
            "which counts as frozen; train a copy, as method_options: {tune: full} of finetune does"
        )


def trained_modules(method: Method, trainable: Mapping[str, nn.Parameter]) -> nn.ModuleList:
    """The parts of a method that are trained, whose buffers (batch norm's statistics) move with the parameters, once a step.

    The frozen backbone, a classifier without trained values, and constants (buffers that are not persistent) do not move in a step.
    """
    trained = set(map(id, trainable.values()))
    return nn.ModuleList(
        part
        for part in method.children()
        if part is not method.backbone
        and any(id(value) in trained for value in part.parameters())
        and part.state_dict().keys() - dict(part.named_parameters(remove_duplicate=False)).keys()
    )


def _parts(method: Method) -> Iterator[nn.Module]:
    for part in (method, getattr(method, "classifier", None)):
        if part is not None and not type(part).__module__.startswith("zeroflow."):
            yield part


def _plain(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if name not in _OF_THE_LIBRARY}


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, as far as can be told: objects by their attributes, sources of random numbers by their state."""
    if one is other:
        return True
    if isinstance(one, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        return type(one) is type(other) and _same(_state(one), _state(other))
    if isinstance(one, Tensor | np.ndarray):
        if type(one) is not type(other) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        return _bytes(one) == _bytes(other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, int | float | complex | str | bytes | bool | range | set | frozenset | None):
        return bool(one == other)
    if type(one) is not type(other):
        return False
    return callable(one) or not hasattr(one, "__dict__") or isinstance(one, nn.Module) or _same(vars(one), vars(other))


def _bytes(value: Tensor | np.ndarray[Any, Any]) -> bytes:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return value.tobytes()


def _state(source: Any) -> Any:
    if isinstance(source, torch.Generator):
        return source.get_state()
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.getstate() if isinstance(source, random.Random) else source.get_state()
