"""A grid file: YAML that names the cells of a sweep.

    name: example
    base: {dataset: quickdraw100, epochs: 5}      # keys of every cell
    grid:                                         # blocks; each is the product over its lists
      - {method: simplecil}
      - {method: [ease, aper-adapter], optimizer: [fo-sgd, zo-sgd], queries: [1, 4], seed: [0, 1, 2]}
    settings:                                     # values for the cells that match, later ones win
      - {when: {optimizer: zo-sgd}, set: {lr: 0.001}}
      - {when: {queries: ">= 8"}, set: {epochs: 2}}         # conditions: see ``zeroflow.sweep.rules``
    placement: {workers_per_trial: 1, cpus_per_worker: 1, gpus_per_worker: 0}    # see ``zeroflow.sweep.placement``

Every key of ``TrialConfig`` may stand in ``base``, in a block and in ``set``. A list in ``base`` and in a block is an axis,
so there a value that is a list itself is written as a list in a list (``increments: [[50, 25, 25]]``). Cells that come out
equal (a method that does not train ignores the optimizer, for example) are one cell.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zeroflow.errors import ConfigError, unknown
from zeroflow.methods import methods
from zeroflow.optim import optimizers
from zeroflow.registry import Registry
from zeroflow.sweep.placement import SweepPlacement, parse_placement
from zeroflow.sweep.rules import as_list, check_keys, matches, parse_rule
from zeroflow.trial.config import TrialConfig

SECTIONS = ("name", "base", "grid", "settings", "placement", "data_dir")


@dataclass(frozen=True)
class Grid:
    """The cells of a grid file, each once, in the order of the file."""

    name: str
    cells: Sequence[TrialConfig]
    placement: SweepPlacement = field(default_factory=SweepPlacement)
    data_dir: str | None = None


def load_grid(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Grid:
    """Read a grid file.

    Args:
        path: the YAML file.
        overrides: values that replace a key in every cell; a list makes an axis of it.

    Raises:
        ConfigError: the file is missing or not such a grid, or a cell is wrong; the message says where and what is right.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    return parse_grid(content, overrides, where=str(path), default_name=file.stem)


def parse_grid(
    content: Any, overrides: Mapping[str, Any] | None = None, *, where: str = "grid", default_name: str = "grid"
) -> Grid:
    """Build a grid from the content of a grid file; see ``load_grid``."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected a mapping with a 'grid' list, got {type(content).__name__}")
    for key in content:
        if key not in SECTIONS:
            raise unknown("section", key, SECTIONS, where=where)
    blocks, base = content.get("grid"), content.get("base") or {}
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, Mapping) for block in blocks):
        raise ConfigError(f"{where}: grid: expected a list of mappings (blocks), got {blocks!r}")
    if not isinstance(base, Mapping):
        raise ConfigError(f"{where}: base: expected a mapping, got {base!r}")
    settings = content.get("settings") or []
    if not isinstance(settings, list):
        raise ConfigError(f"{where}: settings: expected a list, got {settings!r}")
    rules = [_rule(rule, f"{where}: settings[{number}]") for number, rule in enumerate(settings)]
    changed = dict(overrides or {})
    # What stands in every block's place belongs to the cells that know it; what a block says must fit its cells.
    shared = _Shared(base, changed, where)

    cells: dict[str, TrialConfig] = {}
    for number, block in enumerate(blocks):
        place = f"{where}: grid[{number}]"
        parts = (_product(base, f"{where}: base"), _product(block, place), _product(changed, "--set"))
        for common, own, given in itertools.product(*map(list, parts)):
            values = _merged(common, own, given)
            for when, changes in rules:
                if matches(values, when):
                    # What the command line says is put on top again: no file overrides it.
                    values = _merged(values, changes, given)
            config = TrialConfig.from_dict(shared.fitting(values, block), where=place)
            cells.setdefault(config.cell_id, config)
    shared.all_used()
    placement = parse_placement(content.get("placement") or {}, where)
    data_dir = content.get("data_dir")
    if not isinstance(data_dir, str | None):
        raise ConfigError(f"{where}: data_dir: expected a folder, got {data_dir!r}")
    return Grid(str(content.get("name", default_name)), tuple(cells.values()), placement, data_dir)


class _Shared:
    """Options that ``base`` and the command line give to all cells: dropped where a cell's method or optimizer lacks them.

    An option that no cell knows is an error.
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

    def fitting(self, values: Mapping[str, Any], block: Mapping[str, Any]) -> Mapping[str, Any]:
        """``values`` of one cell without the shared options that mean nothing to it."""
        if not self.options:
            return values
        found = dict(values)
        for section, names in (
            ("method_options", _option_names(methods, values.get("method", TrialConfig.method))),
            ("optimizer_options", _option_names(optimizers, values.get("optimizer", TrialConfig.optimizer))),
        ):
            self.known |= names
            own = block.get(section) or {}
            if isinstance(values.get(section), Mapping):
                kept = {}
                for name, value in values[section].items():
                    shared = (section, name) in self.options and name not in own and f"{section}.{name}" not in block
                    if not shared or name in names:
                        kept[name] = value
                        self.unused.pop((section, name), None)
                found[section] = kept
        return found

    def all_used(self) -> None:
        """Raise for the first shared option that no cell knew."""
        for (section, name), place in self.unused.items():
            raise unknown(f"option in {section}", name, self.known, where=place)


def _option_names(registry: Registry[Any], name: Any) -> set[str]:
    try:
        options = registry.get(name).options
    except ConfigError:
        return set()  # the cell's own check says what is wrong with the name
    return {f.name for f in dataclasses.fields(options)} if dataclasses.is_dataclass(options) else set(options)


def parse_override(text: str) -> tuple[str, Any]:
    """``"seed=[0, 1]"`` -> ``("seed", [0, 1])``; values are YAML, a dotted key reaches into options."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {text}: expected KEY=VALUE")
    try:
        return name.strip(), yaml.load(value, _Loader)
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
    if not section.endswith("_options"):
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


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, and a key given twice is an error instead of a silent loss."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
