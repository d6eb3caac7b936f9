"""The whole grid at a glance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from zeroflow.results.figures.style import escape, figure, looks, meta
from zeroflow.results.summary import Row

_CONFIGURED = ("method", "optimizer", "queries", "lr", "eps", "epochs")
_MEASURED = {
    "forward_passes": "forward passes (batches)", "peak_memory": "peak memory (MiB)", "seconds": "wall time (s)",
}  # fmt: skip
_TITLES = {"queries": "queries (number)", "lr": "lr (1)", "eps": "eps (1)", "epochs": "epochs (number)"}
_MOST_TICKS = 8
_WIDTH = 75  # pixels from an axis to the next, at least


@dataclass(frozen=True)
class Axis:
    """One upright axis: the height of each row between 0 and 1, None where it has no value, and what stands at which height."""

    title: str
    heights: tuple[float | None, ...]
    ticks: tuple[tuple[float, str], ...]


def parallel_coordinates(rows: Sequence[Row]) -> list[Axis]:
    """An axis for every key and cost that differs between rows, and for Avg; numbers above 0 by their logarithm."""
    values: dict[str, list[object]] = {_TITLES.get(key, key): [row.config[key] for row in rows] for key in _CONFIGURED}
    values |= {title: [getattr(row, name) for row in rows] for name, title in _MEASURED.items()}
    axes = [_axis(title, own) for title, own in values.items() if len({v for v in own if v is not None}) > 1]
    averages = [row.avg.mean if row.avg else None for row in rows]
    return [*axes, _axis("Avg (%)", list(averages), log=False)]


def _axis(title: str, values: Sequence[object], *, log: bool = True) -> Axis:
    present = [value for value in values if value is not None]
    if any(isinstance(value, str) for value in present):
        names = sorted({str(value) for value in present})
        place = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
        return Axis(
            title, tuple(None if v is None else place[str(v)] for v in values), tuple((h, n) for n, h in place.items())
        )
    found = [None if value is None else float(value) for value in values]  # type: ignore[arg-type]
    positive = [value for value in found if value]  # what costs nothing stands at the foot
    log = log and min(positive, default=0.0) > 0
    scaled = [None if v is None else (math.log(v) if v > 0 else None) if log else v for v in found]
    known = [v for v in scaled if v is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    span = high - low or 1.0
    foot = log and any(v == 0 for v in found)
    base = 0.12 if foot else 0.0
    heights = tuple(
        None if raw is None else 0.0 if s is None else base + (1 - base) * (s - low) / span
        for raw, s in zip(found, scaled, strict=True)
    )
    distinct = sorted({(h, v) for h, v in zip(heights, found, strict=True) if h is not None and v is not None})
    if len(distinct) > _MOST_TICKS:
        marks = [low + span * i / 4 for i in range(5)]
        ticks = [(base + (1 - base) * i / 4, _short(math.exp(m) if log else m, 3)) for i, m in enumerate(marks)]
        return Axis(title, heights, tuple([(0.0, "0")] * foot + ticks))
    return Axis(title, heights, tuple((h, _short(v, 4)) for h, v in distinct))


def _short(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def draw_parallel_coordinates(rows: Sequence[Row], title: str = "The whole grid") -> go.Figure:
    """A line per row through all axes, in the colours of all figures.

    Drawn from plain lines: Plotly's own type for it needs WebGL, which not every reader has, and cannot hide single rows.
    """
    axes = parallel_coordinates(rows)
    # Ticks stand left of their axis, those of the last one right of it: as much room as the longest takes.
    widths = [max(_WIDTH, 7 * max(len(text) for _, text in axis.ticks) + 28) for axis in axes[:-1]]
    at = [*itertools.accumulate(widths), sum(widths) + _WIDTH]
    found = figure(title, height=460, limit=400, min_width=at[-1] + 60, columns=2)
    for group, (row, own) in enumerate(zip(rows, looks(rows), strict=True)):
        # None, the value of a key that does not apply, has no place: the line passes over it.
        places = [(i, height) for i, axis in enumerate(axes) if (height := axis.heights[group]) is not None]
        found.add_scatter(
            x=[at[i] for i, _ in places],
            y=[round(height, 4) for _, height in places],
            mode="lines+markers",
            line={
                "color": own.color,
                "width": 3 if row.is_baseline else 1.5,
                "dash": "dot" if row.is_baseline else own.dash,
            },
            marker=own.point(5),
            opacity=0.8,
            name=escape(row.label),
            meta=meta(row, group),
            hovertemplate=f"{escape(row.label)}: Avg {row.avg} %<extra></extra>",
        )
    for i, axis in enumerate(axes):
        found.add_shape(type="line", x0=at[i], x1=at[i], y0=0, y1=1, line={"color": "#888", "width": 1}, layer="below")
        last = i == len(axes) - 1
        for height, text in axis.ticks:
            found.add_annotation(
                x=at[i],
                y=height,
                text=escape(text),
                showarrow=False,
                xanchor="left" if last else "right",
                xshift=8 if last else -6,
                font={"size": 11},
                bgcolor="rgba(255,255,255,0.8)",
            )
    found.update_xaxes(
        tickvals=at,
        ticktext=[axis.title.replace(" ", "<br>") for axis in axes],
        showgrid=False,
        range=[0, at[-1] + 50],
        showline=False,
        ticks="",
        tickangle=0,
    )
    found.update_yaxes(visible=False, range=[-0.05, 1.05])
    return found
