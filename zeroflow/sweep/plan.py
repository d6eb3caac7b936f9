"""What of a grid is done, failed, missing, or cannot run here, and how long the rest will take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zeroflow.data import datasets
from zeroflow.results.store import Store
from zeroflow.sweep.grid import Grid
from zeroflow.trial.config import TrialConfig


@dataclass(frozen=True)
class Plan:
    """The cells of a grid by what is known of them.

    Attributes:
        done: finished in the store. failed: in the failures table and not done. missing: to run.
        unavailable: cells whose data set is not on this machine, by data set.
        seconds: estimated seconds of the missing cells on one placement each, from earlier cells; None: nothing to go by.
    """

    grid: Grid
    done: Sequence[TrialConfig]
    failed: Sequence[TrialConfig]
    missing: Sequence[TrialConfig]
    unavailable: Mapping[str, Sequence[TrialConfig]]
    seconds: float | None

    def runnable(self, retry_failed: bool) -> list[TrialConfig]:
        """The cells that a sweep would run now."""
        return [*self.missing, *(self.failed if retry_failed else [])]

    def describe(self, data_dir: str | None, *, cells: bool = False) -> str:
        """The plan as text; with ``cells`` every missing cell on a line of its own."""
        absent = sum(len(c) for c in self.unavailable.values())
        lines = [
            f"grid {self.grid.name}: {len(self.grid.cells)} cells: {len(self.done)} done, {len(self.failed)} failed, "
            f"{len(self.missing)} to run, {absent} without their data set"
        ]
        if cells:
            lines += [f"  {config.cell_id}  {config.label()}" for config in self.missing]
            lines += [f"  {config.cell_id}  {config.label()}  (failed before)" for config in self.failed]
        for name, waiting in self.unavailable.items():
            paths = ", ".join(str(p) for p in datasets.get(name).missing(None if data_dir is None else Path(data_dir)))
            lines.append(f"  {name}: {len(waiting)} cells wait for {paths}. {datasets.get(name).where}")
        if self.missing:
            lines.append(
                "estimate: none yet, no cell of this kind has finished in this store"
                if self.seconds is None
                else f"estimate from earlier cells: {self.seconds / 3600:.2f} hours of one cell at a time"
            )
        return "\n".join(lines)


def make_plan(grid: Grid, store: Store, data_dir: str | None) -> Plan:
    """Compare a grid with a store; nothing is written."""
    finished, failures = store.done(), set(store.load("failures")["cell_id"].to_pylist())
    absent = {
        name
        for name in {config.dataset for config in grid.cells}
        if datasets.get(name).missing(None if data_dir is None else Path(data_dir))
    }
    done, failed, missing = [], [], []
    unavailable: dict[str, list[TrialConfig]] = defaultdict(list)
    for config in grid.cells:
        cell = config.cell_id
        if cell in finished:
            done.append(config)
        elif config.dataset in absent:
            unavailable[config.dataset].append(config)
        elif cell in failures:
            failed.append(config)
        else:
            missing.append(config)
    return Plan(grid, done, failed, missing, unavailable, _estimate(missing, store) if finished else None)


def _estimate(missing: Sequence[TrialConfig], store: Store) -> float | None:
    """Seconds for ``missing``: each as the mean of the finished cells most like it."""
    if not missing:
        return 0.0
    features = ["dataset", "backbone", "method", "optimizer", "queries", "epochs"]
    groups = store.load("trials").group_by(features).aggregate([("seconds", "sum"), ("seconds", "count")])
    seconds: dict[tuple[object, ...], float] = defaultdict(float)
    cells: dict[tuple[object, ...], int] = defaultdict(int)
    for group in groups.to_pylist():
        for kind in _kinds(*(group[feature] for feature in features)):
            seconds[kind] += group["seconds_sum"] or 0.0
            cells[kind] += group["seconds_count"]
    means = {kind: seconds[kind] / count for kind, count in cells.items() if count}
    total = 0.0
    for config in missing:
        kinds = _kinds(config.dataset, config.backbone, config.method, config.optimizer, config.queries, config.epochs)
        mean = next((means[kind] for kind in kinds if kind in means), None)
        if mean is None:
            return None
        total += mean
    return total


def _kinds(*features: object) -> list[tuple[object, ...]]:
    """From most to least alike: all of data set, backbone, method, optimizer, queries, epochs; then fewer of them."""
    return [features[:length] for length in range(len(features), 2, -1)]
