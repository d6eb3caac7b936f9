"""Plotly figures over the store: functions that get the data, and ``draw_*`` functions that draw it.

Every line differs from its neighbours in colour, dash and marker, so that a figure survives a colour-blind reader and a
black and white printer. Rows come from ``tables.summary``; a row looks alike in all figures made from the same rows.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc
from plotly.subplots import make_subplots

from zeroflow.results.tables import Estimate, Row, estimate
from zeroflow.trial.metrics import Matrix

# Okabe & Ito 2008, "Color Universal Design"; yellow left out: it is lost on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        "colorway": PALETTE,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": {"gridcolor": "#ddd", "linecolor": "#555", "ticks": "outside", "zeroline": False, "automargin": True},
        "yaxis": {"gridcolor": "#ddd", "linecolor": "#555", "ticks": "outside", "zeroline": False, "automargin": True},
        "margin": {"l": 60, "r": 20, "t": 50, "b": 60},
        "hoverlabel": {"namelength": -1},
    }
)


@dataclass(frozen=True)
class Curve:
    """Accuracy of one row along the stream: after ``classes[i]`` classes, ``accuracy[i]`` percent."""

    label: str
    classes: tuple[int, ...]
    accuracy: tuple[Estimate, ...]


def stage_curves(rows: Sequence[Row], stages: pa.Table) -> list[Curve]:
    """Accuracy per stage over the seeds of each row.

    Args:
        rows: from ``tables.summary``. stages: the table ``stages``; cells of no row are ignored.
    """
    owner = {cell: number for number, row in enumerate(rows) for cell in row.cells}
    found: list[dict[int, list[float]]] = [{} for _ in rows]
    for stage in stages.select(["cell_id", "classes_seen", "accuracy"]).to_pylist():
        if stage["cell_id"] in owner and stage["accuracy"] is not None:
            found[owner[stage["cell_id"]]].setdefault(stage["classes_seen"], []).append(stage["accuracy"])
    return [
        Curve(row.label, tuple(sorted(points)), tuple(estimate(points[x]) for x in sorted(points)))
        for row, points in zip(rows, found, strict=True)
    ]


def draw_stage_curves(curves: Sequence[Curve], title: str = "Accuracy along the stream") -> go.Figure:
    """A line per row over the classes seen, with the 95 % t-interval over seeds as a band."""
    figure = _figure(title)
    for number, curve in enumerate(curves):
        name, color = _escape(curve.label), PALETTE[number % len(PALETTE)]
        low = [point.mean - (point.half_width or 0.0) for point in curve.accuracy]
        high = [point.mean + (point.half_width or 0.0) for point in curve.accuracy]
        if any(point.half_width is not None for point in curve.accuracy):
            figure.add_scatter(
                x=[*curve.classes, *reversed(curve.classes)], y=[*high, *reversed(low)], fill="toself",
                fillcolor=color, opacity=0.15, mode="lines", line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=name,
            )  # fmt: skip
        figure.add_scatter(
            x=list(curve.classes), y=[point.mean for point in curve.accuracy], name=name, legendgroup=name,
            mode="lines+markers", line={"color": color, "dash": DASHES[number % len(DASHES)]},
            marker=_marker(number), text=[str(point) for point in curve.accuracy],
            hovertemplate="%{x} classes: %{text} %",
        )  # fmt: skip
    figure.update_xaxes(title="classes seen")
    figure.update_yaxes(title="accuracy on all classes seen (%)")
    return figure


def task_accuracy(accuracy: pa.Table, cell_id: str) -> Matrix:
    """Accuracy of one cell in percent, stage x task ``[T, T]``, NaN where the table ``accuracy`` has no row."""
    rows = accuracy.filter(pc.field("cell_id") == cell_id).to_pylist()
    size = 1 + max((row["stage"] for row in rows), default=-1)
    matrix = np.full((size, size), np.nan)
    for row in rows:
        if row["accuracy"] is not None:
            matrix[row["stage"], row["task"]] = row["accuracy"]
    return matrix


def draw_task_accuracy(matrix: Matrix, title: str = "Accuracy per task") -> go.Figure:
    """A heat map: a line of squares per stage, a column per task."""
    numbers = [str(number + 1) for number in range(len(matrix))]
    figure = _figure(title)
    figure.add_heatmap(
        x=numbers, y=numbers, z=[[None if np.isnan(v) else float(v) for v in line] for line in matrix],
        text=[["" if np.isnan(v) else f"{v:.0f}" for v in line] for line in matrix], texttemplate="%{text}",
        colorscale="Cividis", zmin=0, zmax=100, colorbar={"title": "accuracy (%)"}, hoverongaps=False,
        hovertemplate="stage %{y}, task %{x}: %{z:.2f} %<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="task (number)", type="category", showgrid=False, constrain="domain")
    figure.update_yaxes(
        title="after stage (number)", type="category", autorange="reversed", showgrid=False, scaleanchor="x"
    )
    return figure


def draw_costs(rows: Sequence[Row], title: str = "What it costs") -> go.Figure:
    """Bars of peak memory and of wall time, a pair per row."""
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    names = [_escape(row.label) for row in rows]
    quantities = [("peak memory of a step (MiB)", "peak_memory", "/"), ("wall time of a cell (s)", "seconds", "")]
    for column, (axis, quantity, pattern) in enumerate(quantities, start=1):
        values = [getattr(row, quantity) for row in rows]
        figure.add_bar(
            x=values, y=names, orientation="h", showlegend=False, row=1, col=column,
            marker={"color": PALETTE[column - 1], "pattern": {"shape": pattern}},
            texttemplate="%{x:,.1f}", textposition="auto", hovertemplate="%{y}: %{x:,.1f}<extra></extra>",
        )  # fmt: skip
        figure.update_xaxes(title=axis, rangemode="tozero", row=1, col=column)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(template=TEMPLATE, title=_escape(title), height=150 + 26 * len(rows))
    return figure


def draw_accuracy_against_forwards(rows: Sequence[Row], title: str = "Accuracy against work") -> go.Figure:
    """Avg over the forward passes spent in training; what needs none is a horizontal line."""
    figure = _figure(title)
    for number, row in enumerate(rows):
        if row.avg is None or row.forward_passes is None:
            continue
        name, color = _escape(row.label), PALETTE[number % len(PALETTE)]
        if row.forward_passes == 0:
            figure.add_hline(
                y=row.avg.mean, line={"color": color, "dash": "dash"}, annotation_text=f"{name} (no training)",
                annotation_position="bottom right",
            )  # fmt: skip
            continue
        figure.add_scatter(
            x=[row.forward_passes], y=[row.avg.mean], name=name, mode="markers", marker={**_marker(number), "size": 11},
            error_y={"array": [row.avg.half_width or 0.0], "color": color},
            hovertemplate=f"%{{x:,.0f}} forward passes: {row.avg} %",
        )  # fmt: skip
    figure.update_xaxes(title="forward passes in training (batches)", type="log")
    figure.update_yaxes(title="Avg (%)")
    return figure


def _figure(title: str) -> go.Figure:
    return go.Figure(layout={"template": TEMPLATE, "title": _escape(title), "height": 480, "showlegend": None})


def _marker(number: int) -> dict[str, object]:
    return {"symbol": MARKERS[number % len(MARKERS)], "color": PALETTE[number % len(PALETTE)], "size": 8}


def _escape(text: str) -> str:
    """Plotly reads tags in names and titles; what comes from data is to be shown, not read."""
    return html.escape(text, quote=False)
