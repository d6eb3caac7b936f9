"""A grid file: YAML that names the cells of a sweep.

    name: example
    base: {dataset: quickdraw100, epochs: 5}      # keys of every cell
    grid:                                         # blocks; each is the product over its lists
      - {method: simplecil}
      - {method: [ease, aper-adapter], optimizer: [fo-sgd, zo-sgd], queries: [1, 4], seed: [0, 1, 2]}
    settings:                                     # values for the cells that match, later ones win
      - {when: {optimizer: zo-sgd}, set: {lr: 0.001}}
      - {when: {queries: ">= 8"}, set: {epochs: 2}}         # conditions: see ``zeroflow.grid.rules``
    placement: {workers_per_trial: 1, cpus_per_worker: 1, gpus_per_worker: 0}    # see ``zeroflow.grid.placement``
    include: [other.yaml]                         # the cells of these grids too, each as its own file has it
    settings_from: [tuned.yaml]                   # the settings of these files before this file's own
    search: {forward_passes: 20000}               # how lr, eps and options are chosen: see ``zeroflow.grid.search_settings``
    imports: [my_method.py]                       # Python files that register what it names; the command line names them too

Every key of ``TrialConfig`` may stand in ``base``, in a block and in ``set``. A list in ``base`` and in a block is an axis,
so there a value that is a list itself is written as a list in a list (``increments: [[50, 25, 25]]``). Cells that come out
equal (a method that does not train ignores the optimizer, for example) are one cell.

Paths of files are relative to the file that names them. Of an included file only the cells count: how they are placed, and
where their data is, says the file that the sweep was started with. Overrides of the command line hold for all cells.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zeroflow.errors import ConfigError, unknown
from zeroflow.grid.placement import SweepPlacement, parse_placement
from zeroflow.grid.readings import keys_of
from zeroflow.grid.rules import as_list, check_keys, matches, parse_rule
from zeroflow.grid.search_settings import SearchSettings, parse_search
from zeroflow.grid.shared_options import SharedOptions, check_all_used
from zeroflow.grid.yaml_loader import load_yaml, parse_yaml
from zeroflow.imports import is_imported
from zeroflow.trial.config import NESTED, TrialConfig

SECTIONS = (
    "name",
    "imports",
    "include",
    "base",
    "grid",
    "settings_from",
    "settings",
    "search",
    "placement",
    "data_dir",
)

_OF_OWN_CELLS = ("base", "settings_from", "settings", "search")
"""Sections that mean nothing in a file without a ``grid``."""

Rule = tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Grid:
    """The cells of a grid file, each once, in the order of the file, those of included files first.

    Attributes:
        own: the cells of the file's own blocks, each with its keys as they are spelled there; a cell may be spelled in
            several ways.
        search: how their lr, eps and options are chosen, where the file says so.
        idle: settings of the file and of included ones that match no cell, in words; none where cells were overridden.
    """

    name: str
    cells: Sequence[TrialConfig]
    placement: SweepPlacement = field(default_factory=SweepPlacement)
    data_dir: str | None = None
    own: Sequence[tuple[TrialConfig, Mapping[str, Any]]] = ()
    search: SearchSettings | None = None
    idle: Sequence[str] = ()


def load_grid(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Grid:
    """Read a grid file.

    Args:
        path: the YAML file.
        overrides: values that replace a key in every cell; a list makes an axis of it.

    Raises:
        ConfigError: the file is missing or not such a grid, or a cell is wrong; the message says where and what is right.
    """
    file = Path(path)
    return parse_grid(
        _content(file, str(path)), overrides, where=str(path), default_name=file.stem, folder=file.parent, trail=(file,)
    )


def parse_grid(
    content: Any,
    overrides: Mapping[str, Any] | None = None,
    *,
    where: str = "grid",
    default_name: str = "grid",
    folder: Path | None = None,
    trail: tuple[Path, ...] = (),
) -> Grid:
    """Build a grid from the content of a grid file; see ``load_grid``.

    Args:
        content: of the file.
        overrides: see ``load_grid``.
        where: the file, for messages.
        default_name: of the grid.
        folder: that paths in it are relative to.
        trail: the file and those that include it, the outermost first.
    """
    changed = dict(overrides or {})
    grid, shared = _parse(content, changed, where, default_name, folder or Path(), trail)
    check_all_used(shared)
    return grid


def _parse(
    content: Any, changed: Mapping[str, Any], where: str, default_name: str, folder: Path, trail: tuple[Path, ...]
) -> tuple[Grid, list[SharedOptions]]:
    """A grid, and what its file and each included one make of the overrides."""
    _check_sections(content, where)
    _check_imports(content, where, folder)
    cells: dict[str, TrialConfig] = {}
    idle: list[str] = []
    all_shared: list[SharedOptions] = []
    for file in _named_files(content, "include", where, folder, trail):
        place = f"{where}: include: {file}"
        part, shared = _parse(_content(file, place), changed, str(file), file.stem, file.parent, (*trail, file))
        all_shared += shared
        idle += part.idle
        cells |= {config.cell_id: config for config in part.cells if config.cell_id not in cells}
    own: list[tuple[TrialConfig, Mapping[str, Any]]] = []
    if "grid" in content:
        own, shared_here, idle_here = _own_cells(content, changed, where, folder, trail)
        all_shared.append(shared_here)
        idle += [] if changed else idle_here
        for config, _ in own:
            cells.setdefault(config.cell_id, config)
    placement = parse_placement(content.get("placement") or {}, where, str(folder.absolute()))
    data_dir = content.get("data_dir")
    if not isinstance(data_dir, str | None):
        raise ConfigError(f"{where}: data_dir: expected a folder, got {data_dir!r}")
    search = parse_search(content["search"], where) if "search" in content else None
    return Grid(
        _name(content["name"], where) if "name" in content else default_name,
        tuple(cells.values()),
        placement,
        data_dir,
        tuple(own),
        search,
        idle,
    ), all_shared


def _own_cells(
    content: Mapping[str, Any], changed: Mapping[str, Any], where: str, folder: Path, trail: tuple[Path, ...]
) -> tuple[list[tuple[TrialConfig, Mapping[str, Any]]], SharedOptions, list[str]]:
    """The cells of a file's own blocks as they are spelled, what was made of options that they share, settings that match none."""
    blocks, base = content["grid"], content.get("base") or {}
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, Mapping) for block in blocks):
        raise ConfigError(f"{where}: grid: expected a list of mappings (blocks), got {blocks!r}")
    if not isinstance(base, Mapping):
        raise ConfigError(f"{where}: base: expected a mapping, got {base!r}")
    rules = _rules(content, where, folder, trail[-1:])
    # What stands in every block's place belongs to the cells that know it; what a block says must fit its cells.
    shared = SharedOptions(base, changed, where)
    found: list[tuple[TrialConfig, Mapping[str, Any]]] = []
    first = len(content.get("settings") or ()) - len(rules)  # so that the file's own are numbered from 0
    idle = dict(enumerate((when for when, _ in rules), first))
    for number, block in enumerate(blocks):
        place = f"{where}: grid[{number}]"
        parts = (_product(base, f"{where}: base"), _product(block, place), _product(changed, "--set"))
        for common, own, given in itertools.product(*map(list, parts)):
            values = _merged(common, own, given)
            keys = keys_of(shared.fitting(values, block, final=False)) if rules else {}
            for rule, (when, changes) in enumerate(rules, first):
                if matches(keys, when):
                    idle.pop(rule, None)
                    # What the command line says is put on top again: no file overrides it.
                    values = _merged(values, changes, given)
                    source = f"settings[{rule}]" if rule >= 0 else "settings_from"
                    _check_not_in_vain(changes, values, f"{where}: {source}: set: ")
                    keys = keys_of(shared.fitting(values, block, final=False))
            config = TrialConfig.from_dict(shared.fitting(values, block), where=place)
            _check_not_in_vain(given, values, f"{place}: --set ")
            found.append((config, values))
    unmet = [f"{where}: settings[{rule}] matches no cell: {when}" for rule, when in idle.items() if rule >= 0]
    return found, shared, unmet


