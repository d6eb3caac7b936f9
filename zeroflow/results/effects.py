"""What changes by changing one thing, in the paper and in a store of other data: small data can show an effect too."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.results.differences import USUAL
from zeroflow.results.estimates import Estimate, estimate
from zeroflow.results.published import DATASETS, ENHANCED, METRICS, ORDER, agrees, cells_once, published, rows
from zeroflow.results.schema import CONFIG_KEYS
from zeroflow.results.summary import problem_names, same_problem

# What a pair has in common beside its problem and its seed; the learning rate and what belongs to it is each one's own.
_ALIKE = ("method_options", "epochs", "batch_size", "schedule", "classifier", "classifier_options", "loss", "later")

_Streams = dict[tuple[Any, ...], dict[int, list[float]]]


@dataclass(frozen=True)
class Effect:
    """A difference between two settings: the paper's, and ours on other data, paired by seed within each class order.

    Attributes:
        name: of the change.
        metric: avg, last or fgt.
        paper: percentage points; None: the paper has no number.
        expected: the paper's sign, +1 or -1; 0: no claim.
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
        """Whether ours has the paper's sign: ``n.s.`` where the 95 % interval holds 0, ``one seed`` where there is none."""
        if self.ours is None:
            return "not measured"
        if self.ours.half_width is None:
            return "one seed"
        if not self.expected or abs(self.ours.mean) <= self.ours.half_width:
            return "n.s."
        return "yes" if self.ours.mean * self.expected > 0 else "no"


def effects(table: str, trials: pa.Table) -> list[Effect]:
    """The effects that a table or figure of the paper shows, beside those in a store of other data.

    Args:
        table: ``table1`` (each optimizer minus the first-order one; the paper's is the mean over its data sets), ``table3``
            and ``table4`` (with the enhancement minus without), ``figure5`` (q queries minus one) or ``hybrid`` (the last
            epochs zeroth-order minus all first-order).
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

    The second says how much to expect of the first. None: not all optimizers were measured on the same streams and seeds.
    """
    paper = {
        name: [published(method, optimizer, name).values["avg"] for optimizer in ORDER] for name in DATASETS.values()
    }
    mean = [statistics.fmean(values) for values in zip(*paper.values(), strict=True)]
    cells = cells_once(trials)
    found = [_streams(cells, {"method": method, "optimizer": name, "queries": _one(name)}, {}, "avg") for name in ORDER]
    ours = [statistics.fmean(values) for values in zip(*_together(*found), strict=True)]
    between = [_tau(a, b) for number, a in enumerate(paper.values()) for b in list(paper.values())[:number]]
    return (_tau(ours, mean) if ours else None), statistics.fmean(between)


