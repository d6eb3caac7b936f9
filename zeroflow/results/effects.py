"""What changes by changing one thing, in the paper and in a store of other data: small data can show an effect too."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.results.differences import USUAL, Differences
from zeroflow.results.estimates import ROUNDING, Estimate, measured
from zeroflow.results.published import DATASETS, ENHANCED, METRICS, ORDER, agrees, cells_once, published, rows
from zeroflow.results.schema import CONFIG_KEYS
from zeroflow.results.summary import problem_names, same_problem

# What a pair has in common beside its problem and its seed; the learning rate and what belongs to it is each one's own.
_ALIKE = ("method_options", "epochs", "batch_size", "schedule", "classifier", "classifier_options", "loss", "later")
_ORDERS = ("class_order_seed", "fixed_class_order")
_RATE = ("lr", "eps", "optimizer_options")

_Cell = Mapping[str, Any]
_Cells = dict[tuple[Any, ...], dict[tuple[Any, ...], list[_Cell]]]
"""By what pairs have in common, and by class order."""


@dataclass(frozen=True)
class Effect:
    """A difference between two settings: the paper's, and ours on other data, paired by seed within each class order.

    Attributes:
        name: of the change; where it was made at several settings, with what tells those apart.
        metric: avg, last or fgt.
        paper: percentage points; None: the paper has no number.
        expected: the paper's sign, +1 or -1; 0: its number is shown as 0.00, and claims none.
        ours: None where not measured.
        filters: method, optimizer and queries of the setting with the change.
    """

    name: str
    metric: str
    paper: float | None
    expected: int
    ours: Estimate | None
    filters: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether ours has the paper's sign: ``n.s.`` where the 95 % interval holds 0, ``one seed`` where there is none.

        ``tie``: what is shown of the paper's number, or of ours, is 0.00, which has no sign. ``no spread``: all pairs have the same difference, which no interval can be made of.
        """
        if self.ours is None:
            return "not measured"
        if self.ours.half_width is None:
            return "one seed"
        if not self.expected:
            return "tie"
        if abs(self.ours.mean) <= self.ours.half_width + ROUNDING:
            return "n.s."
        if not round(self.ours.mean, 2):
            return "tie"
        if not self.ours.half_width:
            return "no spread"
        return "yes" if self.ours.mean * self.expected > 0 else "no"


def effects(table: str, trials: pa.Table) -> list[Effect]:
    """The effects that a table or figure of the paper shows, beside those in a store of other data.

    Args:
        table: ``table1`` (each optimizer minus the first-order one; the paper's is the mean over its data sets), ``table3``
            and ``table4`` (with the enhancement minus without), ``figure5`` (q queries minus one, at as many epochs) or
            ``hybrid`` (the last epochs zeroth-order minus all first-order).
        trials: the table ``trials`` of the store that has the same settings on one data set and stream, see ``by_stream``.
    """
    cells = cells_once(trials)
    if table == "table1":
        return list(_table1_effects(cells))
    if table in ENHANCED:
        return list(_enhancement_effects(table, cells))
    if table == "figure5":
        return list(_query_effects(cells))
    if table == "hybrid":
        return list(_hybrid_effects(cells))
    raise KeyError(table)


def by_stream(trials: pa.Table) -> Iterator[tuple[str, str, pa.Table]]:
    """The rows of each stream, with the names of its data set and, where that has several, of the stream.

    Class orders stay together: differences within each are repetitions, as those of seeds are. Those on other task sequences,
    backbones or kinds of access are of other problems.
    """
    streams: dict[str, dict[tuple[Any, ...], list[dict[str, Any]]]] = {}
    for cell in trials.select([*CONFIG_KEYS, "cell_id"]).to_pylist():
        cell |= {"class_order_seed": None, "fixed_class_order": None}
        streams.setdefault(cell["dataset"], {}).setdefault(same_problem(cell), []).append(cell)
    for dataset, problems in sorted(streams.items()):
        names = problem_names([cell for own in problems.values() for cell in own])
        for problem, own in problems.items():
            ids = pa.array([cell["cell_id"] for cell in own])
            yield dataset, names[problem], trials.filter(pc.is_in(trials["cell_id"], ids))


