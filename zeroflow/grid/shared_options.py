"""Options that all cells of a grid share: each cell takes those that its method, optimizer and classifier know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zeroflow import options
from zeroflow.classifiers import classifiers
from zeroflow.errors import ConfigError, unknown
from zeroflow.methods import methods
from zeroflow.optim import optimizers
from zeroflow.registry import Registry
from zeroflow.trial.config import TrialConfig

OPTION_SECTIONS = ("method_options", "optimizer_options", "classifier_options")
"""The keys that hold options."""


class SharedOptions:
    """Options that ``base`` and the command line give to all cells: dropped where a cell's method or optimizer lacks them.

    An option that no cell knows is an error: of the file for ``base``, of all files for the command line.
    """

    def __init__(self, base: Mapping[str, Any], changed: Mapping[str, Any], where: str) -> None:
        self.unused: dict[tuple[str, str], str] = {}
        self.known: set[str] = set()
        for mapping, place in ((base, f"{where}: base"), (changed, "--set")):
            for key, value in mapping.items():
                section, _, option = str(key).partition(".")
                if section.endswith("_options"):
                    names = [option] if option else list(value if isinstance(value, Mapping) else [])
                    self.unused |= {(section, name): place for name in names}
        self.options = frozenset(self.unused)

    def fitting(self, values: Mapping[str, Any], block: Mapping[str, Any], *, final: bool = True) -> Mapping[str, Any]:
        """``values`` of one cell without the shared options that mean nothing to it.

        Args:
            values: keys of the cell.
            block: the block that it comes from, whose own options must fit.
            final: whether rules are through with the cell, so that an option that it knows is in use.
        """
        if not self.options:
            return values
        found = dict(values)
        for section, names in _by_section(values).items():
            self.known |= set(names) if final else set()
            own = block.get(section) or {}
            if isinstance(values.get(section), Mapping):
                kept = {}
                for name, value in values[section].items():
                    shared = (section, name) in self.options and name not in own and f"{section}.{name}" not in block
                    if not shared or name in names:
                        kept[name] = value
                        if final:
                            self.unused.pop((section, name), None)
                found[section] = kept
        return found


def check_all_used(files: Sequence[SharedOptions]) -> None:
    """Raise for the first shared option that no cell knew."""
    known = {name for shared in files for name in shared.known}
    for shared in files:
        for (section, name), place in shared.unused.items():
            if place != "--set" or all((section, name) in other.unused for other in files):
                raise unknown(f"option in {section}", name, known, where=place)


def _classifier(values: Mapping[str, Any]) -> Any:
    """The classifier of a cell: the chosen one, or its method's own."""
    try:
        return values.get("classifier") or methods.get(values.get("method", TrialConfig.method)).build.own_classifier
    except ConfigError:
        return None  # the cell's own check says what is wrong with the name


def known_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a cell's method, optimizer and classifier know, by dotted name, with their defaults."""
    return {f"{section}.{name}": usual for section, own in _by_section(values).items() for name, usual in own.items()}


def _by_section(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {
        "method_options": _with_defaults(methods, values.get("method", TrialConfig.method)),
        "optimizer_options": _with_defaults(optimizers, values.get("optimizer", TrialConfig.optimizer)),
        "classifier_options": _with_defaults(classifiers, _classifier(values)),
    }


def _with_defaults(registry: Registry[Any], name: Any) -> Mapping[str, Any]:
    try:
        found = registry.get(name).options
    except ConfigError:
        return {}  # the cell's own check says what is wrong with the name
    return options.defaults(found) if isinstance(found, type) else found
