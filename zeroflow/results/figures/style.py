"""How figures look: colours that a colour-blind reader tells apart, dashes and markers for a black and white printer.

A colour says which family of optimizers a row belongs to and means the same in every figure; dash and marker tell the rows of
a figure apart even without it. Every mark carries what a reader filters by (``keys``), so that a page can hide it.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from zeroflow.results.estimates import Estimate
from zeroflow.results.summary import Row

# Okabe & Ito 2008, "Color Universal Design"; yellow left out: it is lost on white.
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE, BLACK = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
)  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
ROW_HEIGHT = 26
"""Pixels of a row in a figure that has a line for each."""

MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
SEQUENTIAL = "Cividis"
"""The colour scale of numbers: even in lightness, and made for colour-blind readers."""

# The first that fits names the family.
_FAMILIES = (
    ("fo-", VERMILLION), ("forward-grad", PURPLE), ("zo-sgd", BLUE), ("zo-adam", GREEN), ("zo-", SKY), ("", ORANGE),
)  # fmt: skip

_AXIS = {
    "title": {"standoff": 8, "font": {"size": 13}}, "gridcolor": "#ddd", "linecolor": "#555", "ticks": "outside", "zeroline": False, "automargin": True,
}  # fmt: skip
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 15}},
        "colorway": PALETTE,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 60, "r": 20, "t": 50, "b": 60},
        "hoverlabel": {"namelength": -1},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#888", "activecolor": "#888"},
    }
)

_LEGEND_LINE = 21  # pixels
_LEGEND_ENTRY, _LETTER = 50, 7.2  # pixels of an entry, and of each of its letters
_WIDTH = 850  # pixels for which heights are made; a page measures its own


@dataclass(frozen=True)
class Look:
    """Colour, dash and marker of a row."""

    color: str
    dash: str
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.color, "dash": self.dash, "width": 2}

    def point(self, size: int = 8) -> dict[str, Any]:
        return {"symbol": self.marker, "color": self.color, "size": size}


def look(number: int, optimizer: str | None) -> Look:
    """Of the ``number``-th thing in a figure, from 0; any 24 in a row differ without colour."""
    color = BLACK if optimizer is None else next(color for start, color in _FAMILIES if optimizer.startswith(start))
    return Look(color, DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)])


def looks(rows: Sequence[Row]) -> list[Look]:
    """Of rows; the same rows get the same looks in every figure."""
    return [look(number, row.config["optimizer"]) for number, row in enumerate(rows)]


def meta(row: Row, group: int) -> dict[str, Any]:
    """What a mark carries of its row, for a page that hides and counts.

    ``keys``: to filter by, and whether it is the row to beat. ``group``: the same for all marks of a row in a figure.
    ``rank``: Avg; of too many rows a page shows the best. ``label``: the row in a list to choose from.
    """
    rank = number(row.avg.mean) if row.avg else None
    return {"keys": keys(row), "group": group, "rank": rank, "label": row.name(without=["dataset"])}


def keys(row: Row) -> dict[str, Any]:
    """What a row is filtered by, and whether it is the row to beat."""
    return {**row.filters, "baseline": row.is_baseline}


def figure(title: str, *, height: int = 440, names: Sequence[str] = (), rows: int = 0, **meta: Any) -> go.Figure:
    """An empty figure.

    Args:
        title: plain text.
        height: pixels without legend and rows.
        names: of the entries of the legend, which lies below the axes.
        rows: lines of a figure that has one for each row.
        **meta: what a page must know: ``limit``, how many rows it draws at most; ``choose``, that it draws one;
            ``min_width``, ``max_width``, in pixels.
    """
    return arranged(go.Figure(), title, height=height, names=names, rows=rows, **meta)


def arranged(
    found: go.Figure, title: str, *, height: int = 440, names: Sequence[str] = (), rows: int = 0, **meta: Any
) -> go.Figure:
    """The same for a figure that is there already, of several panels."""
    longest = max(map(len, names), default=1)
    lines = math.ceil(len(names) / max(1, int(_WIDTH / (_LEGEND_ENTRY + _LETTER * longest))))
    if rows:
        meta["row_height"] = ROW_HEIGHT
    return found.update_layout(
        template=TEMPLATE,
        title=escape(title),
        height=height + ROW_HEIGHT * rows + _LEGEND_LINE * lines,
        margin={"b": 50},
        showlegend=bool(names),
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"},
        meta={"height": height, "legend": bool(names), **meta},
    )


def room(rows: Sequence[Row]) -> int:
    """Pixels that the rows' labels take beside a figure, at least 150."""
    return max(150, int(_LETTER * max((len(row.label) for row in rows), default=0)))


