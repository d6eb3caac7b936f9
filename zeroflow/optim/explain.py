"""Explain mistakes of a closure where torch's own error message does not."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_NO_GRAPH = "does not require grad and does not have a grad_fn"
_GRAPH_USED = "backward through the graph a second time"
_NO_RULE = ("forward ad", "forward mode ad", "jvp")


@contextmanager
def explained() -> Iterator[None]:
    """Context for a call of a closure, or for differentiating its result.

    Raises:
        TypeError: it calls ``backward()``, or one of its modules has no forward-mode derivative; other errors pass through.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one of them
        text = str(error)
        if _NO_GRAPH in text or _GRAPH_USED in text:
            raise TypeError(
                "closure: it calls backward(); expected only the loss, as in step(lambda: loss(model(x), y)): an optimizer that "
                "needs a gradient takes it itself"
            ) from error
        if any(words in text.lower() for words in _NO_RULE):
            where = _module(error)
            raise TypeError(
                f"forward-grad: {where or 'the closure'} has no forward-mode derivative ({text.splitlines()[0]}); take an "
                "optimizer that needs none, such as zo-sgd, or keep that part frozen"
            ) from error
        raise


def _module(error: BaseException) -> str:
    """Type of the innermost module that raised; empty if none did."""
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    return type(modules[-1]).__name__ if modules else ""
