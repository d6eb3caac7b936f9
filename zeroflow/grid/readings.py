"""What a key of a cell may be read as: first the value that counts, with defaults stated, then how the normal form has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from zeroflow.data import datasets, even_increments
from zeroflow.errors import ConfigError
from zeroflow.grid.shared_options import known_options
from zeroflow.methods import methods
from zeroflow.models.factory import EMBEDDED, brings_weights, default_image_size
from zeroflow.optim import optimizers
from zeroflow.trial.config import NESTED, TrialConfig

Keys = Mapping[str, Any]

DEFAULTS = dataclasses.asdict(TrialConfig())
"""Every key of a cell with its default."""


def keys_of(values: Keys) -> Keys:
    """All keys of a cell, in normal form; as they stand, beside defaults, while they are no cell yet (a rule may mend them)."""
    try:
        return vars(TrialConfig.from_dict(values))
    except ConfigError:
        own = {key: usual for key, usual in _of_the_optimizer(values).items() if values.get(key) is None}
        return {**DEFAULTS, **values, **own}


def readings(keys: Keys, key: str) -> tuple[Any, ...]:
    """The value that counts, which a comparison looks at, and others of the same meaning.

    Args:
        keys: what ``keys_of`` gives, or ``vars`` of a configuration.
        key: dotted or not.
    """
    section, dot, option = key.partition(".")
    if dot:
        own, usual = keys[section] or {}, known_options(keys).get(key)
        return (own[option],) if option in own and own[option] != usual else (usual, None)
    if section in NESTED:
        usual = {
            name.partition(".")[2]: value for name, value in known_options(keys).items() if name.startswith(f"{key}.")
        }
        return {**usual, **(keys[key] or {})}, keys[key]
    try:
        return (_COUNTS[key](keys), keys[key]) if key in _COUNTS else (keys[key],)
    except (ConfigError, TypeError):
        return (keys[key],)  # the cell's own check says what is wrong


def _of_the_optimizer(values: Keys) -> dict[str, Any]:
    """What an optimizer has where a cell does not say."""
    name, method = (values.get(part, DEFAULTS[part]) for part in ("optimizer", "method"))
    if name not in optimizers.names() or method not in methods.names() or not methods.get(method).trains:
        return {}
    info = optimizers.get(name)
    found = {"lr": info.default_lr, "eps": info.default_eps, "queries": info.default_queries}
    unused = {"eps": not info.estimator.uses_eps, "queries": not info.estimator.uses_queries}
    return {key: value for key, value in found.items() if not unused.get(key)}


def _counts(keys: Keys) -> list[int] | None:
    """Classes of every task, where that is known before the data is opened."""
    classes = datasets.get(keys["dataset"]).classes
    if keys["increments"] is not None or classes is None:
        found: list[int] | None = keys["increments"]
        return found
    return even_increments(classes, keys["tasks"], keys["base_classes"])


def _base_classes(keys: Keys) -> int | None:
    counts = _counts(keys)
    return keys["base_classes"] if counts is None else counts[0]


def _loss(keys: Keys) -> str | None:
    method = methods.get(keys["method"])
    return keys["loss"] or ("cross-entropy" if method.trains and method.build.any_loss else None)


def _checkpoint(keys: Keys) -> str | None:
    downloads = keys["backbone"] != EMBEDDED and not brings_weights(keys["backbone"])
    return keys["checkpoint"] or ("hub" if downloads else None)


_COUNTS: Mapping[str, Callable[[Keys], Any]] = {
    "base_classes": _base_classes,
    "increments": _counts,
    "fixed_class_order": lambda keys: (
        list(range(datasets.get(keys["dataset"]).classes or 0)) or "sorted"
        if keys["fixed_class_order"] == "sorted"
        else keys["fixed_class_order"]
    ),
    "stop_after": lambda keys: keys["stop_after"] or keys["tasks"],
    "loss": _loss,
    "checkpoint": _checkpoint,
    "access": lambda keys: keys["access"] or "white-box",
    "transform": lambda keys: keys["transform"] or datasets.get(keys["dataset"]).transform,
    "image_size": lambda keys: keys["image_size"] or default_image_size(keys["backbone"]),
    "classifier": lambda keys: keys["classifier"] or methods.get(keys["method"]).build.own_classifier,
}
"""Keys whose value that counts is not the one of the normal form."""