def _check_not_in_vain(changes: Mapping[str, Any], values: Mapping[str, Any], place: str) -> None:
    """Refuse a change of a key that changes nothing, since the cell has another one in its place."""
    for key, other in (("tasks", "increments"), ("class_order_seed", "fixed_class_order")):
        if key in changes and values.get(other) is not None:
            raise ConfigError(
                f"{place}{key}={changes[key]}: the cell has {other}={values[other]}, which is in its place; set that"
            )


def _content(file: Path, where: str) -> Any:
    """What stands in a YAML file.

    Args:
        file: its path.
        where: the place that names it, for the message.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {there[0]!r}?" if there else ""
        raise ConfigError(f"{where}: cannot be read: No such file or directory{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_yaml(text, where)


def _check_sections(content: Any, where: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected a mapping with a 'grid' list, got {type(content).__name__}")
    for key in content:
        if key not in SECTIONS:
            raise unknown("section", key, SECTIONS, where=where)
    if "grid" not in content:
        if "include" not in content:
            raise ConfigError(
                f"{where}: grid: expected a list of mappings (blocks), or an 'include' list of grid files"
            )
        for key in _OF_OWN_CELLS:
            if key in content:
                raise ConfigError(
                    f"{where}: {key}: concerns the cells of this file's own 'grid', of which there is none; "
                    "included files keep what they say"
                )


def _check_imports(content: Mapping[str, Any], where: str, folder: Path) -> None:
    """Refuse a grid whose Python files are not imported: a grid file alone runs no code that it names there."""
    for file in _named_files(content, "imports", where, folder, (), "Python files"):
        if not is_imported(file):
            if not file.is_file():
                raise ConfigError(f"{where}: imports: {file}: no such file")
            raise ConfigError(
                f"{where}: imports: {file}: a grid file runs no Python by itself; name it on the command line too: "
                f"--import {file}"
            )


def _name(value: Any, where: str) -> str:
    """The name of a grid, which files and folders of its results are called by."""
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w .+-]{0,99}", value):
        raise ConfigError(
            f"{where}: name={value!r}: expected letters, digits, spaces and . _ + - (at most 100, a letter or digit first): "
            "results are stored under it"
        )
    return value


def _named_files(
    content: Mapping[str, Any],
    section: str,
    where: str,
    folder: Path,
    trail: tuple[Path, ...],
    kind: str = "grid files",
) -> list[Path]:
    """The files that a section names, none of which may be among those that led here."""
    names = content.get(section, [])
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or (section in content and not names)
    ):
        raise ConfigError(f"{where}: {section}: expected a list of {kind}, got {names!r}")
    files = [folder / Path(name).expanduser() for name in names]
    for file in files:
        try:
            file.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a NUL, half a character
            raise ConfigError(f"{where}: {section}: {str(file)!a} is no file name: {error}") from error
        before = [other.resolve() for other in trail]
        if file.resolve() in before:
            round_trip = " -> ".join(map(str, [*trail[before.index(file.resolve()) :], file]))
            raise ConfigError(f"{where}: {section}: {file} leads back to itself: {round_trip}")
    return files


def _rules(content: Mapping[str, Any], where: str, folder: Path, trail: tuple[Path, ...]) -> list[Rule]:
    """The settings of a file: those it takes from others, then its own."""
    rules: list[Rule] = []
    for file in _named_files(content, "settings_from", where, folder, trail):
        other = _content(file, f"{where}: settings_from: {file}")
        _check_sections(other, str(file))
        rules += _rules(other, str(file), file.parent, (*trail, file))
    settings = content.get("settings") or []
    if not isinstance(settings, list):
        raise ConfigError(f"{where}: settings: expected a list, got {settings!r}")
    return rules + [_rule(rule, f"{where}: settings[{number}]") for number, rule in enumerate(settings)]


def parse_override(text: str) -> tuple[str, Any]:
    """``"seed=[0, 1]"`` -> ``("seed", [0, 1])``; values are YAML, a dotted key reaches into options."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {text}: expected KEY=VALUE")
    try:
        return name.strip(), load_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: not a YAML value: {error}") from None


