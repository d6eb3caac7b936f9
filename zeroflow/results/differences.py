"""What tells configurations apart, and what they share: a label names the one, a sentence above a table the other."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from zeroflow.results.schema import CONFIG_KEYS

# A key that only follows others (every optimizer its own learning rate) tells no rows apart and gets no column.
_FOLLOWS = {
    "transform": ("dataset",),
    "image_size": ("dataset", "backbone"),
    "preprocessing": ("dataset", "transform", "backbone"),
    "checkpoint": ("backbone",),
    "method_options": ("dataset", "method"),
    "classifier_options": ("dataset", "method", "classifier"),
    "epochs": ("dataset", "method"),
    "lr": ("dataset", "method", "optimizer"),
    "eps": ("dataset", "method", "optimizer"),
    "optimizer_options": ("dataset", "method", "optimizer"),
    "schedule": ("dataset", "method", "optimizer"),
    "probe_every": ("dataset", "method", "optimizer"),
}
# Here null stands for a value, the data set's or the backbone's own, or for none of something; elsewhere it says that the key does not apply.
_DEFAULTED = (
    "transform", "image_size", "checkpoint", "stop_after", "base_classes", "increments", "fixed_class_order", "access", "loss",
    "classifier", "classifier_options", "preprocessing", "later", "schedule", "probe_every",
)  # fmt: skip
_OWNERS = {"method_options": "method", "classifier_options": "classifier", "optimizer_options": "optimizer"}
"""The keys that hold options, and whose they are."""

USUAL = {"access": "white-box", "loss": "cross-entropy"}
"""What null stands for, where it has a name."""

DEFAULT = "default"
"""Stands for the value of an option that a row leaves as it is, where other rows of its kind set it."""

_NAMES = ("dataset", "backbone", "method", "classifier", "optimizer")
"""Keys whose values say by themselves what they are."""

_SHORT = {"queries": "q"}

_LONG = 16
"""Characters of a list of labels that are shown, and what tells it from others that begin alike."""

Config = Mapping[str, Any]
Numbers = Mapping[str, Collection[float]]
"""By name of a key or an option, the different numbers among which one is to be told from the others."""

_NONE: Numbers = MappingProxyType({})


class Differences:
    """What tells some configurations apart.

    Args:
        configs: as rows of the table ``trials`` have them.
    """

    def __init__(self, configs: Sequence[Config]) -> None:
        self.configs = configs
        self._numbers = numbers_of(configs)
        self._apart = {key: _apart_by_group(key, configs) for key in _OWNERS}

    @property
    def named(self) -> tuple[str, ...]:
        """Keys that are named even where all share their value: with another classifier a method is not the one of its name."""
        return ("classifier",) if any(config["classifier"] for config in self.configs) else ()

    def varies(self, key: str) -> bool:
        """Whether a key takes several values beyond what the keys it follows explain."""
        ignored = set() if key in _DEFAULTED else {None}
        groups = _groups(key, self.configs).values()
        return any(len({config[key] for config in own} - ignored) > 1 for own in groups) and (
            key not in _OWNERS or any(self._apart[key].values())
        )

    def text(self, key: str, config: Config) -> str:
        """A key's value as a reader sees it; of options those alone that differ."""
        if key == "loss" and config["optimizer"] is None:
            return "-"  # nothing is trained
        if key not in _OWNERS:
            return as_text(key, config[key], self._numbers)
        own = _read(config, key)
        shown = {name: own.get(name, DEFAULT) for name in self._apart[key][_group(key, config)]}
        return _options(shown, self._numbers) or "-"

    def label(self, config: Config, keys: Sequence[str]) -> str:
        """A name by what some keys say: ``ease lr=0.01 stop_after=default``."""
        return " ".join(named(key, DEFAULT if (text := self.text(key, config)) == "-" else text) for key in keys)

    def shared(self) -> list[str]:
        """The options that no row shows, with whose they are: ``bottleneck=16 dropout=0 (ease, aper-adapter)``."""
        together: dict[str, list[str]] = {}
        for key, owner in _OWNERS.items():
            holders: dict[str, list[Config]] = {}
            for config in self.configs:
                shown = self._apart[key][_group(key, config)]
                for name, value in _read(config, key).items():
                    if name not in shown:
                        holders.setdefault(_option(name, value, self._numbers), []).append(config)
            for option, own in holders.items():
                together.setdefault(self._whose(owner, own), []).append(option)
        return [f"{' '.join(options)} ({names})" for names, options in together.items()]

    def _whose(self, owner: str, holders: Sequence[Config]) -> str:
        """Some configurations by the name of their method, optimizer or classifier, with as many more words as say which they are.

        Args:
            owner: whose option it is.
            holders: those that have it with one value; all or none of a data set, method, classifier and optimizer.
        """
        more = (
            ("method", "classifier", "optimizer")
            if any(c["classifier"] for c in self.configs)
            else ("method", "optimizer")
        )
        for keys in ((owner,), ("method", "optimizer"), more, ("dataset", *more)):
            names = dict.fromkeys(_name_of(config, keys) for config in holders)
            if sum(_is_one_of(config, names) for config in self.configs) == len(holders):
                break
        others = dict.fromkeys(config[owner] for config in self.configs if config[owner] and config[owner] not in names)
        if keys == (owner,) and len(names) > 2 * len(others) + 2:
            return f"every {owner}{' but ' if others else ''}{', '.join(others)}"
        return ", ".join(names)


