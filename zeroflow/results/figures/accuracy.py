"""How accurate: along the stream, task by task, on the last task, and all rows beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc
from plotly.subplots import make_subplots

from zeroflow.results.estimates import Estimate, estimate, measured
from zeroflow.results.figures.style import (
    BLACK,
    SEQUENTIAL,
    Look,
    arranged,
    escape,
    figure,
    half_widths,
    hovered,
    looks,
    meta,
    number,
    numbers,
    room,
)
from zeroflow.results.summary import Row, same_problem
from zeroflow.trial.metrics import Matrix

_MOST_LINES, _MOST_DOTS = 12, 40


@dataclass(frozen=True)
class Curve:
    """Accuracy of one row along the stream: after ``classes[i]`` classes, ``accuracy[i]`` percent."""

    row: Row
    classes: tuple[int, ...]
    accuracy: tuple[Estimate, ...]

    @property
    def label(self) -> str:
        return self.row.label


def stage_curves(rows: Sequence[Row], stages: pa.Table) -> list[Curve]:
    """Accuracy per stage over the seeds of each row; no curve for a row without stages.

    Args:
        rows: from ``tables.summary``.
        stages: the table ``stages``; cells of no row are ignored.
    """
    owner = {cell: number for number, row in enumerate(rows) for cell in row.cells}
    found: list[dict[int, list[float]]] = [{} for _ in rows]
    for stage in stages.select(["cell_id", "classes_seen", "accuracy"]).to_pylist():
        if stage["cell_id"] in owner and stage["accuracy"] is not None:
            found[owner[stage["cell_id"]]].setdefault(stage["classes_seen"], []).append(stage["accuracy"])
    return [
        Curve(row, tuple(sorted(points)), tuple(estimate(points[x]) for x in sorted(points)))
        for row, points in zip(rows, found, strict=True)
        if points
    ]


def draw_stage_curves(curves: Sequence[Curve], title: str = "Accuracy along the stream") -> go.Figure:
    """A line per row over the classes seen, with the 95 % t-interval over seeds as a band."""
    found = figure(title, names=[curve.label for curve in curves][:_MOST_LINES], limit=_MOST_LINES)
    for group, (curve, look) in enumerate(zip(curves, looks([curve.row for curve in curves]), strict=True)):
        add_curve(
            found,
            curve.classes,
            curve.accuracy,
            escape(curve.label),
            look,
            meta(curve.row, group),
            "%",
            curve.row.seeds,
        )
    found.update_xaxes(title="classes seen (number)")
    found.update_yaxes(title="accuracy on all classes seen (%)")
    return found


def add_curve(
    found: go.Figure,
    x: Sequence[float],
    y: Sequence[Estimate],
    name: str,
    look: Look,
    carried: Mapping[str, object],
    unit: str,
    seeds: int,
) -> None:
    """Draw a line over the classes seen with its interval as a band, where there is one.

    Args:
        found: where.
        x: numbers of classes.
        y: as many estimates.
        name: of the line, escaped.
        look: of the line.
        carried: what a page must know of the line, see ``meta``.
        unit: of the estimates, ``%`` or ``points``.
        seeds: of the line; a point of fewer says so.
    """
    if any(point.half_width is not None for point in y):
        low = [point.mean - (point.half_width or 0.0) for point in y]
        high = [point.mean + (point.half_width or 0.0) for point in y]
        found.add_scatter(
            x=[*x, *reversed(x)],
            y=numbers([*high, *reversed(low)]),
            fill="toself",
            fillcolor=look.color,
            opacity=0.15,
            mode="lines",
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
            meta=carried,
        )
    found.add_scatter(
        x=list(x),
        y=numbers([point.mean for point in y]),
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line=look.line,
        marker=look.point(),
        text=[hovered(point, unit, seeds) for point in y],
        hovertemplate="%{x} classes: %{text}",
        meta=carried,
    )


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy in percent, stage x task ``[T, T]``, mean over the seeds of a row; NaN where there is none."""

    row: Row
    matrix: Matrix


def task_accuracies(rows: Sequence[Row], accuracy: pa.Table) -> list[TaskAccuracy]:
    """The matrix of every row that has one.

    Args:
        rows: from ``tables.summary``.
        accuracy: the table ``accuracy``.
    """
    found = ((row, task_accuracy(accuracy, row.cells)) for row in rows)
    return [TaskAccuracy(row, matrix) for row, matrix in found if matrix.size]


def task_accuracy(accuracy: pa.Table, cells: str | Sequence[str]) -> Matrix:
    """Accuracy in percent, stage x task ``[T, T]``, NaN where the table ``accuracy`` has no row; the mean over ``cells``."""
    cells = [cells] if isinstance(cells, str) else list(cells)
    rows = accuracy.filter(pc.is_in(accuracy["cell_id"], pa.array(cells, pa.string()))).to_pylist()
    size = 1 + max((row["stage"] for row in rows), default=-1)
    total, count = np.zeros((size, size)), np.zeros((size, size))
    for row in rows:
        if row["accuracy"] is not None:
            total[row["stage"], row["task"]] += row["accuracy"]
            count[row["stage"], row["task"]] += 1
    return np.divide(total, count, out=np.full((size, size), np.nan), where=count > 0)