def order(method: str, trials: pa.Table) -> tuple[float | None, float]:
    """Kendall's tau of the order of Table 1's optimizers by Avg: ours to the paper's mean, and between its data sets.

    The second says how much to expect of the first. Ours is the mean over all settings, streams and seeds that all optimizers
    have; None: there are none.
    """
    paper = {
        name: [published(method, optimizer, name).values["avg"] for optimizer in ORDER] for name in DATASETS.values()
    }
    mean = [statistics.fmean(values) for values in zip(*paper.values(), strict=True)]
    cells = cells_once(trials)
    found = [_cells(cells, {"method": method, "optimizer": name, "queries": _one(name)}) for name in ORDER]
    measured = [[cell["avg"] for cell in own] for cells_ in _together(*found) for own in cells_]
    ours = [statistics.fmean(values) for values in zip(*measured, strict=True)]
    between = [_tau(a, b) for number, a in enumerate(paper.values()) for b in list(paper.values())[:number]]
    return (_tau(ours, mean) if ours else None), statistics.fmean(between)


def alike(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two cells must have in common for their difference to be that of their optimizers.

    Args:
        config: keys of a row of the table ``trials``; the null of older files and an empty text are one value.
    """
    values = {key: None if value in ("", "{}", 0, USUAL.get(key)) else value for key, value in config.items()}
    return (*same_problem(values), values["method"], *(values[key] for key in _ALIKE))


def exact_lr(config: Mapping[str, Any]) -> float | None:
    """The learning rate of a hybrid cell's exact gradients: ``hybrid_lr``, or that of all its steps."""
    own = json.loads(config["optimizer_options"] or "{}").get("hybrid_lr")
    return config["lr"] if own is None else own


def _tau(first: Sequence[float], second: Sequence[float]) -> float:
    from scipy import stats  # late: it takes a second

    return float(stats.kendalltau(first, second).statistic)


def _one(optimizer: str) -> int | None:
    return None if optimizer.startswith("fo-") else 1


def _table1_effects(cells: Sequence[_Cell]) -> Iterator[Effect]:
    for method in ("ease", "aper-adapter"):
        for name in ORDER:
            base = "fo-adam" if "adam" in name else "fo-sgd"
            if name == base:
                continue
            with_, without = (
                [published(method, optimizer, data).values for data in DATASETS.values()] for optimizer in (name, base)
            )
            paper = {
                metric: statistics.fmean(v[metric] for v in with_) - statistics.fmean(v[metric] for v in without)
                for metric in METRICS
            }
            config, other = ({"method": method, "optimizer": each, "queries": _one(each)} for each in (name, base))
            yield from _changes(
                f"{method}: {name} - {base}", config, _cells(cells, config), _cells(cells, other), paper
            )


def _enhancement_effects(table: str, cells: Sequence[_Cell]) -> Iterator[Effect]:
    without, *others = rows(table)
    config = {"method": "ease", "optimizer": "zo-sgd", "queries": 1}
    plain = _cells(cells, config, besides=_rule)
    for row in others:
        ((option, share),) = row.options.items()
        paper = {metric: row.values[metric] - without.values[metric] for metric in METRICS}
        enhanced = _cells(cells, config, row.options, _rule)
        yield from _changes(f"{option} {share:.0%} - 0%", config, enhanced, plain, paper)


def _query_effects(cells: Sequence[_Cell]) -> Iterator[Effect]:
    """Figure 5 has no numbers; its text says that accuracy rises with the queries, at as many epochs."""
    kinds = {(c["method"], c["optimizer"], c["queries"]) for c in cells if (c["queries"] or 1) > 1 and not c["later"]}
    for method, name, queries in sorted(kinds):
        config = {"method": method, "optimizer": name, "queries": queries}
        many, one = (_cells(cells, {**config, "queries": q}) for q in (queries, 1))
        yield from _changes(f"{method}, {name}: q = {queries} - q = 1", config, many, one, {"avg": None})


def _hybrid_effects(cells: Sequence[_Cell]) -> Iterator[Effect]:
    """The first version's text says that the last epochs zeroth-order gain over first order alone, in later stages above all."""
    keys = ("method", "optimizer", "epochs", "hybrid_epochs", "queries")
    kinds = {tuple(cell[key] for key in keys) for cell in cells if cell["hybrid_epochs"] and not cell["later"]}
    for kind in sorted(kinds):
        config = dict(zip(keys, kind, strict=True))
        method, name, epochs, exact, queries = kind
        base = "fo-adam" if "adam" in name else "fo-sgd"
        several = f" q={queries}" if (queries or 1) > 1 else ""
        # First order alone at the rate that the hybrid's exact gradients took.
        hybrid = _cells(cells, config, besides=lambda cell: (exact_lr(cell),))
        alone = {"method": method, "optimizer": base, "epochs": epochs}
        yield from _changes(
            f"{method}: {exact} + {epochs - exact} {name}{several} - {epochs} {base}",
            config,
            hybrid,
            _cells(cells, alone, besides=lambda cell: (cell["lr"],)),
            {"avg": None, "last": None},
        )


def _changes(
    name: str, config: Mapping[str, Any], first: _Cells, second: _Cells, paper: Mapping[str, float | None]
) -> Iterator[Effect]:
    """The effects of one change on some metrics: at each setting that both sides were run at; one not measured if there is none.

    Args:
        name: of the change.
        config: the side with the change, by the keys that are filtered by.
        first: that side.
        second: the other one.
        paper: its number by metric; None: it says that there is a gain.
    """
    settings = list(_together(first, second))
    labels = _labels([[one for one, _ in pairs] for pairs in settings]) or [""]
    for pairs, label in zip(settings or [[]], labels, strict=True):
        for metric, number in paper.items():
            number = None if number is None else round(number, 4)  # published with two decimals
            shown = 1.0 if number is None else round(number, 2)  # what a reader cannot see is no claim
            sign = int(math.copysign(1, shown)) if shown else 0
            found = [
                one[metric] - other[metric]
                for one, other in pairs
                if one[metric] is not None and other[metric] is not None
            ]
            own = ", ".join(filter(None, [name, label]))
            yield Effect(own, metric, number, sign, measured(found), _filters(config))


def _labels(settings: Sequence[Sequence[_Cell]]) -> list[str]:
    """What tells settings of one change apart, by keys that all cells of one share; empty for a single one."""
    differences = Differences([cells[0] for cells in settings])
    telling = [
        key
        for key in CONFIG_KEYS
        if key not in ("seed", *_ORDERS)
        and differences.varies(key)
        and all(len({cell[key] for cell in cells}) == 1 for cells in settings)
    ]
    return [differences.label(cells[0], telling) for cells in settings]


def _filters(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: "none" if config[key] is None else str(config[key])
        for key in ("method", "optimizer", "queries")
        if key in config
    }


def _rule(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """A cell's optimizer but for its enhancements, which are added to one that stays as it is."""
    options = json.loads(cell["optimizer_options"] or "{}")
    kept = {name: value for name, value in options.items() if name not in ENHANCED.values()}
    return cell["lr"], cell["eps"], json.dumps(kept, sort_keys=True)


def _cells(
    cells: Sequence[_Cell],
    config: Mapping[str, Any],
    options: Mapping[str, float] = MappingProxyType({}),
    besides: Callable[[_Cell], tuple[Any, ...]] = lambda _: (),
) -> _Cells:
    """The cells of a setting by what pairs have in common; none that changes its settings on the way counts.

    Args:
        cells: from ``published.cells_once``.
        config: the setting.
        options: its optimizer's enhancements.
        besides: what pairs have in common beside what ``alike`` says.
    """
    found: _Cells = {}
    config = {"hybrid_epochs": 0, "later": None, **config}
    for cell in cells:
        if agrees(cell, config, options):
            common = (alike({**cell, **dict.fromkeys(_ORDERS)}), besides(cell))
            order = tuple(cell[key] for key in _ORDERS)
            found.setdefault(common, {}).setdefault(order, []).append(cell)
    return found


def _together(*sides: _Cells) -> Iterator[list[tuple[_Cell, ...]]]:
    """For each setting that all have, their cells of every class order and seed that all have.

    A class order gives nothing where a side has cells of several learning rates or optimizer options there, or several cells of
    a seed: none is picked.
    """
    for setting, orders in sides[0].items():
        found: list[tuple[_Cell, ...]] = []
        for order in orders:
            own = [side.get(setting, {}).get(order, []) for side in sides]
            by_seed = [{cell["seed"]: cell for cell in each} for each in own]
            rates = [
                {tuple(None if cell[key] == "{}" else cell[key] for key in _RATE) for cell in each} for each in own
            ]
            if all(len(r) == 1 and len(s) == len(each) for r, s, each in zip(rates, by_seed, own, strict=True)):
                seeds = sorted(set.intersection(*map(set, by_seed)))
                found += [tuple(each[seed] for each in by_seed) for seed in seeds]
        if found:
            yield found
