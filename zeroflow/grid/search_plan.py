"""The searches of a grid: which cells are searched together, and the candidates that the budget pays for."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroflow.data import datasets
from zeroflow.errors import ConfigError
from zeroflow.grid.cost_estimate import forward_equivalents
from zeroflow.grid.grid_file import Grid
from zeroflow.grid.rules import look_up, matches
from zeroflow.grid.search_settings import SearchSettings
from zeroflow.trial.config import TrialConfig

_NAMED = ("dataset", "method", "optimizer")

# What the training data of a first task does not depend on: it is counted once for all cells that agree on the rest.
_NOT_OF_THE_DATA = (
    "method", "method_options", "optimizer", "optimizer_options", "lr", "eps", "queries", "schedule", "epochs", "hybrid_epochs",
    "seed", "probe_every", "dtype", "backbone", "checkpoint", "image_size", "transform", "preprocessing",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """Values to try, and the cells that try them, one for each seed of the search."""

    lr: float
    eps: float | None
    cells: Sequence[TrialConfig]


@dataclass(frozen=True)
class Search:
    """One search: what is chosen together.

    Attributes:
        cells: of the grid, for which values are chosen.
        shared: keys that all candidates have in common, in normal form.
        when: the condition of a rule that concerns ``cells`` and no other cells of the grid.
        eps: whether it is searched too.
        candidates: what the budget pays for.
        cost: forward-equivalents of one candidate.
        exhausted: there are no more to try.
    """

    cells: Sequence[TrialConfig]
    shared: Mapping[str, Any]
    when: Mapping[str, Any]
    eps: bool
    candidates: Sequence[Candidate]
    cost: int
    exhausted: bool

    @property
    def label(self) -> str:
        """A short name for messages."""
        return " ".join(f"{key}={value}" if key not in _NAMED else str(value) for key, value in self.when.items())

    def search_id(self, grid: str) -> str:
        """Tells it from the searches of other cells, and of other grids."""
        return hashlib.sha256(_json([grid, self.shared]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SearchPlan:
    """The searches of a grid.

    Attributes:
        searches: those whose data is here.
        waiting: cells whose data set is not, by data set.
        kept: cells that train and are not searched.
    """

    grid: Grid
    settings: SearchSettings
    searches: Sequence[Search]
    waiting: Mapping[str, int]
    kept: int

    @property
    def candidates(self) -> Grid:
        """The cells of all candidates as a grid of their own; the first ones of all searches come first."""
        turns = itertools.zip_longest(*(search.candidates for search in self.searches))
        cells = [config for turn in turns for candidate in turn if candidate for config in candidate.cells]
        return Grid(f"{self.grid.name}_search", cells, self.grid.placement)

    def describe(self) -> str:
        """The plan as text."""
        settings = self.settings
        lines = [
            f"search {self.grid.name}: {len(self.searches)} searches of {settings.forward_passes:,} forward-equivalents each, "
            f"judged on {settings.validation:g} of the first task's training data, seeds {list(settings.seeds)}"
        ]
        for search in self.searches:
            tried = [candidate.lr for candidate in search.candidates]
            eps = sorted({candidate.eps for candidate in search.candidates if search.eps and candidate.eps})
            lines.append(
                f"  {search.label}: {len(tried)} tries of {search.cost:,}, {len(tried) * search.cost:,} in all; "
                f"lr {min(tried):g} to {max(tried):g}"
                + (f"; eps {', '.join(f'{value:g}' for value in eps)}" if eps else "")
                + ("; no more values to try" if search.exhausted else "")
            )
        lines += [
            f"  {dataset}: {count} cells wait for their data set. {datasets.get(dataset).where}"
            for dataset, count in self.waiting.items()
        ]
        if self.kept:
            lines.append(f"  {self.kept} cells are not searched and keep their lr and eps")
        return "\n".join(lines)


def plan_search(grid: Grid, data_dir: str | None) -> SearchPlan:
    """What the budget pays for. Data sets are opened, no image is looked at.

    Args:
        grid: its own cells are searched, those of included files by their own files.
        data_dir: of the data sets.

    Raises:
        ConfigError: no section ``search``, nothing to search, seeds that the grid uses, or a budget that does not pay for one candidate (the message
            says for which and how much they need).
    """
    settings, where = grid.search, f"grid {grid.name}: search"
    if settings is None:
        raise ConfigError(f"{where}: the file has no such section; see docs/search.md")
    trained = [(config, values) for config, values in grid.own if config.optimizer is not None]
    wanted = [
        (config, values)
        for config, values in trained
        if matches(vars(config), settings.when) and settings.lr_of(str(config.optimizer)) is not None
    ]
    if not wanted:
        raise ConfigError(f"{where}: no cell that trains meets 'when' and has an optimizer with a line in 'lr'")
    if shared := sorted({config.seed for config, _ in wanted} & set(settings.seeds)):
        raise ConfigError(f"{where}: seeds={list(settings.seeds)}: the grid's own cells use {shared}; take others")
    gone = {
        name
        for name in {config.dataset for config, _ in wanted}
        if datasets.get(name).missing(None if data_dir is None else Path(data_dir))
    }
    waiting = Counter(config.dataset for config, _ in wanted if config.dataset in gone)
    known: dict[str, int] = {}

    def batches(config: TrialConfig) -> int:
        return _batches(config, data_dir, grid.placement.of(config).cache_bytes, known)

    searches, too_dear = [], []
    unusable: dict[str, str] = {}
    for cells, when in _groups(wanted, trained, settings):
        if (dataset := cells[0].dataset) in gone or dataset in unusable:
            continue
        try:
            search = _search(cells, when, settings, batches)
        except ConfigError as error:
            unusable[dataset] = str(error)
            continue
        if search.candidates:
            searches.append(search)
        else:
            too_dear.append(f"{search.label} needs {search.cost:,}")
    if unusable:
        raise ConfigError("\n".join(unusable.values()))
    if too_dear:
        raise ConfigError(
            f"{where}: forward_passes={settings.forward_passes:,} does not pay for one try: {'; '.join(too_dear)}"
        )
    kept = len({config.cell_id for config, _ in trained} - {config.cell_id for config, _ in wanted})
    return SearchPlan(grid, settings, searches, waiting, kept)


def shared_keys(config: TrialConfig, settings: SearchSettings) -> dict[str, Any]:
    """The keys in which cells that are searched together agree, in normal form."""
    free = {"seed", "lr", "validation", "stop_after", "probe_every"}
    if settings.eps_of(str(config.optimizer)) is not None:
        free.add("eps")
    if settings.queries != "each":
        free.add("queries")
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in free}


def _groups(
    wanted: Sequence[tuple[TrialConfig, Mapping[str, Any]]],
    trained: Sequence[tuple[TrialConfig, Mapping[str, Any]]],
    settings: SearchSettings,
) -> Iterator[tuple[list[TrialConfig], dict[str, Any]]]:
    """Cells that are searched together, and the condition that tells them from all other cells of the grid."""
    groups: dict[str, list[tuple[TrialConfig, Mapping[str, Any]]]] = defaultdict(list)
    flat: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for config, _ in trained:
        keys = shared_keys(config, settings)
        flat[_kind(config)][_json(keys)] = _flat(keys)
    for config, values in wanted:
        groups[_json(shared_keys(config, settings))].append((config, values))
    for members in groups.values():
        first = members[0][0]
        others = list(flat[_kind(first)].values())
        names = list(dict.fromkeys(name for keys in others for name in keys))
        telling = [name for name in names if len({_json(keys.get(name)) for keys in others}) > 1]
        when = {name: getattr(first, name) for name in _NAMED}
        for name in telling:
            # As the file spells it: a rule looks at that.
            spelled = list({_json(look_up(values, name)): look_up(values, name) for _, values in members}.values())
            when[name] = spelled[0] if len(spelled) == 1 and not isinstance(spelled[0], list) else spelled
        yield list({config.cell_id: config for config, _ in members}.values()), when


def _kind(config: TrialConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in _NAMED)


def _flat(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with options dotted."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{option}": content for option, content in value.items()}
        else:
            found[key] = value
    return found


def _search(
    cells: list[TrialConfig],
    when: Mapping[str, Any],
    settings: SearchSettings,
    batches: Callable[[TrialConfig], int],
) -> Search:
    fewest = min(cells, key=lambda config: config.queries or 0)
    optimizer = str(fewest.optimizer)
    common = {**dataclasses.asdict(fewest), "validation": settings.validation, "stop_after": 1, "probe_every": None}
    if isinstance(settings.queries, int):
        common["queries"] = settings.queries
    first = TrialConfig.from_dict({**common, "seed": settings.seeds[0]})
    cost = forward_equivalents(first, batches(first)) * len(settings.seeds)
    rates, sizes = settings.lr_of(optimizer), settings.eps_of(optimizer)
    assert rates is not None
    values = ((lr, eps) for lr in rates for eps in sizes or [fewest.eps])
    paid = list(itertools.islice(values, settings.forward_passes // cost))
    candidates = [
        Candidate(
            lr, eps, [TrialConfig.from_dict({**common, "lr": lr, "eps": eps, "seed": seed}) for seed in settings.seeds]
        )
        for lr, eps in paid
    ]
    shared = {key: value for key, value in dataclasses.asdict(first).items() if key not in ("lr", "seed")}
    if sizes is not None:
        del shared["eps"]
    return Search(cells, shared, when, sizes is not None, candidates, cost, next(values, None) is None)


def _batches(config: TrialConfig, data_dir: str | None, cache_bytes: int, known: dict[str, int]) -> int:
    """Mini-batches of an epoch of the first task."""
    from zeroflow.trial.stream import training_batches

    key = _json({key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_OF_THE_DATA})
    if key not in known:
        known[key] = training_batches(config, data_dir, cache_bytes)[0]
    return known[key]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
