"""Options of named things: a frozen dataclass whose defaults say which keys there are and what type each has."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from zeroflow.errors import ConfigError, unknown


def defaults(options: type) -> dict[str, Any]:
    """Every option with its default."""
    return {f.name: f.default for f in fields(options)}


def check_class(cls: Any, *, owner: str) -> None:
    """Refuse a class with options that cannot be built, or whose options' fields Python would not see.

    Args:
        cls: its ``Options`` are a dataclass.
        owner: what it is registered as, as in ``method 'ease'``.

    Raises:
        ConfigError: ``@dataclass`` is forgotten, on its ``Options`` or on one that they extend; methods are missing.
    """
    for own in cls.Options.__mro__:
        forgotten = inspect.get_annotations(own) and "__dataclass_fields__" not in vars(own)
        if forgotten or not is_dataclass(cls.Options):
            raise ConfigError(
                f"{owner}: class {own.__qualname__} is not a dataclass; write @dataclass(frozen=True) above it"
            )
    if missing := sorted(cls.__abstractmethods__):
        raise ConfigError(f"{owner}: {cls.__name__} must also define {', '.join(missing)}")


def finite(value: Any) -> bool:
    """Whether a real number fits into a finite float; an integer may be too large."""
    return bool(abs(value) <= sys.float_info.max)


def parse(options: type, given: Mapping[str, Any], *, owner: str, where: str) -> Any:
    """Build ``options`` from a mapping.

    Args:
        options: a dataclass whose ``__post_init__`` raises ``ValueError`` for values out of range.
        given: the options that are not at their defaults.
        owner: whose options they are, as in ``method 'ease'``.
        where: the key that holds them.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range; it names the nearest right one.
    """
    known = defaults(options)
    for key, value in given.items():
        if key not in known:
            raise unknown(f"option of {owner}", key, known, where=where)
        default = known[key]
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
            kinds = {float: "a number", int: "an integer", str: "a string", bool: "true or false"}
            axis = f"; an axis is written {where.rpartition(': ')[2]}.{key}: {value}" if isinstance(value, list) else ""
            raise ConfigError(
                f"{where}.{key}={value!r}: expected {kinds.get(type(default), type(default).__name__)}{axis}"
            )
        if isinstance(default, float) and not finite(value):
            raise ConfigError(f"{where}.{key}={value!r}: expected a finite number")
    try:
        return options(**given)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
