"""The paper's numbers in zeroflow's terms, and finished cells beside them.

Source: the ZeroFlow paper, arXiv:2501.01045, Tables 1-4, and Table 1 of the EASE paper (``paper/ATTRIBUTION.md``). A cell
counts as the paper's only if its configuration says so; several settings that do are all shown, none is picked.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import pyarrow as pa

from zeroflow.results.differences import USUAL, Differences, named
from zeroflow.results.estimates import Estimate, measured
from zeroflow.results.schema import CONFIG_KEYS

METRICS = ("avg", "last", "fgt")
DATASETS = {"CIFAR-100": "cifar100", "CUB": "cub", "ImageNet-A": "imagenet-a", "OmniBenchmark": "omnibenchmark"}
METHODS = {"EASE": "ease", "APER": "aper-adapter", "SimpleCIL": "simplecil"}

PROTOCOL: Mapping[str, Any] = {
    "backbone": "vit_base_patch16_224.augreg_in21k", "checkpoint": None, "image_size": None, "dtype": "float32",
    "tasks": 10, "base_classes": None, "increments": None, "class_order_seed": 1993, "fixed_class_order": None,
    "stop_after": None, "validation": 0.0, "hybrid_epochs": 0, "later": None, "loss": None, "access": None,
    "classifier": None, "classifier_options": None,
}  # fmt: skip
"""What the configuration of every published row says, as the store has it: pretrained weights, ten tasks, test data."""

# PILOT's transform takes no preprocessing; the data sets' own takes what the weights' tag asks for.
_TRANSFORMS = (None, "pilot")
_PREPROCESSING = {
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
}  # fmt: skip

# The paper leaves these out, so any value may be its own; every other option makes another method of it.
_FREE_OPTIONS = frozenset(
    ("momentum", "weight_decay", "nesterov", "betas", "eps_adam", "hybrid_lr", "max_skipped", "check_precision")
)
# What EASE's own configurations change from data set to data set.
_FREE_METHOD_OPTIONS = frozenset(("alpha", "beta", "frozen_space", "recalculate_similarity"))
# Null and what says the same are one value.
_UNSET = ("later", "loss", "access", "classifier", "classifier_options", "transform", "preprocessing")
ENHANCED = {"table3": "history", "table4": "sparsity"}
ORDER = (
    "fo-sgd", "zo-sgd", "zo-sgd-sign", "zo-sgd-conserve", "fo-adam", "zo-adam", "zo-adam-sign", "zo-adam-conserve",
    "forward-grad",
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published row.

    Attributes:
        table: ``table1``, ``table3``, ``table4``, or ``ease``.
        label: as the paper calls the row.
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
    def name(self) -> str:
        """The label in a row of words; of Tables 3 and 4, whose labels are shares alone, with what is shared."""
        return " ".join(filter(None, [ENHANCED.get(self.table), *self.label]))

    @property
    def command(self) -> str:
        """Runs this row's cells into the folder where ``docs/reproduction.md`` looks for them."""
        grid = "table1" if self.table == "ease" else self.table
        changes = {key: value for key, value in self.config.items() if key != "queries" and value is not None}
        options = {**({ENHANCED[self.table]: 0} if self.table in ENHANCED else {}), **self.options}
        changes |= {f"optimizer_options.{name}": value for name, value in options.items()}
        sets = " ".join(f"--set {key}={value}" for key, value in changes.items())
        return f"python sweeps/full_grid.py --grid sweeps/{grid}.yaml --results results/{grid} {sets}"

    def is_of(self, trial: Mapping[str, Any]) -> bool:
        """Whether a row of the table ``trials`` has this row's configuration."""
        wanted = {**PROTOCOL, **self.config}
        if not agrees(trial, wanted, self.options) or trial["transform"] not in _TRANSFORMS:
            return False
        if trial["preprocessing"] is not None and json.loads(trial["preprocessing"]) != _PREPROCESSING:
            return False
        return not json.loads(trial["method_options"] or "{}").keys() - _FREE_METHOD_OPTIONS


