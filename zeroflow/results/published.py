"""The paper's numbers in zeroflow's terms, and finished cells beside them.

Source: the ZeroFlow paper, arXiv:2501.01045, Tables 1-4, and Table 1 of the EASE paper (``paper/ATTRIBUTION.md``). A cell
counts as the paper's only if its configuration says so; several settings that do are all shown, none is picked.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import pyarrow as pa
from scipy import stats

from zeroflow.results.schema import CONFIG_KEYS
from zeroflow.results.summary import Estimate, estimate

METRICS = ("avg", "last", "fgt")
DATASETS = {"CIFAR-100": "cifar100", "CUB": "cub", "ImageNet-A": "imagenet-a", "OmniBenchmark": "omnibenchmark"}
METHODS = {"EASE": "ease", "APER": "aper-adapter", "SimpleCIL": "simplecil"}

PROTOCOL: Mapping[str, Any] = {
    "backbone": "vit_base_patch16_224.augreg_in21k", "checkpoint": None, "image_size": None, "dtype": "float32",
    "tasks": 10, "base_classes": None, "increments": None, "class_order_seed": 1993, "fixed_class_order": None,
    "stop_after": None, "validation": 0.0, "hybrid_epochs": 0,
}  # fmt: skip
"""What the configuration of every published row says, as the store has it: pretrained weights, ten tasks, test data."""

# The paper leaves these out, so any value may be its own; every other option makes another method of it.
_FREE_OPTIONS = frozenset(
    ("momentum", "weight_decay", "nesterov", "betas", "eps_adam", "hybrid_lr", "max_skipped", "check_precision")
)
# What EASE's own configurations change from data set to data set.
_FREE_METHOD_OPTIONS = frozenset(("alpha", "beta", "frozen_space", "recalculate_similarity"))
_ENHANCED = {"table3": "history", "table4": "sparsity"}
_ORDER = (
    "fo-sgd", "zo-sgd", "zo-sgd-sign", "zo-sgd-conserve", "fo-adam", "zo-adam", "zo-adam-sign", "zo-adam-conserve",
    "forward-grad",
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published row.

    Attributes:
        table: ``table1``, ``table3``, ``table4``, or ``ease``. label: as the paper calls the row.
        config: keys of a cell that would be this row, beside those of ``PROTOCOL``.
        options: the optimizer's options that make it this row: ``history``, ``sparsity``.
        values: avg, last, fgt where published, percent.
    """

    table: str
    label: tuple[str, ...]
    config: Mapping[str, Any]
    values: Mapping[str, float]
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """Runs this row's cells into the folder where ``docs/reproduction.md`` looks for them."""
        grid = "table1" if self.table == "ease" else self.table
        changes = {key: value for key, value in self.config.items() if key != "queries" and value is not None}
        options = {**({_ENHANCED[self.table]: 0} if self.table in _ENHANCED else {}), **self.options}
        changes |= {f"optimizer_options.{name}": value for name, value in options.items()}
        sets = " ".join(f"--set {key}={value}" for key, value in changes.items())
        return f"python sweeps/full_grid.py --grid sweeps/{grid}.yaml --results results/{grid} {sets}"

    def is_of(self, trial: Mapping[str, Any]) -> bool:
        """Whether a row of the table ``trials`` has this row's configuration."""
        wanted = {**PROTOCOL, **self.config}
        if not _agrees(trial, wanted, self.options):
            return False
        return not json.loads(trial["method_options"] or "{}").keys() - _FREE_METHOD_OPTIONS


@dataclass(frozen=True)
class Comparison:
    """A published row beside the finished cells of one configuration; ``cells`` is empty where there is none.

    Attributes:
        published: the row. config: every key but the seed. cells: ids, by seed. ours: avg, last, fgt over the seeds.
    """

    published: Published
    config: Mapping[str, Any] = field(default_factory=dict)
    cells: tuple[str, ...] = ()
    ours: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        """Whether it was run at all; how close it came is ``difference``."""
        return bool(self.cells)

    def difference(self, metric: str) -> float | None:
        """Ours minus the published value, percentage points; None where either is missing."""
        if metric not in self.ours or metric not in self.published.values:
            return None
        return self.ours[metric].mean - self.published.values[metric]


