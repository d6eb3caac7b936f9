"""The searches of a grid: which cells are searched together, and the candidates that the budget pays for."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zeroflow.data import datasets
from zeroflow.errors import ConfigError, unknown
from zeroflow.grid.cost_estimate import forward_equivalents
from zeroflow.grid.grid_file import Grid, merge_overrides
from zeroflow.grid.labels import flat
from zeroflow.grid.readings import readings
from zeroflow.grid.rules import matches
from zeroflow.grid.search_settings import SearchSettings, Values
from zeroflow.grid.shared_options import known_options
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.keys.values import as_json

_NAMED = ("dataset", "method", "optimizer")

# What the training data of a first task does not depend on: it is counted once for all cells that agree on the rest.
_NOT_OF_THE_DATA = (
    "method", "method_options", "optimizer", "optimizer_options", "lr", "eps", "queries", "schedule", "epochs", "hybrid_epochs",
    "seed", "probe_every", "dtype", "backbone", "checkpoint", "image_size", "transform", "preprocessing",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """Values to try, and the cells that try them, one for each seed of the search.

    Attributes:
        lr: to try.
        eps: to try; None: the optimizer has none.
        cells: one for each seed.
        cost: forward-equivalents of all of them.
        options: to try, by dotted name; empty: none are searched.
    """

    lr: float
    eps: float | None
    cells: Sequence[TrialConfig]
    cost: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """One search: what is chosen together.

    Attributes:
        cells: of the grid, for which values are chosen.
        shared: keys that all candidates have in common, in normal form.
        when: the condition of a rule that concerns ``cells`` and no other cells of the grid.
        eps: whether it is searched too.
        candidates: what the budget pays for.
        cost: forward-equivalents of the first candidate; those of others differ if options that take passes are searched.
        exhausted: there are no more to try.
        options: the dotted names of those that are searched too.
    """

    cells: Sequence[TrialConfig]
    shared: Mapping[str, Any]
    when: Mapping[str, Any]
    eps: bool
    candidates: Sequence[Candidate]
    cost: int
    exhausted: bool
    options: Sequence[str] = ()

    @property
    def label(self) -> str:
        """A short name for messages."""
        return _label(self.when)

    def search_id(self, grid: str) -> str:
        """Tells it from the searches of other cells, of other options, and of other grids."""
        searched = [sorted(self.options)] if self.options else []
        return hashlib.sha256(as_json([grid, self.shared, *searched]).encode()).hexdigest()[:16]

    def rule(self, chosen: Candidate) -> dict[str, Any]:
        """The values of a candidate as a rule of a grid file's ``settings``."""
        sizes = {"eps": chosen.eps} if self.eps else {}
        return {"when": dict(self.when), "set": {"lr": chosen.lr, **sizes, **chosen.options}}

    def describe(self) -> str:
        """Its tries in one line."""
        tries, rates = self.candidates, [candidate.lr for candidate in self.candidates]
        costs = sorted({candidate.cost for candidate in tries})
        each = f"{costs[0]:,}" if len(costs) == 1 else f"{costs[0]:,} to {costs[-1]:,}"
        eps = sorted({candidate.eps for candidate in tries if self.eps and candidate.eps})
        parts = [
            f"{self.label}: {len(tries)} tries of {each}, {sum(candidate.cost for candidate in tries):,} in all",
            f"lr {min(rates):g} to {max(rates):g}",
            *([f"eps {', '.join(f'{value:g}' for value in eps)}"] if eps else []),
        ]
        for name in self.options:
            tried = dict.fromkeys(json.dumps(candidate.options[name], ensure_ascii=False) for candidate in tries)
            parts.append(f"{name} {', '.join(tried)}")
        return "; ".join([*parts, *(["no more values to try"] if self.exhausted else [])])


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

    def extremes(self) -> Iterator[list[dict[str, Any]]]:
        """The rules that all searches write if each chooses its smallest lr, and its largest one."""
        for most in (min, max):
            yield [search.rule(most(search.candidates, key=lambda candidate: candidate.lr)) for search in self.searches]

    def describe(self) -> str:
        """The plan as text."""
        settings = self.settings
        lines = [
            f"search {self.grid.name}: {len(self.searches)} searches of {settings.forward_passes:,} forward-equivalents each, "
            f"judged on {settings.validation:g} of the first task's training data, seeds {list(settings.seeds)}"
        ]
        lines += [f"  {search.describe()}" for search in self.searches]
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
        ConfigError: no section ``search``, nothing to search, seeds that the grid uses, an option that no searched cell knows or that
            cannot have a value that is to be tried, or a budget that does not pay for one candidate (the message says for which
            and how much they need).
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
    _check_known(settings, [config for config, _ in wanted], f"{where}: options")
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
            search = _search(cells, when, settings, batches, where)
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


def _check_known(settings: SearchSettings, cells: Sequence[TrialConfig], where: str) -> None:
    """Refuse an option to try that no cell knows."""
    known = {name for config in cells for name in known_options(vars(config))} if settings.options else set()
    for name in settings.options:
        if name not in known:
            section, _, option = name.partition(".")
            namesakes = [other for other in known if other.partition(".")[2] == option]
            if namesakes:
                raise unknown("option", name, namesakes, where=where)
            own = [other.partition(".")[2] for other in known if other.startswith(f"{section}.")]
            raise unknown(f"option in {section}", option, own, where=where)


def shared_keys(config: TrialConfig, settings: SearchSettings) -> dict[str, Any]:
    """The keys in which cells that are searched together agree, in normal form."""
    free = {"seed", "lr", "validation", "stop_after", "probe_every", "later"}
    if settings.eps_of(str(config.optimizer)) is not None:
        free.add("eps")
    if settings.queries != "each":
        free.add("queries")
    keys = {key: value for key, value in dataclasses.asdict(config).items() if key not in free}
    return _without(keys, settings.options_of(config))