@dataclass(frozen=True)
class Comparison:
    """A published row beside the finished cells of one configuration; ``cells`` is empty where there is none.

    Attributes:
        published: the row.
        config: every key but the seed.
        cells: ids, by seed.
        ours: avg, last, fgt over the seeds.
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
    return [row for row in _rows() if table in (None, row.table)]


def published(method: str, optimizer: str | None, dataset: str) -> Published:
    """The row of Table 1 of a method, an optimizer and a data set, all by zeroflow's names.

    Raises:
        KeyError: Table 1 has no such row.
    """
    return _of_table1()[method, optimizer, dataset]


def compare(trials: pa.Table, published: Iterable[Published] | None = None) -> list[Comparison]:
    """Every published row beside what was measured.

    Args:
        trials: the table ``trials`` of one store, or of several one after the other (a cell counts once).
        published: rows to look for; default: all.

    Returns:
        At least one comparison for each row, several where cells of different settings (learning rates, say) agree with it.
    """
    cells = cells_once(trials)
    found: list[Comparison] = []
    for row in rows() if published is None else published:
        groups: dict[str, list[dict[str, Any]]] = {}
        for cell in cells:
            if row.is_of(cell):
                config = {key: cell[key] for key in CONFIG_KEYS if key != "seed"}
                groups.setdefault(json.dumps(config), []).append(cell)
        found += [_comparison(row, json.loads(key), members) for key, members in groups.items()] or [Comparison(row)]
    return found


def settings(comparisons: Sequence[Comparison]) -> list[str]:
    """What tells several settings of ours apart that are one published row: ``lr=0.01``; empty texts where nothing does.

    Args:
        comparisons: with cells.
    """
    differences = Differences([each.config for each in comparisons])
    own = {*PROTOCOL, "dataset", "method", "optimizer", "queries", "seed"}
    telling = [key for key in CONFIG_KEYS if key not in own and differences.varies(key)]
    return [
        " ".join(named(key, text) for key in telling if (text := differences.text(key, each.config)) != "-")
        for each in comparisons
    ]


def _comparison(row: Published, config: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Comparison:
    found = {metric: measured(cell[metric] for cell in cells) for metric in row.values}
    ours = {metric: value for metric, value in found.items() if value is not None}
    return Comparison(row, config, tuple(cell["cell_id"] for cell in cells), ours)


def cells_once(trials: pa.Table) -> list[dict[str, Any]]:
    """Rows by seed, each cell once, with the null of older files for what they did not know yet."""
    found: dict[str, dict[str, Any]] = {}
    for row in trials.select([*CONFIG_KEYS, "cell_id", *METRICS]).sort_by("seed").to_pylist():
        row["checkpoint"] = None if row["checkpoint"] == "hub" else row["checkpoint"]
        row |= {key: None for key in _UNSET if row[key] in ("", "{}", USUAL.get(key))}
        found.setdefault(row["cell_id"], row)
    return list(found.values())


def agrees(trial: Mapping[str, Any], config: Mapping[str, Any], options: Mapping[str, float]) -> bool:
    if any(trial[key] != value for key, value in config.items()):
        return False  # first, for most differ here
    own = json.loads(trial["optimizer_options"] or "{}")
    return options == {key: value for key, value in own.items() if key not in _FREE_OPTIONS}


@functools.cache
def _rows() -> tuple[Published, ...]:
    enhanced = (row for name, option in ENHANCED.items() for row in _enhancement(name, option))
    return (*_table1(), *enhanced, *_ease())


@functools.cache
def _of_table1() -> dict[tuple[str | None, ...], Published]:
    return {tuple(row.config[key] for key in ("method", "optimizer", "dataset")): row for row in rows("table1")}


@functools.cache
def paper_csv(name: str) -> list[dict[str, str]]:
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
    for row in paper_csv("table1_accuracy"):
        method, base, strategy, dataset = (row[key] for key in ("method", "optimizer", "strategy", "dataset"))
        config = _cell(method, _optimizer(base, strategy), dataset)
        yield Published("table1", (method, base, strategy, dataset), config, _values(row))


def _enhancement(table: str, option: str) -> Iterator[Published]:
    """Tables 3 and 4: EASE with ZO-SGD on ImageNet-A (their 0 % is that row of Table 1)."""
    for row in paper_csv(f"{table}_{option}"):
        share = float(row.get(option) or row[f"{option}_alpha"])
        options = {option: share} if share else {}
        yield Published(table, (f"{share:.0%}",), _cell("EASE", "zo-sgd", "ImageNet-A"), _values(row), options)


def _ease() -> Iterator[Published]:
    for row in paper_csv("ease_and_simplecil"):
        optimizer = None if row["method"] == "SimpleCIL" else "fo-sgd"
        config = {**_cell(row["method"], optimizer, row["dataset"]), "tasks": int(row["tasks"])}
        yield Published("ease", (row["method"], row["dataset"], row["tasks"]), config, _values(row))


def ranpac() -> dict[str, dict[str, float]]:
    """Last accuracies published for RanPAC and what it is compared with, percent: row -> data set -> value.

    On CUB and ImageNet-A of another checkpoint than the paper's, see ``paper/ATTRIBUTION.md``.
    """
    return {
        row.pop("row"): {dataset: float(value) for dataset, value in row.items()}
        for row in map(dict, paper_csv("ranpac"))
    }


def pilot_simplecil() -> dict[str, tuple[float, float]]:
    """Avg and Last of SimpleCIL in PILOT's own figure, read off to about 0.1, percent, by data set; ten equal tasks."""
    return {row["dataset"]: (float(row["avg"]), float(row["last"])) for row in paper_csv("pilot_simplecil")}
