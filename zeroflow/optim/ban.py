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
import torch.fx.traceback
from torch.autograd import Variable


class GradientBanned(RuntimeError):
    """Something wanted a gradient where gradients are banned."""


_here = threading.local()
"""``depth``: bans around this thread's code."""

_lock = threading.Lock()
_everywhere = 0


@contextmanager
def gradient_ban() -> Iterator[None]:
    """Let nothing in this thread be differentiated backwards; other threads, also those started inside, are free.

    Raising inside: an operation that would be recorded in an autograd graph (a forward pass with trainable parameters outside
    ``torch.no_grad()``, whoever switched gradients on), and any backward call, also on a graph from outside. Forward passes
    under ``torch.no_grad()`` and forward-mode differentiation go on as ever; so does what works with values alone that require
    no gradient, except a ``torch.autograd.Function``, which makes its node regardless. Bans nest; it serves as a decorator too.

    The watch is autograd's anomaly mode, which stays on inside; who asks torch for it is told what it would be without a ban, and
    what is set inside holds from the end on. Not seen: who starts the engine in C++ on a graph from outside (TorchScript,
    ``torch.distributed.autograd``, an engine object of ``torch._C``), and who switches the mode off in ``torch._C``.

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
    global _everywhere, _asked
    with _lock:
        if not _everywhere:
            _asked = (_is_on(), _checks_nan())
        _everywhere += 1
        _set_watch()


def _end() -> None:
    global _everywhere
    with _lock:
        _everywhere -= 1
        _set_watch()


_asked = (False, True)
"""Anomaly mode, and whether it looks for nan, as they would be without bans; kept while there are any."""

_format_stack = torch.fx.traceback.format_stack
_set_mode, _is_on, _checks_nan = torch.set_anomaly_enabled, torch.is_anomaly_enabled, torch.is_anomaly_check_nan_enabled


def _set_watch() -> None:
    # In anomaly mode autograd asks for the Python stack of every node that it makes, before it makes it. The mode is the whole
    # process's: backward passes of free threads stay as they are unless somebody asked for it.
    on, check_nan = _asked
    _set_mode(*((True, on and check_nan) if _everywhere else _asked))


def _node_made() -> list[str]:
    # A function of its own (autograd.Function) has a node even where no graph is built.
    if banned() and torch.is_grad_enabled():
        raise GradientBanned(
            "an autograd graph would be built inside a gradient ban: a forward pass with values that require gradients; "
            "put it under torch.no_grad()"
        )
    return _format_stack()


def _mode_asked(enabled: bool, check_nan: bool = True) -> None:
    # What is switched off inside a ban is off behind it, whichever of the two ends first.
    global _asked
    with _lock:
        _asked = (enabled, check_nan)
        _set_watch()


def _mode() -> tuple[bool, bool]:
    with _lock:
        return _asked if _everywhere else (_is_on(), _checks_nan())


class _Engine(type(Variable._execution_engine)):  # type: ignore[misc]
    """Autograd's engine as Python sees it; there is only one behind all such objects."""

    def run_backward(self, *arguments: Any, **named: Any) -> Any:
        if banned():
            raise GradientBanned("a backward pass was asked for inside a gradient ban")
        return super().run_backward(*arguments, **named)


torch.fx.traceback.format_stack = _node_made
torch.set_anomaly_enabled = _mode_asked
torch.is_anomaly_enabled = lambda: _mode()[0]
torch.is_anomaly_check_nan_enabled = lambda: _mode()[1]
Variable._execution_engine = _Engine()
