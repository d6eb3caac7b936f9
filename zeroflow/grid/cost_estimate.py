"""What missing cells will cost, from finished ones.

A cell's seconds are a fixed part (reading images, features, evaluation) and its training steps. Both are means over the finished
cells most like it, the training per unit of work and of one worker: a step's forward equivalents (``OptimizerInfo.equivalents``),
times the share of the data that is trained on; workers are taken to share a step's forward passes evenly. "Most like" is
the longest run of ``FEATURES``, in their order, that any finished cell has in common with it; without the first
``ALWAYS`` of them there is nothing to go by.

Forward passes are exact once a cell with the same ``FEATURES`` and class order has finished. From one of other epochs, of another
optimizer or number of queries they follow in proportion and by the optimizers' formulas: an estimate, and said to be one, since what
a method passes once a task, a snapshot and the steps of ``hybrid`` do not grow so. As no formula has those steps, cells with them tell
of others only what no cell without them does.
"""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.grid.cell_placement import CellPlacement
from zeroflow.optim import optimizers
from zeroflow.optim.estimators import Backpropagation
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.keys.branch import shares
from zeroflow.trial.keys.values import as_json

FEATURES = (
    "dataset", "method", "tasks", "base_classes", "increments", "stop_after", "backbone", "image_size", "access", "dtype", "transform",
    "method_options", "optimizer", "batch_size", "optimizer_options", "hybrid_epochs", "queries", "epochs", "validation", "loss",
    "classifier", "classifier_options", "later",
)  # fmt: skip
"""What makes cells alike, the most telling first."""

ALWAYS = 8
"""How many of ``FEATURES`` must be the same."""

_EXACT_GRADIENT = Backpropagation().equivalents(1)

_STREAM = ("dataset", "method", "tasks", "base_classes", "increments", "stop_after")
_ORDER = ("class_order_seed", "fixed_class_order")
_LAYOUT = (*_STREAM, "validation", "batch_size", *_ORDER)
_ALIKE = (*FEATURES, *_ORDER)
# Where steps are known from: an optimizer may take more passes than its formula says (a snapshot), so its own come first.
_STEPS = (_ALIKE, (*_LAYOUT, "optimizer", "optimizer_options", "later"), _LAYOUT, _STREAM)

