"""The key ``later``: from a task on, a cell is trained with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeroflow.errors import ConfigError, unknown
from zeroflow.methods import methods
from zeroflow.trial.config import LATER_KEYS, OF_THE_OPTIMIZER, TrialConfig, branched
from zeroflow.trial.keys.values import is_natural, require


def later_keys(config: TrialConfig) -> dict[str, Any]:
    """The key in normal form: the settings that the other tasks do not have; empty where all tasks are trained alike.

    Args:
        config: the cell, its other keys in normal form.

    Raises:
        ConfigError: which setting, its value and what was expected.
    """
    later = config.later
    if not later:
        return {}
    for name in later:
        if name not in ("task", *LATER_KEYS):
            raise unknown("key", name, ("task", *LATER_KEYS), where="later")
    stages, task = config.stop_after or config.tasks, later.get("task") or 0
    among = f"2..{stages}, the first task with other settings" if stages > 1 else "a stream of two tasks or more"
    require("later.task", later.get("task"), is_natural(task) and 2 <= task <= stages, among)
    method = methods.get(config.method)
    if not method.trains or method.build.first_task_only:
        return {}
    try:
        other = config.at(task - 1)
    except ConfigError as error:
        raise ConfigError(f"later: {error}") from None
    own = {key: value for key in LATER_KEYS if (value := getattr(other, key)) != getattr(config, key)}
    if "optimizer" in own:  # its settings are stated, but those that it does not have
        own |= {key: getattr(other, key) for key in OF_THE_OPTIMIZER}
        own = {key: value for key, value in own.items() if value or key not in OF_THE_OPTIMIZER}
    return {"task": task, **own} if own else {}


def shares(values: Mapping[str, Any]) -> list[tuple[float, Mapping[str, Any]]]:
    """What part of a cell's tasks is trained with which settings; as a guess, for tasks need not be of one size.

    Args:
        values: the keys of a cell in normal form.
    """
    later = values.get("later") or {}
    if not later:
        return [(1.0, values)]
    before = (later["task"] - 1) / (values["stop_after"] or values["tasks"])
    return [(before, {**values, "later": {}}), (1 - before, branched(values))]