def rows(table: str | None = None) -> list[Published]:
    """The published rows of ``table1``, ``table3``, ``table4`` or ``ease``; default: of all."""
    enhanced = (row for name, option in _ENHANCED.items() for row in _enhancement(name, option))
    found = [*_table1(), *enhanced, *_ease()]
    return [row for row in found if table in (None, row.table)]


def published(method: str, optimizer: str | None, dataset: str) -> Published:
    """The row of Table 1 of a method, an optimizer and a data set, all by zeroflow's names.

    Raises:
        KeyError: Table 1 has no such row.
    """
    for row in rows("table1"):
        if (row.config["method"], row.config["optimizer"], row.config["dataset"]) == (method, optimizer, dataset):
            return row
    raise KeyError((method, optimizer, dataset))


def compare(trials: pa.Table, published: Iterable[Published] | None = None) -> list[Comparison]:
    """Every published row beside what was measured.

    Args:
        trials: the table ``trials`` of one store, or of several one after the other (a cell counts once).
        published: rows to look for; default: all.

    Returns:
        At least one comparison for each row, several where cells of different settings (learning rates, say) agree with it.
    """
    cells = _cells(trials)
    found: list[Comparison] = []
    for row in rows() if published is None else published:
        groups: dict[str, list[dict[str, Any]]] = {}
        for cell in cells:
            if row.is_of(cell):
                config = {key: cell[key] for key in CONFIG_KEYS if key != "seed"}
                groups.setdefault(json.dumps(config), []).append(cell)
        found += [_comparison(row, json.loads(key), members) for key, members in groups.items()] or [Comparison(row)]
    return found