def merge_overrides(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Overrides as the keys of one cell: dotted keys reach into options."""
    return _merged(*({key: value} for key, value in pairs))


def _product(block: Mapping[str, Any], where: str) -> Iterable[dict[str, Any]]:
    """All combinations of a block's lists; dotted keys (``method_options.alpha``) are axes inside options."""
    check_keys(block, where)
    axes = [[(key, value) for value in as_list(values)] for key, values in block.items()]
    for empty in (key for key, values in block.items() if values == []):
        raise ConfigError(f"{where}: {empty}: the list is empty")
    for combination in itertools.product(*axes):
        yield _merged(dict(combination))


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of all parts, later ones on top; options are merged one by one."""
    values: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            _put(values, key, value)
    return values


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    section, dot, option = key.partition(".")
    if section not in NESTED:
        values[key] = value
        return
    before = values.get(section, {})
    if not isinstance(before, Mapping):
        raise ConfigError(f"{section}={before!r}: expected a mapping")
    if dot:
        values[section] = {**before, option: value}
    else:
        values[key] = {**before, **value} if isinstance(value, Mapping) else value


def _rule(rule: Any, where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    when, changes = parse_rule(rule, where)
    if not isinstance(changes, Mapping):
        raise ConfigError(f"{where}: set: expected a mapping, got {changes!r}")
    check_keys(changes, f"{where}: set")
    return when, changes