def named(key: str, text: str) -> str:
    """A key's text in a label: ``lr=0.01``, ``ease``, ``momentum=0.9``; options have names of their own, but where all are default."""
    alone = text != DEFAULT and (key in _NAMES or key.endswith(("_options", "preprocessing", "later")))
    return text if alone else f"{_SHORT.get(key, key)}={text}"


def _name_of(config: Config, keys: Sequence[str]) -> str:
    """A configuration by some keys, as columns show them; by its method alone where its classifier is the method's own."""
    if keys == ("classifier",):
        return str(config["classifier"] or config["method"])
    return " ".join(config[key] or "-" for key in keys)


def _is_one_of(config: Config, names: Iterable[str]) -> bool:
    """Whether a reader would take a configuration for one of some names, by its words."""
    words = {config[key] or "-" for key in ("dataset", "method", "classifier", "optimizer")}
    return any(words.issuperset(name.split(" ")) for name in names)


def _group(key: str, config: Config) -> tuple[Any, ...]:
    return tuple(config[other] for other in _FOLLOWS.get(key, ()))


def _groups(key: str, configs: Sequence[Config]) -> dict[tuple[Any, ...], list[Config]]:
    """Configurations by the keys that a key follows."""
    found: dict[tuple[Any, ...], list[Config]] = {}
    for config in configs:
        found.setdefault(_group(key, config), []).append(config)
    return found


def _read(config: Config, key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(config[key] or "{}")
    return found


def _apart_by_group(key: str, configs: Sequence[Config]) -> dict[tuple[Any, ...], list[str]]:
    """The options that rows show, by the keys they follow: what tells rows apart in one data set is shown in all of them."""
    groups = _groups(key, configs)
    found: dict[tuple[Any, ...], dict[str, None]] = {}
    for (_, *others), own in groups.items():
        found.setdefault(tuple(others), {}).update(dict.fromkeys(_apart(key, own)))
    return {group: list(found[group[1:]]) for group in groups}


def _apart(key: str, configs: Sequence[Config]) -> list[str]:
    """The options that take several values, or that some rows of one optimizer have and others lack; in the rows' order."""
    values: dict[str, set[str]] = {}
    holders: dict[Any, list[set[str]]] = {}
    for config in configs:
        options = _read(config, key)
        holders.setdefault(config["optimizer"], []).append(set(options))
        for name, value in options.items():
            values.setdefault(name, set()).add(json.dumps(value))
    apart = {name for name, found in values.items() if len(found) > 1}
    for first, *others in holders.values():
        apart.update(*(first ^ other for other in others))
    return [name for name in values if name in apart]


def numbers_of(configs: Iterable[Config]) -> dict[str, set[float]]:
    """The different numbers of each key, and of each option by its name alone; those of ``later`` count with the keys they change."""
    found: dict[str, set[float]] = {}
    for key, value in {(key, config[key]) for config in configs for key in CONFIG_KEYS if config.get(key) is not None}:
        read = json.loads(value or "{}") if _holds_options(key) else {key: value}
        for name, number in read.items():
            if isinstance(number, float):
                found.setdefault(name, set()).add(number)
    return found


def _holds_options(key: str) -> bool:
    return key == "later" or key.endswith(("_options", "preprocessing"))


def as_text(key: str, value: Any, numbers: Numbers = _NONE) -> str:
    """A key's value as a reader sees it.

    Args:
        key: its name.
        value: as rows of the table ``trials`` have it.
        numbers: what numbers of keys and options are told from; see ``numbers_of``.
    """
    if key == "later" and value:
        changes = json.loads(value)
        return f"from task {changes.pop('task')}: {_options(changes, numbers)}"
    if _holds_options(key):
        value = _options(json.loads(value or "{}"), numbers) or None
    if key == "hybrid_epochs":
        value = value or None  # no epoch is none
    if value is None and key in USUAL:
        return USUAL[key]
    if key == "fixed_class_order" and value and len(value) > _LONG:
        value = f"{value[:_LONG]}... {hashlib.sha256(value.encode()).hexdigest()[:6]}]"
    return (
        "-" if value is None else short_number(value, numbers.get(key, ())) if isinstance(value, float) else str(value)
    )


def short_number(value: float, beside: Iterable[float] = ()) -> str:
    """A number as people write it: ``0``, ``0.05``, ``1e6``, ``1e-5``; in six digits, or as many as tell it from others ``beside`` it."""
    digits = 6
    # All others count at each length, for two may read alike with a digit more that did not before. 17 tell any two apart.
    while digits < 17 and any(f"{o:.{digits}g}" == f"{value:.{digits}g}" for o in beside if o != value):
        digits += 1
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{value:.{digits}g}")


def _options(options: Mapping[str, Any], numbers: Numbers) -> str:
    return " ".join(_option(name, value, numbers) for name, value in options.items())


def _option(name: str, value: Any, numbers: Numbers) -> str:
    return f"{name}={short_number(value, numbers.get(name, ())) if isinstance(value, float) else value}"