def _comparison(row: Published, config: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Comparison:
    measured = {
        metric: estimate(values)
        for metric in row.values
        if (values := [cell[metric] for cell in cells if cell[metric] is not None])
    }
    return Comparison(row, config, tuple(cell["cell_id"] for cell in cells), measured)


def _cells(trials: pa.Table) -> list[dict[str, Any]]:
    """Rows by seed, each cell once, with the null of older files for what they did not know yet."""
    found: dict[str, dict[str, Any]] = {}
    for row in trials.select([*CONFIG_KEYS, "cell_id", *METRICS]).sort_by("seed").to_pylist():
        row["validation"], row["hybrid_epochs"] = row["validation"] or 0.0, row["hybrid_epochs"] or 0
        row["checkpoint"] = None if row["checkpoint"] == "hub" else row["checkpoint"]
        found.setdefault(row["cell_id"], row)
    return list(found.values())


def _agrees(trial: Mapping[str, Any], config: Mapping[str, Any], options: Mapping[str, float]) -> bool:
    if any(trial[key] != value for key, value in config.items()):
        return False  # first, for most differ here
    own = json.loads(trial["optimizer_options"] or "{}")
    return options == {key: value for key, value in own.items() if key not in _FREE_OPTIONS}


@functools.cache
def _read(name: str) -> list[dict[str, str]]:
    text = resources.files("zeroflow.results").joinpath(f"paper/{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _values(row: Mapping[str, str]) -> dict[str, float]:
    return {metric: float(row[metric]) for metric in METRICS if metric in row}


def _cell(method: str, optimizer: str | None, dataset: str) -> dict[str, Any]:
    queries = None if optimizer is None or optimizer.startswith("fo-") else 1
    return {"dataset": DATASETS[dataset], "method": METHODS[method], "optimizer": optimizer, "queries": queries}


def _optimizer(base: str, strategy: str) -> str:
    """``SGD``, ``Sign`` -> ``zo-sgd-sign``."""
    if strategy == "Forward":
        return "forward-grad"
    name = base.lower()
    return {"FO": f"fo-{name}", "ZO": f"zo-{name}"}.get(strategy, f"zo-{name}-{strategy.lower()}")


def _table1() -> Iterator[Published]:
    for row in _read("table1_accuracy"):
        method, base, strategy, dataset = (row[key] for key in ("method", "optimizer", "strategy", "dataset"))
        config = _cell(method, _optimizer(base, strategy), dataset)
        yield Published("table1", (method, base, strategy, dataset), config, _values(row))


def _enhancement(table: str, option: str) -> Iterator[Published]:
    """Tables 3 and 4: EASE with ZO-SGD on ImageNet-A (their 0 % is that row of Table 1)."""
    for row in _read(f"{table}_{option}"):
        share = float(row.get(option) or row[f"{option}_alpha"])
        options = {option: share} if share else {}
        yield Published(table, (f"{share:.0%}",), _cell("EASE", "zo-sgd", "ImageNet-A"), _values(row), options)


def _ease() -> Iterator[Published]:
    for row in _read("ease_and_simplecil"):
        optimizer = None if row["method"] == "SimpleCIL" else "fo-sgd"
        config = {**_cell(row["method"], optimizer, row["dataset"]), "tasks": int(row["tasks"])}
        yield Published("ease", (row["method"], row["dataset"], row["tasks"]), config, _values(row))


def ranpac() -> dict[str, dict[str, float]]:
    """Last accuracies published for RanPAC and what it is compared with, percent: row -> data set -> value.

    On CUB and ImageNet-A of another checkpoint than the paper's, see ``paper/ATTRIBUTION.md``.
    """
    return {
        row.pop("row"): {dataset: float(value) for dataset, value in row.items()} for row in map(dict, _read("ranpac"))
    }


def pilot_simplecil() -> dict[str, tuple[float, float]]:
    """Avg and Last of SimpleCIL in PILOT's own figure, read off to about 0.1, percent, by data set; ten equal tasks."""
    return {row["dataset"]: (float(row["avg"]), float(row["last"])) for row in _read("pilot_simplecil")}


# Effects: what changes by changing one thing, which small data can show too.


@dataclass(frozen=True)
class Effect:
    """A difference between two settings: the paper's, and ours on other data, paired by seed.

    Attributes:
        name: of the change. metric: avg, last or fgt. paper: percentage points; None: the paper has no number.
        expected: the paper's sign, +1 or -1; 0: no claim. ours: None where not measured.
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
        trials: the table ``trials`` of the store that has the same settings on one data set.
    """
    cells = _cells(trials)
    if table == "table1":
        return list(_table1_effects(cells))
    if table in _ENHANCED:
        return list(_enhancement_effects(table, cells))
    if table == "figure5":
        return list(_query_effects(cells))
    if table == "hybrid":
        return list(_hybrid_effects(cells))
    raise KeyError(table)


def order(method: str, trials: pa.Table) -> tuple[float | None, float]:
    """Kendall's tau of the order of Table 1's optimizers by Avg: ours to the paper's mean, and between its data sets.

    The second says how much to expect of the first. None: not all optimizers were measured.
    """
    paper = {
        name: [published(method, optimizer, name).values["avg"] for optimizer in _ORDER] for name in DATASETS.values()
    }
    mean = [statistics.fmean(values) for values in zip(*paper.values(), strict=True)]
    cells = _cells(trials)
    found = [
        _by_seed(cells, {"method": method, "optimizer": name, "queries": _one(name)}, {}, "avg") for name in _ORDER
    ]
    ours = [statistics.fmean(by_seed.values()) for by_seed in found if by_seed]
    between = [_tau(a, b) for number, a in enumerate(paper.values()) for b in list(paper.values())[:number]]
    return (_tau(ours, mean) if len(ours) == len(_ORDER) else None), statistics.fmean(between)


def _tau(first: Sequence[float], second: Sequence[float]) -> float:
    return float(stats.kendalltau(first, second).statistic)


def _one(optimizer: str) -> int | None:
    return None if optimizer.startswith("fo-") else 1


def _table1_effects(cells: Sequence[Mapping[str, Any]]) -> Iterator[Effect]:
    for method in ("ease", "aper-adapter"):
        for name in _ORDER:
            base = "fo-adam" if "adam" in name else "fo-sgd"
            if name == base:
                continue
            configs = [{"method": method, "optimizer": other, "queries": _one(other)} for other in (name, base)]
            for metric in METRICS:
                with_, without = (
                    statistics.fmean(published(method, other, d).values[metric] for d in DATASETS.values())
                    for other in (name, base)
                )
                ours = _paired(*(_by_seed(cells, config, {}, metric) for config in configs))
                yield _effect(f"{method}: {name} - {base}", metric, with_ - without, ours, configs[0])


def _enhancement_effects(table: str, cells: Sequence[Mapping[str, Any]]) -> Iterator[Effect]:
    without, *others = rows(table)
    config = {"method": "ease", "optimizer": "zo-sgd", "queries": 1}
    for row in others:
        ((option, share),) = row.options.items()
        for metric in METRICS:
            ours = _paired(_by_seed(cells, config, row.options, metric), _by_seed(cells, config, {}, metric))
            paper = row.values[metric] - without.values[metric]
            yield _effect(f"{option} {share:.0%} - 0%", metric, paper, ours, config)


def _query_effects(cells: Sequence[Mapping[str, Any]]) -> Iterator[Effect]:
    """Figure 5 has no numbers; its text says that accuracy rises with the queries, at as many epochs."""
    kinds = {(c["method"], c["optimizer"], c["epochs"], c["queries"]) for c in cells if (c["queries"] or 1) > 1}
    for method, name, epochs, queries in sorted(kinds):
        config = {"method": method, "optimizer": name, "epochs": epochs}
        one, many = (_by_seed(cells, {**config, "queries": q}, {}, "avg") for q in (1, queries))
        own = _filters({**config, "queries": queries})
        yield Effect(f"{method}, {name}: q = {queries} - q = 1", "avg", None, 1, _paired(many, one), own)


def _hybrid_effects(cells: Sequence[Mapping[str, Any]]) -> Iterator[Effect]:
    """The first version's text says that the last epochs zeroth-order gain over first order alone, in later stages above all."""
    kinds = {
        (c["method"], c["optimizer"], c["epochs"], c["hybrid_epochs"], c["queries"])
        for c in cells
        if c["hybrid_epochs"]
    }
    for method, name, epochs, exact, queries in sorted(kinds):
        base = "fo-adam" if "adam" in name else "fo-sgd"
        config = {"method": method, "optimizer": name, "epochs": epochs, "hybrid_epochs": exact, "queries": queries}
        alone = {"method": method, "optimizer": base, "epochs": epochs}
        for metric in ("avg", "last"):
            ours = _paired(_by_seed(cells, config, {}, metric), _by_seed(cells, alone, {}, metric))
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


def _by_seed(
    cells: Sequence[Mapping[str, Any]], config: Mapping[str, Any], options: Mapping[str, float], metric: str
) -> dict[int, float]:
    """A metric by seed; nothing where a seed has several settings that agree: none of them is picked."""
    found: dict[int, float] = {}
    config = {"hybrid_epochs": 0, **config}
    for cell in cells:
        if cell[metric] is not None and _agrees(cell, config, options):
            if cell["seed"] in found:
                return {}
            found[cell["seed"]] = cell[metric]
    return found


def _paired(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    return estimate(differences) if differences else None


# Table 2: what a step costs, as ratios to first order, which another device can show too.


@dataclass(frozen=True)
class Efficiency:
    """A row of Table 2: memory in GB, seconds per epoch by data set, for an optimizer at so many queries."""

    optimizer: str
    queries: int
    memory_gb: float
    seconds_per_epoch: Mapping[str, float]


def efficiency() -> list[Efficiency]:
    """The rows of Table 2."""
    names = {"cifar100": "cifar100", "cub": "cub", "imagenet-a": "imageneta", "omnibenchmark": "omnibenchmark"}
    return [
        Efficiency(
            row["optimizer"].lower(), int(row["queries"]), float(row["memory_gb"]),
            {name: float(row[f"{column}_s_per_epoch"]) for name, column in names.items()},
        )
        for row in _read("table2_efficiency")
    ]  # fmt: skip


@dataclass(frozen=True)
class Ratios:
    """An optimizer's costs over first order's, published and measured; None where there is nothing.

    Attributes:
        row: of the measurement. saved, saved_here: first order's peak memory over this one's.
        saved_beyond: the same without the model's own parameters, which are in both.
        time: seconds per epoch over first order's: smallest and largest over the data sets. time_here: of a step.
    """

    row: Mapping[str, Any]
    saved: float | None
    saved_here: float | None
    saved_beyond: float | None
    time: tuple[float, float] | None
    time_here: float | None


def ratios(result: Mapping[str, Any]) -> list[Ratios]:
    """What ``zeroflow efficiency`` measured, beside Table 2."""
    paper = {(row.optimizer, row.queries): row for row in efficiency()}
    base = paper["fo-sgd", 1]
    first: Mapping[str, Any] = next((row for row in result["rows"] if row["optimizer"] == "fo-sgd"), {})
    model = result["model_bytes"]
    found = []
    for row in result["rows"]:
        there = paper.get((row["optimizer"], row["queries"] or 1))
        times = [there.seconds_per_epoch[d] / s for d, s in base.seconds_per_epoch.items()] if there else []
        memory, before = row["peak_memory_bytes"], first.get("peak_memory_bytes")
        found.append(
            Ratios(
                row,
                base.memory_gb / there.memory_gb if there else None,
                before / memory if before and memory else None,
                (before - model) / (memory - model) if before and memory else None,
                (min(times), max(times)) if times else None,
                _over(row["in_forwards"], first.get("in_forwards")),
            )
        )
    return found


def _over(value: float | None, unit: float | None) -> float | None:
    return None if value is None or not unit else value / unit


EFFICIENCY_LEGEND = (
    "GB: peak memory of a step, 10^9 bytes. FO/memory: first order's over this one's, published (paper) and here; beyond: "
    "without the model's own parameters.",
    "time/FO: of a step over first order's, published over its four data sets and here. in forwards: time of a step in plain "
    "forward passes before and after it. forwards: forward passes of a step. work: forward equivalents (a backward pass counts 2).",
)


def efficiency_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """The measurement as text: a line of headings, then a line per row; ``-`` for what there is not."""
    heads = [
        "GB",
        "FO/memory: paper",
        "here",
        "beyond",
        "s/step",
        "time/FO: paper",
        "here",
        "in forwards",
        "forwards",
        "work",
    ]
    lines = [["optimizer", "q", *heads, *(f"s/epoch {name}" for name in result["first_task_images"])]]
    for found in ratios(result):
        row = found.row
        memory = row["peak_memory_bytes"]
        lines.append([
            row["optimizer"], str(row["queries"] or "-"), "-" if memory is None else f"{memory / 1e9:.3f}",
            *map(_two, (found.saved, found.saved_here, found.saved_beyond)),
            "-" if row["seconds_per_step"] is None else f"{row['seconds_per_step']:.4f}",
            "-" if found.time is None else "-".join(dict.fromkeys(map(_two, found.time))),
            _two(found.time_here), _two(row["in_forwards"]), f"{row['forward_passes']:g}", f"{row['forward_equivalents']:g}",
            *("-" if seconds is None else f"{seconds:.1f}" for seconds in row["seconds_per_epoch"].values()),
        ])  # fmt: skip
    return lines


def render_efficiency(result: Mapping[str, Any]) -> list[str]:
    """The measurement for a terminal."""
    columns = []
    for number, column in enumerate(zip(*efficiency_cells(result), strict=True)):
        width = max(map(len, column))
        columns.append([value.rjust(width) if number else value.ljust(width) for value in column])
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    where = (
        f"{result['backbone']}, {result['image_size']} pixels, batch {result['batch_size']}, on {result['device']}; "
        f"a plain forward: {result['forward_memory_bytes'] / 1e9:.3f} GB, {result['forward_seconds']:.4f} s"
    )
    assumed = f"Assumed: {'; '.join(result['assumptions'])}."
    return [where, "", *lines, "", *EFFICIENCY_LEGEND, assumed]


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
