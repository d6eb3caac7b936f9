"""Where optimizers go between an old task's minimum and a new one's (ZeroFlow, Figures 3, 6).

Every run learns the old task and then the new one from where that ended, and again both at once. A point of R^d is shown on a
plane of its landscape, with its distance from that plane.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zeroflow.progress import Progress, silent
from zeroflow.studies.landscapes import Adapter, Landscape, Point, Run, check_cells, exact
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.placement import Placement, limited_threads
from zeroflow.trial.result import provenance

_ROOM = 0.15  # around everything seen, as a share of its extent
_OBJECTIVES: Mapping[str, Sequence[Sequence[int]]] = {"old-then-new": [[0], [1]], "both": [[0, 1]]}

SGD, ADAM = 0.05, 0.1
"""Learning rates on ``TwoParameters``, where nothing is searched: of rules that follow the gradient's size, and of Adam's."""

SIGN = 0.02
"""The same of plain sign steps, whose length is the rate."""

NINE = (
    Run("fo-adam", ADAM), Run("zo-adam", ADAM, 1e-3, 1), Run("zo-adam", ADAM, 1e-3, 4), Run("zo-adam-sign", ADAM, 1e-3, 1),
    Run("zo-adam-conserve", ADAM, 1e-3, 1), Run("fo-sgd", SGD), Run("zo-sgd", SGD, 1e-3, 1), Run("zo-sgd", SGD, 1e-3, 4),
    Run("zo-sgd-sign", SIGN, 1e-3, 1), Run("zo-sgd-conserve", SGD, 1e-3, 1), Run("forward-grad", SGD, None, 1),
)  # fmt: skip
"""The nine optimizers of the benchmark, two of them with four queries as well: the panels of Figure 6, and forward-grad."""


@dataclass(frozen=True)
class Study:
    """Runs on a landscape.

    Attributes:
        landscape_id: hash of the landscape's name, its facts and all runs.
        looks: run, objective, task (0, 1; None: both), step and where it was.
        surface: the grid, row by row of equal y.
        marks: the named points.
        config: what the id is the hash of, JSON with sorted keys.
        provenance: of code and machine.
    """

    landscape: str
    landscape_id: str
    looks: Sequence[tuple[Run, str, int | None, int, Point]]
    surface: Sequence[Point]
    marks: Mapping[str, Point]
    config: str
    provenance: Mapping[str, Any]


def study(landscape: Landscape, runs: Sequence[Run], on_progress: Progress = silent) -> Study:
    """Make all runs, and look at both losses on a grid around everything that they saw.

    Args:
        landscape: where.
        runs: what.
        on_progress: see ``Progress``; a unit is a run on a task, or a line of the surface.
    """
    config = json.dumps(
        {"landscape": landscape.name, **landscape.facts, "runs": [run.columns() for run in runs]}, sort_keys=True
    )
    looks: list[tuple[Run, str, int | None, int, Point]] = []
    done, total = 0, len(runs) * sum(map(len, _OBJECTIVES.values())) + landscape.side
    for run in runs:
        for objective, parts in _OBJECTIVES.items():
            landscape.put(landscape.start)
            step = 0
            for tasks in parts:
                task = tasks[0] if len(tasks) == 1 else None

                def look(step: int, task: int | None = task, run: Run = run, objective: str = objective) -> None:
                    if step % landscape.every == 0:
                        looks.append((run, objective, task, step, landscape.point()))

                queries = "" if run.queries is None else f" q={run.queries}"
                on_progress(f"{landscape.name}: {run.optimizer}{queries}, {objective}", done, total)
                step, done = landscape.learn(run, tasks, step, look), done + 1
            looks.append((run, objective, task, step, landscape.point()))
    marks = {}
    for name, place in landscape.marks.items():
        landscape.put(place)
        marks[name] = landscape.point()
    seen = np.array([(point.x, point.y) for point in [*(look[-1] for look in looks), *marks.values()]])
    low, high = seen.min(axis=0), seen.max(axis=0)
    room = _ROOM * (high - low)
    columns, rows = (np.linspace(low[i] - room[i], high[i] + room[i], landscape.side) for i in (0, 1))
    surface: list[Point] = []
    for number, y in enumerate(rows):
        on_progress(f"{landscape.name}: the surface", done + number, total)
        surface += [landscape.at(float(x), float(y)) for x in columns]
    device = landscape.device if isinstance(landscape, Adapter) else torch.device("cpu")
    return Study(
        landscape.name,
        hashlib.sha256(config.encode()).hexdigest()[:16],
        looks,
        surface,
        marks,
        config,
        provenance(device, {"threads": torch.get_num_threads()}),
    )


def adapter_study(cells: Sequence[TrialConfig], place: Placement, on_progress: Progress = silent) -> Study:
    """Runs with the settings of a grid's cells on the landscape of one adapter.

    Args:
        cells: see ``check_cells``; the first first-order one finds each task's optimum.
        place: where it is computed.
        on_progress: see ``Progress``.

    Raises:
        ConfigError: see ``check_cells``.
    """
    check_cells(cells)
    runs = [Run(str(c.optimizer), c.lr or 0.0, c.eps, c.queries, c.optimizer_options, c.seed) for c in cells]
    with limited_threads(place.threads):
        on_progress("adapter: each task's optimum", 0, 0)
        reference = next(run for run in runs if exact(run.optimizer))
        return study(Adapter(cells[0], place, reference, runs), runs, on_progress)