def half_widths(estimates: Sequence[Estimate | None]) -> list[float | None]:
    """For error bars; None draws none."""
    return [None if found is None or found.half_width is None else number(found.half_width) for found in estimates]


def hovered(point: Estimate, unit: str, seeds: int) -> str:
    """A point of a line of so many ``seeds`` in words, with the number of its own where not all of them have a value there."""
    return f"{point} {unit}" + (f", {point.n} of {seeds} seeds" if point.n < seeds else "")


def number(value: float | None) -> float | None:
    """Five digits: more cannot be seen, and a page of many figures is carried around."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def numbers(values: Sequence[float | None]) -> list[float | None]:
    return [number(value) for value in values]


def escape(text: str) -> str:
    """Plotly reads tags in names and titles; what comes from data is to be shown, not read."""
    return html.escape(text, quote=False)


def to_column(found: go.Figure, width: int = 340) -> go.Figure:
    """A copy at the width of a paper's column (340 pixels of 1/96 inch are 9 cm), its letters and lines still to be read.

    Panels beside each other that have axes of their own come one below the other; the whole grid takes two columns. Export it
    as SVG or PDF, or as PNG with a scale of 4.
    """
    small = go.Figure(found)
    page = small.layout.meta or {}
    width *= page.get("columns", 1)
    shown = [trace for trace in small.data if trace.visible is not False]
    rows = {text for trace in shown for text in _texts(trace.y)}
    left = _SMALL_LETTER * max(map(len, rows), default=0) + 12 if rows else 44
    panels = len({axis.domain for axis in small.select_xaxes() if axis.domain}) or 1
    stacked = panels > 1 and not rows and not small.layout.annotations and len(list(small.select_yaxes())) == panels
    if stacked:
        for below, (x, y) in enumerate(zip(small.select_xaxes(), small.select_yaxes(), strict=True)):
            x.domain, y.domain = (0, 1), (1 - (below + 0.75) / panels, 1 - below / panels)
        titles = [title for x in small.select_xaxes() if (title := x.title.text)]
        for x in small.select_xaxes():
            x.title.text = None
        x.title.text = titles[0] if titles else None  # of the lowest
        panels = 1
    axes = 22 * len(rows) * 0.62 + 90 if rows else 0.62 * page.get("height", small.layout.height or 440)
    axes *= 1.6 if stacked else 1
    names = dict.fromkeys(trace.name for trace in shown if trace.name and trace.showlegend is not False)
    lines = 0
    if small.layout.showlegend and names:
        entry = 36 + _SMALL_LETTER * max(map(len, names))
        lines = math.ceil(len(names) / max(1, int((width - 8) / entry)))
    small.update_layout(
        width=width, height=round(max(200, axes) + 19 * lines + 30), font={"size": 9}, title={"font": {"size": 10}, "xref": "container", "x": 0.02},
        margin={"l": left, "r": 8, "t": 30}, legend={"font": {"size": 8}, "maxheight": 1},
    )  # fmt: skip
    small.update_annotations(font={"size": 9})
    small.update_traces(marker={"size": 5}, selector={"type": "scatter"})
    small.update_traces(textfont={"size": 7}, selector={"type": "bar"})
    small.update_xaxes(title={"font": {"size": 9}}, tickfont={"size": 8}, nticks=4 if panels > 1 else None)
    small.update_yaxes(title={"font": {"size": 9}}, tickfont={"size": 8})
    for axis in small.select_xaxes():
        first, last = axis.domain or (0, 1)
        if axis.title.text:  # as many lines as it takes beside the next panel's
            letters = int((width - left - 8) * (last - first) / _SMALL_LETTER)
            axis.title.text = "<br>".join(textwrap.wrap(axis.title.text, max(letters, 6), break_long_words=False))
    if rows:
        small.update_yaxes(ticks="")
    for number_, axis in enumerate(small.select_xaxes(), start=1):
        name = "x" if number_ == 1 else f"x{number_}"
        longest = [
            max(value for value in trace.x if value is not None)
            for trace in shown
            if trace.type == "bar"
            and (trace.xaxis or "x") == name
            and trace.orientation == "h"
            and any(value is not None for value in trace.x)
        ]
        if longest and max(longest) > 0:  # room for the number behind it
            axis.range = [0, max(longest) * 1.45]
    return small


_SMALL_LETTER = 4.7
"""Pixels of a letter in a figure of a column."""


def _texts(values: Any) -> list[str]:
    return [value for value in (() if values is None else values) if isinstance(value, str)]
