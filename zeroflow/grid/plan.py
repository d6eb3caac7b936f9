"""What of a grid is done, failed, missing, or cannot run here, and how long the rest will take."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zeroflow.data import Preprocessing, datasets, load_dataset
from zeroflow.data.folders import FileSamples, also_trained
from zeroflow.errors import ConfigError
from zeroflow.grid.cost_estimate import COLUMNS, CostEstimate, estimate_costs
from zeroflow.grid.grid_file import Grid
from zeroflow.grid.labels import labels
from zeroflow.grid.placement import SweepPlacement
from zeroflow.imports import imports_of
from zeroflow.progress import Progress, silent
from zeroflow.results.store import Store
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.named_files import images_of, weights_of
from zeroflow.trial.stream import check_streams


@dataclass(frozen=True)
class Plan:
    """The cells of a grid by what is known of them.

    Attributes:
        done: finished in the store.
        failed: in the failures table and not done.
        missing: to run.
        unavailable: cells whose data set is not on this machine, by data set.
        estimate: of what the cells that would run cost, from those that have finished in this store.
        others: finished cells of the store that are not of this grid.
        retry_failed: whether failed cells would run again.
    """

    grid: Grid
    done: Sequence[TrialConfig]
    failed: Sequence[TrialConfig]
    missing: Sequence[TrialConfig]
    unavailable: Mapping[str, Sequence[TrialConfig]]
    estimate: CostEstimate
    others: int = 0
    retry_failed: bool = False

    @property
    def seconds(self) -> float | None:
        """Estimated seconds of the missing cells, one after the other; None: nothing to go by."""
        return self.estimate.seconds

    @property
    def runnable(self) -> list[TrialConfig]:
        """The cells that a sweep would run now."""
        return [*self.missing, *(self.failed if self.retry_failed else [])]

    def describe(self, data_dir: str | None, *, cells: bool = False, price_per_hour: float | None = None) -> str:
        """The plan as text; with ``cells`` every missing cell on a line of its own, with a price also the cost."""
        absent = sum(len(c) for c in self.unavailable.values())
        lines = [
            f"grid {self.grid.name}: {len(self.grid.cells)} cells: {len(self.done)} done, {len(self.failed)} failed, "
            f"{len(self.missing)} to run, {absent} without their data set"
        ]
        if self.others:
            lines.append(f"the store holds {self.others} finished cells of other grids too; they stay as they are")
        if self.failed:
            again = "run again" if self.retry_failed else "run again with --retry-failed alone"
            lines.append(f"cells that failed before {again}")
        lines += self.grid.idle
        made = Counter((c.backbone, str(Preprocessing.of(c.preprocessing))) for c in self.grid.cells if c.preprocessing)
        for (backbone, how), count in made.items():
            lines.append(f"preprocessing of {backbone}: {how} ({count} cell{'s' if count > 1 else ''})")
        if cells:
            names = labels([*self.missing, *self.failed])
            lines += [f"  {config.cell_id}  {names[config.cell_id]}" for config in self.missing]
            lines += [f"  {config.cell_id}  {names[config.cell_id]}  (failed before)" for config in self.failed]
        for name, waiting in self.unavailable.items():
            paths = ", ".join(str(p) for p in datasets.get(name).missing(None if data_dir is None else Path(data_dir)))
            lines.append(f"  {name}: {len(waiting)} cells wait for {paths}. {datasets.get(name).where}")
        if self.runnable:
            sizes = Counter(self.grid.placement.of(config).workers_per_trial for config in self.runnable)
            if set(sizes) != {1}:
                shared = ", ".join(f"{cells} cells on {size}" for size, cells in sorted(sizes.items(), reverse=True))
                lines.append(f"workers a cell: {shared}")
            lines.append(self.estimate.describe(price_per_hour))
        return "\n".join(lines)

    def describe_data(self, data_dir: str | None) -> str:
        """Images per split and class of the data sets to be run that are folders and files of one's own, a line each.

        Nobody else has counted them. Apart from ``describe``, since it goes through all files, which a sweep does itself.

        Raises:
            ConfigError: what is wrong with one of them.
        """
        lines = []
        for name in sorted({config.dataset for config in [*self.missing, *self.failed] if ":" in config.dataset}):
            found = datasets.get(name).load(None if data_dir is None else Path(data_dir).expanduser())
            check_streams([config for config in [*self.missing, *self.failed] if config.dataset == name], found)
            parts = []
            for part, samples in (("train", found.train), ("test", found.test)):
                each = np.bincount(samples.labels, minlength=len(found.class_names))
                per_class = f"{each.min()}" if each.min() == each.max() else f"{each.min()} to {each.max()}"
                parts.append(f"{part} {len(samples.labels):,} images, {per_class} a class")
            lines.append(f"{name}: {len(found.class_names)} classes; {'; '.join(parts)}")
            train, test = found.train, found.test
            if not (isinstance(train, FileSamples) and isinstance(test, FileSamples)):
                continue
            if seen := also_trained(train, test):
                lines.append(f"  {len(seen)} test images are training images too, byte for byte, such as {seen[0]}")
        return "\n".join(lines)


def make_plan(
    grid: Grid, store: Store, data_dir: str | None, *, retry_failed: bool = False, elsewhere: bool = False
) -> Plan:
    """Compare a grid with a store; nothing is written.

    Args:
        grid: what is wanted.
        store: what is there.
        data_dir: of the data sets.
        retry_failed: whether failed cells would run again, and cost something.
        elsewhere: the cells are run by others, who have their data.
    """
    trials = store.load("trials", COLUMNS)  # before it is asked what is done, for which every file is read once
    finished, failures = store.done(), set(store.load("failures")["cell_id"].to_pylist())
    absent = {
        name
        for name in {config.dataset for config in grid.cells}
        if not elsewhere and datasets.get(name).missing(None if data_dir is None else Path(data_dir))
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
    check_imports(grid.cells, store)
    check_named_files(grid.cells, store, data_dir)
    runnable = [*missing, *(failed if retry_failed else [])]
    costs = estimate_costs(runnable, trials, grid.placement.of)
    return Plan(grid, done, failed, missing, unavailable, costs, len(finished) - len(done), retry_failed)


def check_imports(cells: Sequence[TrialConfig], store: Store) -> None:
    """Refuse a store of another text of an imported file: rows of both would stand side by side as one method's.

    Args:
        cells: whose results belong into it.
        store: the results.

    Raises:
        ConfigError: which file, and a cell that was computed with another text of it.
    """
    wanted = {config.cell_id: now for config in cells if (now := imports_of(config))}
    if not wanted:
        return
    texts = dict(text for now in wanted.values() for text in now.items())
    for row in store.load("trials", ["cell_id", "imports"]).to_pylist():
        then = json.loads(row["imports"] or "{}")
        for name in [*wanted.get(row["cell_id"], {}), *then]:
            if name in texts and texts[name] != then.get(name):
                raise _other_version(store, row["cell_id"], name, then.get(name, "not imported"), texts[name])


def check_named_files(cells: Sequence[TrialConfig], store: Store, data_dir: str | None) -> None:
    """Refuse a store with rows of other weights or images than those that have their names now: seeds would be averaged.

    Args:
        cells: whose results belong into it.
        store: the results.
        data_dir: of the data sets; what is not on this machine is not compared.

    Raises:
        ConfigError: which file or data set, and a cell that was computed with another one of its name.
    """
    backbones = {(config.backbone, config.checkpoint): config for config in cells}
    now = {name: digest for config in backbones.values() for name, digest in weights_of(config).items()}
    own = {config.dataset: config for config in cells if ":" in config.dataset}
    if not now and not own:
        return
    for row in store.load("trials", ["cell_id", "named"]).to_pylist():
        for name, then in json.loads(row["named"] or "{}").items():
            if name in own and name not in now:
                absent = datasets.get(name).missing(None if data_dir is None else Path(data_dir))
                now |= {name: then} if absent else images_of(own[name], load_dataset(name, data_dir))
            if now.get(name, then) != then:
                raise _other_version(store, row["cell_id"], name, then, now[name])


def _other_version(store: Store, cell: str, name: str, then: str, now: str) -> ConfigError:
    return ConfigError(
        f"results {store.root!r}: cell {cell} was computed with another {name} ({then}, now {now}); "
        "write into other results (--results)"
    )


def check_data(
    cells: Sequence[TrialConfig], data_dir: str | None, placement: SweepPlacement, on_progress: Progress = silent
) -> None:
    """Open every data set that cells need, so that what is wrong with any of them, or with its tasks, is told before the first trial.

    Raises:
        ConfigError: with the problems of all data sets.
    """
    problems, of = [], defaultdict(list)
    for config in cells:
        of[config.dataset].append(config)
    for number, (name, own) in enumerate(sorted(of.items())):
        on_progress(name, number, len(of))
        try:
            room = min(placement.of(config).cache_bytes for config in own)
            check_streams(own, load_dataset(name, data_dir, cache_bytes=room))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def check_results(store: Store, cells: int, data_dir: str | None) -> None:
    """See that a store has a place and room for some cells, so that what would go wrong at their end is told before the first.

    Nothing is written: what is refused later leaves no folder behind.

    Args:
        store: where the results go.
        cells: how many are to be written.
        data_dir: of the data sets.

    Raises:
        ConfigError: it is in the folder of the data sets, or has too little room.
    """
    if data_dir is not None and "://" not in store.root and "://" not in data_dir:
        data = Path(data_dir).expanduser().resolve()
        if Path(store.root).resolve().is_relative_to(data):
            raise ConfigError(
                f"results {store.root!r}: in the folder of the data sets, {data_dir}, where they would count as data; expected "
                "another folder"
            )
    store.check_room(cells)
