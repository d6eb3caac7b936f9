"""Tab completion: names in grids, keys of cells, grid files, tables of results.

Names come from the registries, so that those of other packages complete too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, split_arg_string

if TYPE_CHECKING:
    from zeroflow.registry import Registry

TABLES = ("summary", "table1", "orders", "table2", "table3", "table4", "paper", "effects", "searches", "cells")
"""Names of the tables that a store may hold."""

REGISTRIES = ("optimizers", "methods", "classifiers", "datasets", "transforms")
BACKBONES = "backbones"
"""A kind of names without a registry."""

_OF_KEYS = {
    "optimizer": "optimizers", "method": "methods", "dataset": "datasets", "transform": "transforms",
    "classifier": "classifiers",
}  # fmt: skip


def registry(kind: str) -> Registry[Any]:
    """One of ``REGISTRIES``."""
    from zeroflow import classifiers, data, methods, optim

    known: Mapping[str, Registry[Any]] = {
        "optimizers": optim.optimizers,
        "methods": methods.methods,
        "classifiers": classifiers.classifiers,
        "datasets": data.datasets,
        "transforms": data.transforms,
    }
    return known[kind]


def _registered(kind: str) -> list[tuple[str, str | None]]:
    """The names in a registry, with a line on each."""
    return [(name, entry.description) for name, entry in registry(kind).items()]


def _matching(names: Iterable[tuple[str, str | None]], incomplete: str, before: str = "") -> list[CompletionItem[Any]]:
    found = [(name, words) for name, words in names if name.startswith(incomplete)]
    return [CompletionItem(before + name, help=words) for name, words in found]


def folders(incomplete: str) -> list[CompletionItem[Any]]:
    """Leave the completion to the shell."""
    return [CompletionItem(incomplete, type="dir")]


def values_of_keys(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
    """``KEY=VALUE`` of a cell: the keys, then the names that four of them take, also within a list."""
    from zeroflow.results.schema import CONFIG_KEYS

    key, equals, value = incomplete.partition("=")
    if not equals:
        return _matching(((f"{name}=", None) for name in CONFIG_KEYS), incomplete)
    if key not in _OF_KEYS:
        return []
    before, comma, last = value.rpartition(",")
    return _matching(_registered(_OF_KEYS[key]), last.lstrip("["), f"{key}={before}{comma}{'[' * last.count('[')}")


def names_of_kind(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
    """Names of the kind given by the previous word."""
    kind = ctx.params.get("kind") or "optimizers"
    return _matching(_backbones(incomplete) if kind == BACKBONES else _registered(kind), incomplete)


def _backbones(incomplete: str) -> list[tuple[str, None]]:
    """Names of backbones; of timm's, which are many and slow to list, only those that begin with the word."""
    from zeroflow.models.factory import EMBEDDED, own_backbones

    names = [EMBEDDED, *own_backbones()]
    if incomplete:
        import timm

        names += timm.list_pretrained(f"{incomplete}*") if "." in incomplete else timm.list_models(f"{incomplete}*")
    return [(name, None) for name in names]


def datasets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
    """Names of data sets."""
    return _matching(_registered("datasets"), incomplete)


def optimizers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
    """Names of optimizers, separated by commas."""
    before, comma, last = incomplete.rpartition(",")
    return _matching(_registered("optimizers"), last, before + comma)


def tables(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
    """Names of tables."""
    return _matching(((name, None) for name in TABLES), incomplete)


def grid_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
    """YAML files at the path of the word, and in ``sweeps``; other folders are left to the shell."""
    typed = Path(f"{incomplete}*").parent  # "sweeps/" points into the folder
    files = sorted(
        {file for folder in (typed, Path("sweeps")) for end in ("*.yaml", "*.yml") for file in folder.glob(end)}
    )
    return _matching(((str(file), None) for file in files), incomplete) or [CompletionItem(incomplete, type="file")]


_BREAK = re.compile("[=:]+")
"""Characters at which bash splits words."""


class Bash(BashComplete):
    """Bash splits ``method=ease`` into three words; this rejoins them, and completes with the last one only.

    A completion of type ``open`` can be continued: no blank follows it.
    """

    source_template = BashComplete.source_template.replace(
        "[[ $type == 'plain' ]]; then",
        "[[ $type == 'open' ]]; then\n            compopt -o nospace 2> /dev/null\n            COMPREPLY+=($value)\n"
        "        elif [[ $type == 'plain' ]]; then",
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        given = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
        words: list[str] = []
        joins = False
        for word in given:
            breaks = bool(_BREAK.fullmatch(word))
            if words and (joins or breaks):
                words[-1] += word
            else:
                words.append(word)
            joins = breaks
        *before, incomplete = ["".join(split_arg_string(word)) for word in words[1:]] or [""]
        self._kept = max(incomplete.rfind("="), incomplete.rfind(":")) + 1
        return before, incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        if item.type != "plain":
            return super().format_completion(item)
        return f"{'open' if item.value.endswith('=') else 'plain'},{item.value[self._kept :]}"


add_completion_class(Bash, "bash")