def alike(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two cells must have in common for their difference to be that of their optimizers.

    Args:
        config: keys of a row of the table ``trials``; the null of older files and an empty text are one value.
    """
    unset = {"checkpoint": "hub", **USUAL}
    values = {key: None if value in ("", "{}", 0, unset.get(key)) else value for key, value in config.items()}
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


def _table1_effects(cells: Sequence[Mapping[str, Any]]) -> Iterator[Effect]:
    for method in ("ease", "aper-adapter"):
        for name in ORDER:
            base = "fo-adam" if "adam" in name else "fo-sgd"
            if name == base:
                continue
            configs = [{"method": method, "optimizer": other, "queries": _one(other)} for other in (name, base)]
            for metric in METRICS:
                with_, without = (
                    statistics.fmean(published(method, other, d).values[metric] for d in DATASETS.values())
                    for other in (name, base)
                )
                ours = _paired(*(_streams(cells, config, {}, metric) for config in configs))
                yield _effect(f"{method}: {name} - {base}", metric, with_ - without, ours, configs[0])


def _enhancement_effects(table: str, cells: Sequence[Mapping[str, Any]]) -> Iterator[Effect]:
    without, *others = rows(table)
    config = {"method": "ease", "optimizer": "zo-sgd", "queries": 1}
    for row in others:
        ((option, share),) = row.options.items()
        for metric in METRICS:
            ours = _paired(
                _streams(cells, config, row.options, metric, _rule),
                _streams(cells, config, {}, metric, _rule),
            )
            paper = row.values[metric] - without.values[metric]
            yield _effect(f"{option} {share:.0%} - 0%", metric, paper, ours, config)


def _query_effects(cells: Sequence[Mapping[str, Any]]) -> Iterator[Effect]:
    """Figure 5 has no numbers; its text says that accuracy rises with the queries, at as many epochs."""
    kinds = {
        (c["method"], c["optimizer"], c["epochs"], c["queries"])
        for c in cells
        if (c["queries"] or 1) > 1 and not c["later"]
    }
    for method, name, epochs, queries in sorted(kinds):
        config = {"method": method, "optimizer": name, "epochs": epochs}
        one, many = (_streams(cells, {**config, "queries": q}, {}, "avg") for q in (1, queries))
        own = _filters({**config, "queries": queries})
        yield Effect(f"{method}, {name}: q = {queries} - q = 1", "avg", None, 1, _paired(many, one), own)


def _hybrid_effects(cells: Sequence[Mapping[str, Any]]) -> Iterator[Effect]:
    """The first version's text says that the last epochs zeroth-order gain over first order alone, in later stages above all."""
    kinds = {
        (c["method"], c["optimizer"], c["epochs"], c["hybrid_epochs"], c["queries"])
        for c in cells
        if c["hybrid_epochs"] and not c["later"]
    }
    for method, name, epochs, exact, queries in sorted(kinds):
        base = "fo-adam" if "adam" in name else "fo-sgd"
        config = {"method": method, "optimizer": name, "epochs": epochs, "hybrid_epochs": exact, "queries": queries}
        alone = {"method": method, "optimizer": base, "epochs": epochs}
        # First order alone at the rate that the hybrid's exact gradients took.
        rates = {exact_lr(cell) for cell in cells if agrees(cell, {**config, "later": None}, {})}
        at_rate = [cell for cell in cells if cell["lr"] in rates]
        for metric in ("avg", "last"):
            ours = _paired(_streams(cells, config, {}, metric), _streams(at_rate, alone, {}, metric))
            name_ = f"{method}: {exact} + {epochs - exact} {name} - {epochs} {base}"
            yield Effect(name_, metric, None, 1, ours, _filters(config))


def _effect(name: str, metric: str, paper: float, ours: Estimate | None, config: Mapping[str, Any]) -> Effect:
    paper = round(paper, 4)  # published with two decimals
    return Effect(name, metric, paper, int(math.copysign(1, paper)) if paper else 0, ours, _filters(config))


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


def _streams(
    cells: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    options: Mapping[str, float],
    metric: str,
    besides: Callable[[Mapping[str, Any]], tuple[Any, ...]] = lambda _: (),
) -> _Streams:
    """A metric by what pairs have in common, and by seed; no cell that changes its settings on the way counts.

    Args:
        cells: from ``published.cells_once``.
        config: the setting.
        options: its optimizer's enhancements.
        metric: avg, last or fgt.
        besides: what pairs have in common beside what ``alike`` says.
    """
    found: _Streams = {}
    config = {"hybrid_epochs": 0, "later": None, **config}
    for cell in cells:
        if cell[metric] is not None and agrees(cell, config, options):
            found.setdefault((alike(cell), besides(cell)), {}).setdefault(cell["seed"], []).append(cell[metric])
    return found


def _together(*settings: _Streams) -> Iterator[tuple[float, ...]]:
    """The values of all settings at every stream and seed that all have.

    A stream gives nothing where a seed has several cells that agree, of several learning rates, say: none is picked.
    """
    first, *others = settings
    for stream in first:
        if all(stream in other for other in others):
            by_seed = [setting[stream] for setting in settings]
            seeds = sorted(set.intersection(*map(set, by_seed)))
            if all(len(values) == 1 for own in by_seed for values in own.values()):
                yield from (tuple(own[seed][0] for own in by_seed) for seed in seeds)


def _paired(first: _Streams, second: _Streams) -> Estimate | None:
    differences = [one - other for one, other in _together(first, second)]
    return estimate(differences) if differences else None
