"""What is taken for what: a confusion matrix of every stage, by class or by task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.results.figures.accuracy import draw_squares
from zeroflow.results.summary import Row
from zeroflow.trial.metrics import Matrix


@dataclass(frozen=True)
class Confusion:
    """Percent of the test samples of each true task that are put into each task, ``[T, T]``; over the seeds of a row."""

    row: Row
    matrix: Matrix


def class_confusion(confusion: pa.Table, cells: str | Sequence[str], stage: int | None = None) -> Matrix:
    """Test samples by true class and predicted class, ``[classes seen, classes seen]``, added up over ``cells``.

    Args:
        confusion: the table ``confusion``.
        cells: their ids.
        stage: number of the stage, from 0; None: the last one.
    """
    own = confusion.filter(pc.is_in(confusion["cell_id"], pa.array([cells] if isinstance(cells, str) else list(cells))))
    if len(own) and stage is None:
        stage = pc.max(own["stage"]).as_py()
    own = own.filter(pc.field("stage") == stage)
    true, predicted = (own[name].to_numpy() for name in ("true_class", "predicted_class"))
    size = 1 + int(max(true.max(initial=-1), predicted.max(initial=-1)))
    found = np.zeros((size, size))
    np.add.at(found, (true, predicted), own["n"].to_numpy())
    return found


def task_confusions(rows: Sequence[Row], confusion: pa.Table, stages: pa.Table) -> list[Confusion]:
    """Which task the samples of each task are put into after the last stage, for every row whose cells say so.

    Rows whose confusion is not of the classes of their stages are left out.

    Args:
        rows: from ``summary.summary``.
        confusion: the table ``confusion``.
        stages: the table ``stages``, which says where tasks end.
    """
    there = set(confusion["cell_id"].unique().to_pylist())
    found = []
    for row in rows:
        cells = [cell for cell in row.cells if cell in there]
        if not cells:
            continue
        own = stages.filter(pc.field("cell_id") == cells[0]).sort_by("stage")
        ends, counts = own["classes_seen"].to_pylist(), class_confusion(confusion, cells)
        if not ends or len(counts) != ends[-1]:
            continue
        starts = [0, *ends[:-1]]
        by_task = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)
        samples = by_task.sum(axis=1, keepdims=True)
        shares = np.divide(100.0 * by_task, samples, out=np.full(by_task.shape, np.nan), where=samples > 0)
        found.append(Confusion(row, shares))
    return found


def draw_task_confusion(confusions: Sequence[Confusion], title: str = "Tasks taken for others") -> go.Figure:
    """A heat map: a line of squares per true task, a column per predicted one. Of several rows a page lets choose one."""
    return draw_squares(
        [(each.row, each.matrix) for each in confusions],
        title,
        shade="share of the line (%)",
        x="task of the predicted class (number)",
        y="task of the true class (number)",
        hover="samples of task %{y} put into task %{x}: %{z:.2f} %",
    )
