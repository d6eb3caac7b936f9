"""The gradient ban: inside it a graph cannot be built, not even by accident.

``torch.no_grad()`` prevents graphs until somebody switches them on again; this finds whoever does. It watches the two places
that every derivative of reverse mode goes through: where autograd makes a node of a graph, and where its engine starts.
Nothing is watched operation by operation, so a forward pass is as fast as without.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd
import torch.fx.traceback


class GradientBanned(RuntimeError):
    """Something wanted a gradient where gradients are banned."""


_here = threading.local()
"""``depth``: bans around this thread's code."""

_lock = threading.Lock()
_everywhere = 0


@contextmanager
def gradient_ban() -> Iterator[None]:
    """Let nothing in this thread be differentiated backwards.

    Raising inside: an operation that would be recorded in an autograd graph (a forward pass with trainable parameters outside
    ``torch.no_grad()``, whoever switched gradients on), and any backward call, also on a graph from outside. Forward passes
    under ``torch.no_grad()`` and forward-mode differentiation go on as ever; so does what works with values alone that require
    no gradient, except a ``torch.autograd.Function``, which makes its node regardless. Bans nest; it serves as a decorator too.

    Raises:
        GradientBanned: where it happens, with that place in its traceback.
    """
    _begin()
    _here.depth = _depth() + 1
    try:
        yield
    finally:
        _here.depth -= 1
        _end()


def banned() -> bool:
    """Whether gradients are banned in this thread."""
    return _depth() > 0


def _depth() -> int:
    return getattr(_here, "depth", 0)


def _begin() -> None:
    global _everywhere, _outside
    with _lock:
        if not _everywhere:
            # In anomaly mode autograd asks for the Python stack of every node that it makes, before it makes it.
            _outside = (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled())
            torch.autograd.set_detect_anomaly(True, check_nan=_outside[1])
        _everywhere += 1


def _end() -> None:
    global _everywhere
    with _lock:
        _everywhere -= 1
        if not _everywhere:
            torch.autograd.set_detect_anomaly(*_outside)


_outside = (False, True)
_format_stack = torch.fx.traceback.format_stack
_run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]


def _node_made() -> list[str]:
    # A function of its own (autograd.Function) has a node even where no graph is built.
    if banned() and torch.is_grad_enabled():
        raise GradientBanned(
            "an autograd graph would be built inside a gradient ban: a forward pass with values that require gradients; "
            "put it under torch.no_grad()"
        )
    return _format_stack()


def _backward_called(*arguments: Any, **named: Any) -> Any:
    if banned():
        raise GradientBanned("a backward pass was asked for inside a gradient ban")
    return _run_backward(*arguments, **named)


torch.fx.traceback.format_stack = _node_made
torch.autograd._engine_run_backward = _backward_called  # type: ignore[attr-defined]