COLUMNS = tuple(
    dict.fromkeys([*FEATURES, *_LAYOUT, "workers", "seconds", "training_seconds", "forward_passes", "device"])
)
"""The columns of ``trials`` that tell what cells cost."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EstimateError:
    """How far off the estimated seconds of the finished cells that an estimate comes from would have been, each from the others.

    Attributes:
        median: of |estimate / actual - 1|, as a share.
        ninth_decile: likewise.
        cells: how many had another cell to go by.
    """

    median: float
    ninth_decile: float
    cells: int


@dataclass(frozen=True)
class CostEstimate:
    """What cells will cost, those with a basis.

    Attributes:
        seconds: of one cell after the other, each on its own workers; None: no cell has a basis.
        worker_seconds: the same, times the workers.
        forward_passes: of a batch, in training.
        exact_passes: whether that is what cells like these have taken; otherwise it is an estimate.
        gpu_hours: of the cells that use GPUs.
        cpu_hours: of the cells that use none.
        cells: how many are estimated.
        without_basis: how many are like no finished cell and not in the sums.
        error: of such estimates; None: no two finished cells are alike.
    """

    seconds: float | None
    worker_seconds: float
    forward_passes: int
    exact_passes: bool
    gpu_hours: float
    cpu_hours: float
    cells: int
    without_basis: int
    error: EstimateError | None

    def cost(self, price_per_hour: float) -> float:
        """What the cells cost at a price for an hour of one GPU, or of one CPU for cells without."""
        return price_per_hour * (self.gpu_hours + self.cpu_hours)

    def describe(self, price_per_hour: float | None = None) -> str:
        """The estimate in one line."""
        if self.seconds is None:
            return "estimate: none yet, no cell of this kind has finished in this store"
        text = (
            f"estimate from earlier cells: {self.seconds / 3600:.2f} hours of one cell at a time, "
            f"{'' if self.exact_passes else 'about '}{self.forward_passes:,} forward passes"
        )
        if price_per_hour is not None:
            hours = {"GPU": self.gpu_hours, "CPU": self.cpu_hours}
            used = " and ".join(f"{value:.2f} {name}-hours" for name, value in hours.items() if value)
            text += f", {self.cost(price_per_hour):,.2f} for {used or 'no hours'} at {price_per_hour:g}"
        if self.without_basis:
            text += f", without {self.without_basis} of {self.cells + self.without_basis} cells that are like no finished one"
        if self.error:
            text += (
                f"; the hours of earlier cells like these would have been off by {100 * self.error.median:.0f} % in the median "
                f"(90 % of them by less than {100 * self.error.ninth_decile:.0f} %, {self.error.cells} cells)"
            )
        return text


def estimate_costs(
    cells: Iterable[TrialConfig], trials: pa.Table, placement: Callable[[TrialConfig], CellPlacement]
) -> CostEstimate:
    """What cells will cost.

    Args:
        cells: to estimate.
        trials: the rows of finished ones, the store's table ``trials``.
        placement: of a cell. Where it leaves GPUs open, a worker takes one if any finished cell ran on a GPU.
    """
    finished = Finished(trials)
    total: dict[str, float] = defaultdict(float)
    known = without = passes = 0
    exact = True
    for config in cells:
        place, values = placement(config), vars(config)
        seconds = finished.seconds(values, place.workers_per_trial)
        if seconds is None:
            without += 1
            continue
        known += 1
        passes += finished.forward_passes(values)
        exact = exact and finished.knows_passes(values)
        gpus = finished.gpus if place.gpus_per_worker is None else place.gpus_per_worker
        total["seconds"] += seconds
        total["workers"] += seconds * place.workers_per_trial
        total["gpus" if gpus else "cpus"] += seconds * place.workers_per_trial * (gpus or place.cpus_per_worker)
    return CostEstimate(
        total["seconds"] if known or not without else None,
        total["workers"],
        passes,
        exact,
        total["gpus"] / 3600,
        total["cpus"] / 3600,
        known,
        without,
        finished.error(),
    )


class Finished:
    """What finished cells tell about others. Cells are mappings of ``TrialConfig``'s keys.

    Args:
        trials: the store's table ``trials``.
    """

    def __init__(self, trials: pa.Table) -> None:
        devices = pc.unique(trials["device"]).to_pylist()
        self.gpus = float(any(device and not device.startswith("cpu") for device in devices))
        """GPUs of a worker that is to use what there is."""
        rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for row in _rows(trials):
            rows[_has_exact_steps(row)].append(row)
        # Those without come last: where there are any, they take the place of those with such steps.
        self._alike = {**_alike(rows[True]), **_alike(rows[False])}
        self._sums = {key: sum((kind.sums for kind in own), np.zeros(3)) for key, own in self._alike.items()}
        self._passes = {**_least_passes(rows[True]), **_least_passes(rows[False])}
        self._likest: dict[tuple[Any, ...], tuple[float, float] | None] = {}
        self._asked: set[tuple[Any, ...]] = set()

    def seconds(self, cell: Mapping[str, Any], workers: int = 1) -> float | None:
        """Seconds of a cell on ``workers`` processes; None: nothing to go by."""
        key = _key(cell)
        if key not in self._likest:
            likest = next((prefix for prefix in _prefixes(key) if prefix in self._alike), None)
            if likest is None:
                self._likest[key] = None
            else:
                cells, fixed, rate = self._sums[likest]
                self._likest[key] = float(fixed / cells), float(rate / cells)
                self._asked.add(likest)
        parts = self._likest[key]
        return None if parts is None else parts[0] + parts[1] * work(cell) / _shared(cell, workers)

    def forward_passes(self, cell: Mapping[str, Any]) -> int:
        """Forward passes of a cell's training; 0 for one that does not train, or is like no finished one."""
        unit = _passes(cell)
        known = (self._passes[key] for key in _step_keys(cell) if key in self._passes) if unit else iter(())
        return round(unit * next(known, 0.0))

    def knows_passes(self, cell: Mapping[str, Any]) -> bool:
        """Whether a cell that is alike in all that decides on its forward passes has finished, or none are to be made."""
        return not _passes(cell) or next(_step_keys(cell)) in self._passes

    def error(self) -> EstimateError | None:
        """How far off the estimates so far would have been, found by estimating each cell that they come from from the others."""
        off, seen = [], set()
        # The likest ones first: each cell counts once, by the estimate from those that are most like it.
        for prefix in sorted(self._asked, key=len, reverse=True):
            alike = self._alike[prefix]
            everyone = self._sums[prefix]
            for kind in (kind for kind in alike if id(kind) not in seen):
                # As the estimate of a kind comes from other kinds, so does that of each of these; of one alone, from other cells.
                off.append(kind.off(everyone - kind.sums) if len(alike) > 1 else kind.off_one_out(everyone))
                seen.add(id(kind))
        found = np.concatenate([np.zeros(0), *off])
        if not len(found):
            return None
        median, ninth = np.quantile(found, [0.5, 0.9])
        return EstimateError(float(median), float(ninth), len(found))


