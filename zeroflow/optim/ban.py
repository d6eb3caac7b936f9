"""The gradient ban: no autograd graph can be built inside, not even by accident.

``torch.no_grad()`` prevents graphs until some code enables them again; the ban catches that code. It watches the two places
that all reverse-mode differentiation passes through: where autograd creates a graph node, and where its engine starts. It does
not intercept operations, so a forward pass is as fast as without it.
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
    """A gradient was requested where gradients are banned."""


_here = threading.local()
"""``depth``: number of bans active in this thread."""

_lock = threading.Lock()
_everywhere = 0


@contextmanager
def gradient_ban() -> Iterator[None]:
    """Forbid reverse-mode differentiation in this thread; other threads, even if started inside, are not affected.

    It raises at any operation that would be recorded in an autograd graph (a forward pass with trainable parameters outside
    ``torch.no_grad()``, whoever enabled gradients), and at any backward call, even on a graph from outside. Forward passes
    under ``torch.no_grad()`` and forward-mode differentiation work as usual; so do operations on values that require no
    gradient, except a ``torch.autograd.Function``, which always creates a node. Bans nest; this is also a decorator.

    The ban uses autograd's anomaly mode, which is on inside; torch's queries report what it would be without a ban, and changes
    made inside take effect afterwards. Not detected: code that starts the engine in C++ on a graph from outside (TorchScript,
    ``torch.distributed.autograd``, an engine object of ``torch._C``), or that disables the mode in ``torch._C``.

    Raises:
        GradientBanned: at the operation itself, which is in its traceback.
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
            raise GradientBanned("a backward pass was requested inside a gradient ban")
        return super().run_backward(*arguments, **named)


torch.fx.traceback.format_stack = _node_made
torch.set_anomaly_enabled = _mode_asked
torch.is_anomaly_enabled = lambda: _mode()[0]
torch.is_anomaly_check_nan_enabled = lambda: _mode()[1]
Variable._execution_engine = _Engine()