def draw_task_accuracy(matrices: Sequence[TaskAccuracy], title: str = "Accuracy per task") -> go.Figure:
    """A heat map: a line of squares per stage, a column per task. Of several rows the first is seen; a page lets choose."""
    return draw_squares(
        [(each.row, each.matrix) for each in matrices],
        title,
        shade="accuracy (%)",
        x="task (number)",
        y="after stage (number)",
        hover="stage %{y}, task %{x}: %{z:.2f} %",
    )


def draw_squares(
    matrices: Sequence[tuple[Row, Matrix]], title: str, *, shade: str, x: str, y: str, hover: str
) -> go.Figure:
    """Square matrices of percent as heat maps, of which a page lets choose one.

    Args:
        matrices: of each row, ``[T, T]``.
        title: of the figure.
        shade: what a colour means.
        x: title of the columns.
        y: title of the lines.
        hover: what is said of a square, a template of Plotly's.
    """
    found = figure(title, height=520, choose=True, max_width=720)
    for group, (row, matrix) in enumerate(matrices):
        tasks = [str(task + 1) for task in range(len(matrix))]
        found.add_heatmap(
            x=tasks,
            y=tasks,
            z=[numbers(list(line)) for line in matrix],
            name=escape(row.label),
            texttemplate="%{z:.0f}",
            visible=group == 0,
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=100,
            colorbar={"title": {"text": shade, "side": "right"}, "thickness": 14},
            hoverongaps=False,
            hovertemplate=f"{hover}<extra></extra>",
            meta=meta(row, group),
        )
    found.update_xaxes(title=x, type="category", showgrid=False, constrain="domain")
    found.update_yaxes(
        title=y, type="category", autorange="reversed", showgrid=False, scaleanchor="x", constrain="domain"
    )
    return found


@dataclass(frozen=True)
class Dot:
    """One number of a row, percent."""

    row: Row
    value: Estimate


def last_task_accuracy(rows: Sequence[Row], accuracy: pa.Table) -> list[Dot]:
    """Accuracy on the last task after the last stage, over the seeds of each row: how well a row still learns."""
    owner = {cell: number for number, row in enumerate(rows) for cell in row.cells}
    last: dict[str, dict[str, Any]] = {}
    for line in accuracy.select(["cell_id", "stage", "task", "accuracy"]).to_pylist():
        before = last.get(line["cell_id"])
        if line["stage"] == line["task"] and (before is None or before["stage"] < line["stage"]):
            last[line["cell_id"]] = line
    values: list[list[float]] = [[] for _ in rows]
    for cell, line in last.items():
        if cell in owner and line["accuracy"] is not None:
            values[owner[cell]].append(line["accuracy"])
    return [Dot(row, value) for row, own in zip(rows, values, strict=True) if (value := measured(own)) is not None]


def draw_last_task_accuracy(dots: Sequence[Dot], title: str = "Accuracy on the last task") -> go.Figure:
    """A dot with its 95 % t-interval for each row; the row to beat is also a line down the figure, where all are of one stream."""
    return _draw_dots(title, {"accuracy on the last task (%)": "%"}, [(dot.row, [dot.value]) for dot in dots])


def draw_ranking(rows: Sequence[Row], title: str = "All rows beside each other") -> go.Figure:
    """Avg, Last and Fgt of every row with their 95 % t-intervals, a line of dots each; SimpleCIL as a line down, of one stream.

    In place of the paper's radar (Figure 2), in which areas depend on the order of the axes and intervals find no room.
    """
    units = {"Avg (%)": "%", "Last (%)": "%", "Fgt (points, less is better)": "points"}
    return _draw_dots(title, units, [(row, [row.avg, row.last, row.fgt]) for row in rows])


def _draw_dots(
    title: str, units: Mapping[str, str], items: Sequence[tuple[Row, Sequence[Estimate | None]]]
) -> go.Figure:
    """A panel for each axis title, a line of dots for each row."""
    found = make_subplots(cols=len(units), shared_yaxes=True, horizontal_spacing=0.03)
    rows = [row for row, _ in items]
    one_stream = len({same_problem(row.config) for row in rows}) == 1
    for group, ((row, values), look) in enumerate(zip(items, looks(rows), strict=True)):
        for column, (unit, point) in enumerate(zip(units.values(), values, strict=True), start=1):
            if point is None:
                continue
            found.add_scatter(
                x=[number(point.mean)],
                y=[escape(row.label)],
                mode="markers",
                marker=look.point(9),
                showlegend=False,
                error_x={"array": half_widths([point]), "color": look.color, "thickness": 1.5},
                text=[str(point)],
                hovertemplate=f"%{{y}}: %{{text}} {unit}<extra></extra>",
                meta=meta(row, group),
                row=1,
                col=column,
            )
            if row.is_baseline and one_stream:
                found.add_vline(
                    x=point.mean, row=1, col=column, line={"color": BLACK, "dash": "dot", "width": 1}, layer="below"
                )
    for column, axis in enumerate(units, start=1):
        found.update_xaxes(title=axis, row=1, col=column)
    found.update_yaxes(autorange="reversed", type="category")
    return arranged(found, title, height=110, rows=len(rows), limit=_MOST_DOTS, min_width=room(rows) + 180 * len(units))