@dataclass(frozen=True)
class _Kind:
    """Finished cells that are alike in all features and in their workers.

    Attributes:
        key: values of ``FEATURES``.
        units: work of each, divided by the workers that shared it.
        fixed: seconds outside training ``[n]``.
        rate: training seconds per unit ``[n]``.
    """

    key: tuple[Any, ...]
    units: float
    fixed: Vector
    rate: Vector

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> _Kind:
        seconds, training = (np.array(row[name], dtype=float) for name in ("seconds", "training_seconds"))
        # Earlier versions lost the time before an interruption: such cells took longer than they say.
        whole = ~(training > seconds)
        seconds, training, units = seconds[whole], training[whole], work(row) / _shared(row, row["workers"] or 1)
        # Where no step was timed all of it may be training: for other epochs that is rather too much than too little.
        known = np.where(np.nan_to_num(training) > 0, training, seconds) if units else np.zeros_like(seconds)
        return cls(_key(row), units, seconds - known, known / (units or 1))

    @property
    def sums(self) -> Vector:
        """Number of cells, sum of ``fixed``, sum of ``rate``."""
        return np.array([len(self.fixed), self.fixed.sum(), self.rate.sum()])

    def off(self, others: Vector) -> Vector:
        """|estimate / actual - 1| of each cell ``[n]``, estimated from the ``sums`` of other kinds; empty if there are none."""
        cells, fixed, rate = others
        actual = self.fixed + self.rate * self.units
        if not cells or not actual.all():
            return np.zeros(0)
        return np.abs((fixed + rate * self.units) / cells / actual - 1)

    def off_one_out(self, everyone: Vector) -> Vector:
        """The same, each cell estimated from the others of its kind."""
        cells, fixed, rate = everyone
        actual = self.fixed + self.rate * self.units
        if cells < 2 or not actual.all():
            return np.zeros(0)
        guess = (fixed - self.fixed + (rate - self.rate) * self.units) / (cells - 1)
        return np.abs(guess / actual - 1)


def _alike(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[_Kind]]:
    """Kinds by each run of ``FEATURES`` that they have; those whose time is not known are left out."""
    found: dict[tuple[Any, ...], list[_Kind]] = defaultdict(list)
    for kind in map(_Kind.of, rows):
        for prefix in _prefixes(kind.key) if len(kind.fixed) else ():
            found[prefix].append(kind)
    return dict(found)


def _least_passes(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], float]:
    """Fewest forward passes for one of the formula, by each of ``_STEPS``."""
    found: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["forward_passes"] and (unit := _passes(row)):
            for key in _step_keys(row):
                found[key] = min(found.get(key, math.inf), row["forward_passes"] / unit)
    return found


