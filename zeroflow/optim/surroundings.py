"""Torch modes around a step (inference mode, default device, autocast) apply to the closure, not to the optimizer itself.

A tensor that an optimizer keeps must not depend on the modes that it was created in: in the next step it could not modify an
inference tensor, or one on another device, and autocast would round its own matrix products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch.nn.utils import parametrize

Method = TypeVar("Method", bound=Callable[..., Any])
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Surroundings:
    """The torch modes of a caller.

    Attributes:
        inference: whether inference mode is on.
        device: default device of new tensors.
        autocast: device types with autocast, and its dtype.
    """

    inference: bool = False
    device: torch.device = _CPU
    autocast: tuple[tuple[str, torch.dtype], ...] = ()

    @classmethod
    def here(cls) -> Surroundings:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
        return cls(torch.is_inference_mode_enabled(), torch.get_default_device(), autocast)

    @contextmanager
    def left(self) -> Iterator[None]:
        """Leave the modes."""
        with _inference(False, self.inference), _default(_CPU, self.device), _autocast(False, self.autocast):
            yield

    @contextmanager
    def entered(self, differentiates: bool = False) -> Iterator[None]:
        """Enter the modes again; without inference mode where derivatives are needed, since it has none."""
        inference = self.inference and not differentiates
        with _inference(True, inference), _default(self.device, self.device), _autocast(True, self.autocast):
            yield


@contextmanager
def _inference(mode: bool, switch: bool) -> Iterator[None]:
    if switch:
        with torch.inference_mode(mode), torch.no_grad():
            yield
    else:
        yield


@contextmanager
def _default(device: torch.device, usual: torch.device) -> Iterator[None]:
    if usual.type == "cpu":
        yield
    else:
        with device:
            yield


@contextmanager
def _autocast(enabled: bool, kinds: tuple[tuple[str, torch.dtype], ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, dtype in kinds:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield


def undisturbed(method: Method) -> Method:
    """Decorate a method of an optimizer to run without its caller's modes, which are in ``self.around`` meanwhile."""

    @functools.wraps(method)
    def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
        around = Surroundings.here()
        with around.left():
            self.around, before = around, getattr(self, "around", around)
            try:
                return method(self, *arguments, **named)
            finally:
                self.around = before

    return cast(Method, wrapped)


def forget_copies() -> None:
    """Clear torch's caches of parameters that have changed: autocast's casts, and cached parametrizations."""
    torch.clear_autocast_cache()
    # There is no other way into the cache of torch.nn.utils.parametrize.cached().
    getattr(parametrize, "_cache", {}).clear()
