"""Conditions on cells: the ``when:`` of a grid file's rules.

    when: {optimizer: [zo-sgd, zo-adam], queries: ">= 8", optimizer_options.momentum: 0.9}

Every key must match. A value matches itself, a list any of its members (so a value that is a list is ``[[50, 25, 25]]``),
and a string that begins with ``<``, ``<=``, ``>``, ``>=`` or ``!=`` the numbers that compare so with the one behind it. What a key
means counts, however it is spelled: where a cell says nothing of it, its default does, the tasks of a stream are as many as its
``increments``, and a key that means nothing for the cell (queries of a first-order optimizer) has no value, whatever stands
there. A key without any value matches no comparison except ``!=``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from zeroflow.data import datasets
from zeroflow.errors import ConfigError, unknown
from zeroflow.grid.readings import DEFAULTS, readings
from zeroflow.methods import methods
from zeroflow.optim import optimizers
from zeroflow.registry import Registry
from zeroflow.trial.config import NESTED, TrialConfig
from zeroflow.trial.keys.model import with_whole_path

Comparison = tuple[Callable[[Any, Any], bool], float]

OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "!=": operator.ne,
}  # fmt: skip
_LISTS = {f.name for f in dataclasses.fields(TrialConfig) if "list" in str(f.type)}
_NUMBERS = {f.name for f in dataclasses.fields(TrialConfig) if "int" in str(f.type) or "float" in str(f.type)} - _LISTS
_REGISTRIES: Mapping[str, Registry[Any]] = {"method": methods, "optimizer": optimizers, "dataset": datasets}


def matches(values: Mapping[str, Any], when: Mapping[str, Any]) -> bool:
    """Whether a cell meets a condition.

    Args:
        values: the cell's keys: ``vars`` of its configuration, or what ``readings.keys_of`` gives.
        when: a condition that ``check_when`` has found right; keys may be dotted.
    """
    return all(_fits(readings(values, key), key, wanted) for key, wanted in when.items())


def parse_rule(rule: Any, where: str) -> tuple[Mapping[str, Any], Any]:
    """``when`` and ``set`` of a grid file's rule; what may stand in ``set`` is its caller's to check.

    Args:
        rule: the rule.
        where: file and rule, for the message.

    Raises:
        ConfigError: no mapping of these two, or a condition that cannot be meant.
    """
    if not isinstance(rule, Mapping) or set(rule) != {"when", "set"}:
        raise ConfigError(f"{where}: expected {{when: {{...}}, set: {{...}}}}, got {rule!r}")
    check_when(rule["when"], where)
    return rule["when"], rule["set"]


def check_when(when: Any, where: str) -> None:
    """Refuse a condition that cannot be meant.

    Args:
        when: what stands behind ``when:``.
        where: file and rule, for the message.

    Raises:
        ConfigError: no mapping, an unknown key or name, or a comparison with a wrong operator or without a number.
    """
    if not isinstance(when, Mapping):
        raise ConfigError(f"{where}: when: expected a mapping, got {when!r}")
    check_keys(when, f"{where}: when")
    for key, wanted in when.items():
        for value in as_list(wanted):
            if isinstance(value, str) and (key in _NUMBERS or value[:1] in {*"<>=!"}):
                _check_comparison(key, value, f"{where}: when")
            elif key in _LISTS and isinstance(value, int):
                raise ConfigError(f"{where}: when: {key}={wanted!r}: a list there is one of its members; write [[...]]")
            elif key in _REGISTRIES and value is not None:
                _REGISTRIES[key].get(value, where=f"{where}: when")


def check_keys(keys: Mapping[str, Any], where: str) -> None:
    """Refuse a key that no cell has; a dotted key reaches into options.

    Raises:
        ConfigError: it names the nearest right key.
    """
    for key in keys:
        section, dot, _ = str(key).partition(".")
        if section not in DEFAULTS or (dot and section not in NESTED):
            raise unknown("key", key, DEFAULTS, where=where)


def as_list(value: Any) -> list[Any]:
    """A list itself, anything else as the only member of one."""
    return value if isinstance(value, list) else [value]


def _check_comparison(key: str, text: str, where: str) -> None:
    if key not in _NUMBERS and "." not in key:
        raise ConfigError(f"{where}: {key}={text!r}: a comparison, but {key} is no number; name the values in a list")
    if _comparison(text) is None:
        raise ConfigError(
            f"{where}: {key}={text!r}: expected a number, or a comparison of one of {' '.join(OPERATORS)} and a number"
        )


@functools.cache
def _comparison(text: str) -> Comparison | None:
    """What a string like ``">= 8"`` means; None if it is no comparison."""
    parts = re.fullmatch(r"(<=|>=|!=|<|>)\s*(\S+)", text.strip())
    try:
        number = float(parts[2]) if parts else math.nan
    except ValueError:
        return None
    return (OPERATORS[parts[1]], number) if parts and math.isfinite(number) else None


def _fits(values: tuple[Any, ...], key: str, wanted: Any) -> bool:
    return any(_fits_one(values, with_whole_path(key, one)) for one in as_list(wanted))


def _fits_one(values: tuple[Any, ...], wanted: Any) -> bool:
    counts, comparison = values[0], _comparison(wanted) if isinstance(wanted, str) else None
    if comparison is None:
        if isinstance(wanted, Mapping) and isinstance(counts, Mapping):
            return {**counts, **wanted} == counts and all(key in wanted for key in values[-1])
        return wanted in values
    compare, number = comparison
    if isinstance(counts, int | float) and not isinstance(counts, bool):
        return compare(counts, number)
    return compare is operator.ne