def _rows(trials: pa.Table) -> Iterator[dict[str, Any]]:
    """Finished cells by all that tells about them: their keys, with lists of seconds and the fewest forward passes."""
    keys = list(dict.fromkeys([*FEATURES, *_LAYOUT, "workers"]))
    timed = trials.filter(pc.is_valid(trials["seconds"])).select(
        [*keys, "seconds", "training_seconds", "forward_passes"]
    )
    grouped = timed.group_by(keys).aggregate(
        [("seconds", "list"), ("training_seconds", "list"), ("forward_passes", "min")]
    )
    renamed = [name.removesuffix("_list").removesuffix("_min") for name in grouped.column_names]
    known = {None, *optimizers.names()}
    for row in grouped.rename_columns(renamed).to_pylist():
        later = json.loads(row["later"] or "{}")
        if {row["optimizer"], later.get("optimizer")} <= known:
            yield row | {"later": later}


def _key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple([_plain(cell[name]) for name in FEATURES])


def _prefixes(key: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """From most to least alike."""
    return (key[:length] for length in range(len(key), ALWAYS - 1, -1))


def _step_keys(cell: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    return (tuple([_plain(cell[name]) for name in names]) for names in _STEPS)


def _plain(value: Any) -> Any:
    """A value as the store has it; no options are None."""
    if isinstance(value, Mapping | list):
        return as_json(value) if value else None
    return None if value == "{}" else value


def _has_exact_steps(row: Mapping[str, Any]) -> bool:
    """Whether a number of steps had the exact gradient, beside the epochs that ``hybrid_epochs`` says."""

    def has(options: str | Mapping[str, Any] | None) -> bool:  # those of ``later`` are parsed
        return bool((json.loads(options) if isinstance(options, str) else options or {}).get("hybrid"))

    return row["optimizer"] is not None and any(has(own["optimizer_options"]) for _, own in shares(row))


def _passes(cell: Mapping[str, Any]) -> float:
    """Forward passes of a cell per sample of its data set; 0: it does not train."""
    if cell["optimizer"] is None:
        return 0.0

    def passes(own: Mapping[str, Any]) -> float:
        exact = own["hybrid_epochs"]
        found = (own["epochs"] - exact) * _forwards(own["optimizer"], own["queries"]) + exact
        return float(found * (1 - own["validation"]) / own["batch_size"])

    return sum(share * passes(own) for share, own in shares(cell))


def work(cell: Mapping[str, Any]) -> float:
    """Work of a cell's training per sample of its data set, in forward passes; 0: it does not train."""
    if cell["optimizer"] is None:
        return 0.0

    def units(own: Mapping[str, Any]) -> float:
        exact, one = own["hybrid_epochs"], optimizers.get(own["optimizer"]).equivalents(own["queries"] or 1)
        return float(((own["epochs"] - exact) * one + exact * _EXACT_GRADIENT) * (1 - own["validation"]))

    return sum(share * units(own) for share, own in shares(cell))


def _shared(cell: Mapping[str, Any], workers: int) -> float:
    """By how much ``workers`` processes shorten a step: the slowest of them has its share of the forward passes, rounded up."""
    if cell["optimizer"] is None or workers == 1:
        return 1.0
    passes = _forwards(cell["optimizer"], cell["queries"])
    return passes / math.ceil(passes / workers)


def forward_equivalents(config: TrialConfig, batches: int) -> int:
    """Work of a cell's training on one task, in forward passes of a mini-batch.

    Args:
        config: a cell that trains.
        batches: mini-batches of an epoch.
    """
    info, steps = optimizers.get(str(config.optimizer)), (config.epochs or 0) * batches
    exact = min(config.hybrid_epochs * batches + (config.optimizer_options.get("hybrid") or 0), steps)
    without, queries = steps - exact, config.queries or 1
    snapshots = info.snapshot_forwards(queries, without, batches, config.optimizer_options) if without else 0
    return exact * _EXACT_GRADIENT + without * info.equivalents(queries) + snapshots


@functools.cache
def _forwards(optimizer: str, queries: int | None) -> int:
    return optimizers.get(optimizer).forwards(queries or 1)