def _without(keys: Mapping[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """The same keys without some options, by dotted name."""
    found = dict(keys)
    for name in options:
        section, _, option = name.partition(".")
        found[section] = {key: value for key, value in found[section].items() if key != option}
    return found


def _groups(
    wanted: Sequence[tuple[TrialConfig, Mapping[str, Any]]],
    trained: Sequence[tuple[TrialConfig, Mapping[str, Any]]],
    settings: SearchSettings,
) -> Iterator[tuple[list[TrialConfig], dict[str, Any]]]:
    """Cells that are searched together, and the condition that tells them from all other cells of the grid."""
    groups: dict[str, list[TrialConfig]] = defaultdict(list)
    dotted: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for config, _ in trained:
        keys = shared_keys(config, settings)
        dotted[_kind(config)][as_json(keys)] = flat(keys)
    for config, _ in wanted:
        groups[as_json(shared_keys(config, settings))].append(config)
    excluded = [config for config, _ in trained if not matches(vars(config), settings.when)]
    for members in groups.values():
        first = members[0]
        others = list(dotted[_kind(first)].values())
        names = list(dict.fromkeys(name for keys in others for name in keys))
        telling = [name for name in names if len({as_json(keys.get(name)) for keys in others}) > 1]
        when = {name: getattr(first, name) for name in _NAMED}
        for name in telling:
            found = readings(vars(first), name)
            # Lists as the normal form has them, where most streams have none.
            value = found[-1] if isinstance(found[0], list) else found[0]
            when[name] = [value] if isinstance(value, list) else value
        if any(matches(vars(config), when) for config in excluded):
            # What cells of a search may differ in, such as queries: the search's own condition tells which are not in it.
            when |= {name: wanted for name, wanted in settings.when.items() if name not in when}
        yield list({config.cell_id: config for config in members}.values()), when


def _kind(config: TrialConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in _NAMED)


def _search(
    cells: list[TrialConfig],
    when: Mapping[str, Any],
    settings: SearchSettings,
    batches: Callable[[TrialConfig], int],
    where: str,
) -> Search:
    fewest = min(cells, key=lambda config: config.queries or 0)
    optimizer, options = str(fewest.optimizer), settings.options_of(fewest)
    common = {
        **dataclasses.asdict(fewest),
        "validation": settings.validation,
        "stop_after": 1,
        "probe_every": None,
        "later": {},
    }
    if isinstance(settings.queries, int):
        common["queries"] = settings.queries
    place = f"{where}: options: {_label(when)}" if options else ""

    def cell(seed: int, values: Mapping[str, Any]) -> TrialConfig:
        return TrialConfig.from_dict(merge_overrides([*common.items(), ("seed", seed), *values.items()]), where=place)

    # The first of every option, then every other value: what is wrong with one that the budget does not reach is told too.
    one_changed = itertools.islice(_combinations(options), 1 + sum(len(values) - 1 for values in options.values()))
    first, *_ = [cell(settings.seeds[0], chosen) for chosen in one_changed]
    steps, count = batches(first), len(settings.seeds)
    rates, sizes = settings.lr_of(optimizer), settings.eps_of(optimizer)
    assert rates is not None

    def tries() -> Iterator[Candidate]:
        for lr, eps, chosen in _in_order(rates, list(sizes or [fewest.eps]), options):
            own = [cell(seed, {"lr": lr, "eps": eps, **chosen}) for seed in settings.seeds]
            yield Candidate(lr, eps, own, forward_equivalents(own[0], steps) * count, chosen)

    candidates, exhausted = _paid(tries(), settings.forward_passes)
    shared = {key: value for key, value in dataclasses.asdict(first).items() if key not in ("lr", "seed")}
    if sizes is not None:
        del shared["eps"]
    cost = forward_equivalents(first, steps) * count
    return Search(
        cells, _without(shared, options), when, sizes is not None, candidates, cost, exhausted, tuple(options)
    )


def _paid(tries: Iterable[Candidate], budget: int) -> tuple[list[Candidate], bool]:
    """What a budget pays for, up to the first that it does not; and whether that is all."""
    found: dict[str, Candidate] = {}
    for candidate in tries:
        if (cell := candidate.cells[0].cell_id) in found:
            continue  # two spellings of one value, such as 0 and 0.0
        budget -= candidate.cost
        if budget < 0:
            return list(found.values()), False
        found[cell] = candidate
    return list(found.values()), True


def _in_order(
    rates: Values, sizes: Sequence[float | None], options: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[float, float | None, dict[str, Any]]]:
    """All values of lr, eps and options, those first that a small budget is to try; see ``zeroflow.grid.search_settings``."""
    for together in rates.rounds():
        for chosen in _combinations(options):
            for lr, eps in itertools.product(together, sizes):
                yield lr, eps, chosen


def _combinations(options: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The first value of every option; then all that differ from it in one option, in two, and so on."""
    firsts = {name: values[0] for name, values in options.items()}
    for number in range(len(options) + 1):
        for names in itertools.combinations(options, number):
            for others in itertools.product(*(options[name][1:] for name in names)):
                yield {**firsts, **dict(zip(names, others, strict=True))}


def _label(when: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" if key not in _NAMED else str(value) for key, value in when.items())


def _batches(config: TrialConfig, data_dir: str | None, cache_bytes: int, known: dict[str, int]) -> int:
    """Mini-batches of an epoch of the first task."""
    from zeroflow.trial.stream import training_batches

    key = as_json({key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_OF_THE_DATA})
    if key not in known:
        known[key] = training_batches(config, data_dir, cache_bytes)[0]
    return known[key]
