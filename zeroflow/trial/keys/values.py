"""What kind of value a key may have, and the one form of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from zeroflow import options
from zeroflow.errors import ConfigError, unknown

LIMIT = 2**63
"""Integers are less than this: results keep them in 64 bits."""


def require(key: str, value: Any, right: bool, expected: str) -> None:
    """Refuse the value of a key unless it is right.

    Raises:
        ConfigError: what was expected.
    """
    if not right:
        most = " and less than 2^63" if isinstance(value, int) and value >= LIMIT else ""
        raise ConfigError(f"{key}={value!r}: expected {expected}{most}")


def one_of(key: str, value: Any, known: Mapping[str, Any]) -> str | None:
    """The value of a key that is one of a few names; None for the first of them, which is the default.

    Raises:
        ConfigError: no such name; it says the nearest.
    """
    require(key, value, isinstance(value, str | None), "a string")
    if value is not None and value not in known:
        raise unknown(key, value, known)
    return None if value == next(iter(known)) else value


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and options.finite(value)


def is_natural(value: Any) -> bool:
    """Whether a value is an integer >= 0, and less than ``LIMIT``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LIMIT


def is_positive(value: Any) -> bool:
    """Whether a value is an integer >= 1, and less than ``LIMIT``."""
    return is_natural(value) and value >= 1


def is_list_of_integers(value: Any) -> bool:
    """Whether a value is a list of at least one integer."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, int) and type(v) is not bool for v in value)


def plain(value: Any) -> Any:
    """Tuples become lists, so that a value from Python and the same from YAML are equal."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def as_json(value: Any) -> str:
    """A value as the store keeps it: JSON in which equal values are equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from their defaults, each number in the one form that its default has."""
    typed = {key: _like(value, defaults[key]) for key, value in values.items()}
    return {key: value for key, value in typed.items() if value != defaults[key]}


def _like(value: Any, default: Any) -> Any:
    if isinstance(default, float):
        return float(value)
    if isinstance(default, list) and isinstance(value, list) and len(value) == len(default):
        return [_like(one, usual) for one, usual in zip(value, default, strict=True)]
    return int(value) if default is None and isinstance(value, float) and value.is_integer() else value
