"""What accuracy costs: queries, forward passes, memory, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from zeroflow.results.efficiency import ratios
from zeroflow.results.figures.style import (
    BLACK,
    BLUE,
    ORANGE,
    arranged,
    escape,
    figure,
    half_widths,
    keys,
    look,
    meta,
    number,
    numbers,
    room,
)
from zeroflow.results.summary import Row, problem_names, same_problem, setting

_MOST = 24  # settings in a figure
_TUNED = ("lr", "eps")  # chosen anew for every number of queries


@dataclass(frozen=True)
class Line:
    """Rows that differ in one thing only, which ``x`` says, in its order."""

    label: str
    x: tuple[float, ...]
    rows: tuple[Row, ...]


def against_queries(rows: Sequence[Row]) -> list[Line]:
    """A line for each optimizer and whatever else tells rows apart, with at least two numbers of queries.

    Learning rate and perturbation size may differ along a line, unless a number of queries has several of them.
    """
    without: tuple[str, ...] = ("queries", *_TUNED)
    lines = _grouped([row for row in rows if row.config["queries"] is not None], without)
    if any(len({row.config["queries"] for row in line}) < len(line) for line in lines):
        without = ("queries",)
        lines = _grouped([row for row in rows if row.config["queries"] is not None], without)
    return [
        Line(line[0].name(without=without), tuple(row.config["queries"] for row in line), tuple(line))
        for line in lines
        if len({row.config["queries"] for row in line}) > 1
    ]


def _grouped(rows: Sequence[Row], without: Sequence[str]) -> list[list[Row]]:
    """Rows that agree in all keys but some, by number of queries; they are told by their values, however those are written."""
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.avg is not None:
            lines.setdefault(setting(row.config, without=without), []).append(row)
    return [sorted(line, key=lambda row: row.config["queries"]) for line in lines.values()]


def draw_against_queries(
    lines: Sequence[Line], baselines: Sequence[Row] = (), title: str = "Accuracy against queries"
) -> go.Figure:
    """Avg over the queries per step (Figure 5), with 95 % t-intervals; the row to beat of each stream across."""
    found = figure(title, names=[*(line.label for line in lines), *map(_named, baselines)])
    for group, line in enumerate(lines):
        own = look(group, line.rows[0].config["optimizer"])
        estimates = [row.avg for row in line.rows]
        found.add_scatter(
            x=list(line.x),
            y=numbers([each.mean for each in estimates if each]),
            name=escape(line.label),
            mode="lines+markers",
            line=own.line,
            marker=own.point(),
            text=[str(each) for each in estimates],
            error_y={"array": half_widths(estimates), "color": own.color, "thickness": 1.5},
            hovertemplate="%{x} queries: %{text} %",
            meta={"points": [keys(row) for row in line.rows], "group": group},
        )
    ticks = sorted({x for line in lines for x in line.x})
    for i, baseline in enumerate(baselines):
        _across(found, baseline, ticks, i if len(baselines) > 1 else None)
    found.update_xaxes(
        title="queries per step (number)", type="log", tickvals=ticks, ticktext=[f"{x:g}" for x in ticks]
    )
    found.update_yaxes(title="Avg (%)")
    return found


def _named(baseline: Row) -> str:
    return f"{baseline.label} (no training)"


def _across(found: go.Figure, baseline: Row, x: Sequence[float], number_: int | None = None) -> None:
    """What trains nothing, as a line from end to end; ``number_``: which one, of several."""
    if baseline.avg is None or not x:
        return
    own = look(number_ or 0, None)
    found.add_scatter(
        x=[min(x), max(x)],
        y=[number(baseline.avg.mean)] * 2,
        name=escape(_named(baseline)),
        mode="lines" if number_ is None else "lines+markers",
        marker=own.point(7),
        line={"color": BLACK, "dash": "dot" if number_ is None else own.dash, "width": 1.5},
        hovertemplate=f"{baseline.avg} %",
        meta=meta(baseline, -1 - (number_ or 0)),
    )


WORK = {
    "forward_passes": "forward passes in training (batches)",
    "forward_equivalents": "work of training (forward passes)",
}


def draw_accuracy_against_forwards(
    rows: Sequence[Row], work: str = "forward_passes", title: str = "Accuracy against work"
) -> go.Figure:
    """Avg over the work of training, with 95 % t-intervals; settings of the same optimizer on one stream are joined, what needs none lies across.

    Args:
        rows: from ``tables.summary``.
        work: ``forward_passes``, or ``forward_equivalents``, in which first order pays for its backward passes.
        title: of the figure.
    """
    spent = [(row, getattr(row, work)) for row in rows]
    streams = problem_names([row.config for row in rows])
    lines: dict[tuple[Any, ...], list[tuple[Row, float]]] = {}
    for row, passes in spent:
        if row.avg is not None and passes:
            kind = (row.config["method"], row.config["optimizer"], row.shown.get("later", "-"))
            problem = same_problem(row.config)
            of = problem, row.config["later"]  # by their values, however those are written
            lines.setdefault((*kind, streams[problem], of), []).append((row, passes))
    free = [row for row, passes in spent if passes == 0 and row.avg is not None]
    names = [" ".join(text for text in kind[:-1] if text not in (None, "", "-")) for kind in lines]
    found = figure(title, names=[*names, *map(_named, free)], limit=_MOST)
    for group, ((_, optimizer, *_), line) in enumerate(lines.items()):
        line.sort(key=lambda item: item[1])
        own, estimates = look(group, optimizer), [row.avg for row, _ in line]
        found.add_scatter(
            x=[passes for _, passes in line],
            y=numbers([each.mean for each in estimates if each]),
            name=escape(names[group]),
            mode="lines+markers" if len(line) > 1 else "markers",
            line={**own.line, "width": 1},
            marker=own.point(10),
            error_y={"array": half_widths(estimates), "color": own.color, "thickness": 1.5},
            text=[
                f"{passes:,.0f} {work.replace('_', ' ')}<br>{escape(row.label)}: {row.avg} %" for row, passes in line
            ],
            hovertemplate="%{text}<extra></extra>",
            meta={
                "points": [keys(row) for row, _ in line],
                "group": group,
                "ranks": [number(each.mean) for each in estimates if each],
            },
        )
    x = [passes for _, passes in spent if passes]
    for i, row in enumerate(free):
        _across(found, row, x or [1.0, 10.0], i if len(free) > 1 else None)
    step = "D2" if x and max(x) < 100 * min(x) else 1  # 1, 2, 5, 10, ... or powers of ten alone
    found.update_xaxes(title=WORK[work], type="log", dtick=step, tickformat=",")
    found.update_yaxes(title="Avg (%)")
    return found


def _bar(color: str, pattern: str) -> dict[str, Any]:
    """How a bar is filled: the pattern tells colours apart where they cannot be seen."""
    return {
        "color": color,
        "pattern": {"shape": pattern, "fillmode": "overlay", "fgcolor": "white", "solidity": 0.2},
    }


def draw_costs(rows: Sequence[Row], title: str = "What it costs") -> go.Figure:
    """Bars of peak memory and of wall time, a pair per row (Table 2)."""
    found = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.1)  # room for the numbers behind the bars
    quantities = [
        ("peak memory, step and classifier", "MiB", "peak_memory", BLUE, "/"),
        ("wall time of a cell", "s", "seconds", ORANGE, ""),
    ]
    for column, (name, unit, quantity, color, pattern) in enumerate(quantities, start=1):
        for group, row in enumerate(rows):
            value = getattr(row, quantity)
            found.add_bar(
                x=[number(value)],
                y=[escape(row.label)],
                text=["" if value is None else f"{value:,.1f}"],
                orientation="h",
                showlegend=False,
                row=1,
                col=column,
                marker=_bar(color, pattern),
                textposition="outside",
                cliponaxis=False,
                hovertemplate=f"%{{y}}: %{{text}} {unit}<extra></extra>",
                meta=meta(row, group),
            )
        found.update_xaxes(title=f"{name} ({unit})", rangemode="tozero", row=1, col=column)
    found.update_yaxes(autorange="reversed", type="category")
    found.update_layout(barmode="overlay", bargap=0.25)
    return arranged(found, title, height=110, rows=len(rows), limit=40, min_width=room(rows) + 360).update_layout(
        margin={"r": 60}
    )


@dataclass(frozen=True)
class TradeOff:
    """Memory in MiB and Avg of a row.

    Attributes:
        row: which.
        number: its place among all rows, also those without steps: it looks alike in every figure.
        memory: of a training step, MiB.
        avg: percent.
        on_front: no other row is as accurate with as little memory.
    """

    row: Row
    number: int
    memory: float
    avg: float
    on_front: bool


def trade_off(rows: Sequence[Row]) -> list[TradeOff]:
    """The rows whose memory was measured, in their order; each is held against those of its own problem."""
    measured = [
        (row, place, row.peak_memory, row.avg.mean)
        for place, row in enumerate(rows)
        if row.avg is not None and row.peak_memory is not None
    ]
    rivals: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for row, _, memory, avg in measured:
        rivals.setdefault(same_problem(row.config), []).append((memory, avg))
    return [
        TradeOff(
            row,
            place,
            memory,
            avg,
            not any(_beats(other, (memory, avg)) for other in rivals[same_problem(row.config)]),
        )
        for row, place, memory, avg in measured
    ]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether (memory, Avg) is at least as good in both and better in one."""
    return one != other and one[0] <= other[0] and one[1] >= other[1]


def draw_trade_off(points: Sequence[TradeOff], title: str = "Accuracy against memory") -> go.Figure:
    """Avg over peak memory, up and left is better; the Pareto front of each problem is a stepped line."""
    found = figure(title, names=["Pareto front", *(point.row.label for point in points)][: _MOST + 1], limit=_MOST)
    problems: dict[tuple[object, ...], list[TradeOff]] = {}
    for point in points:
        problems.setdefault(same_problem(point.row.config), []).append(point)
    for place, rivals in enumerate(problems.values()):
        front = sorted((point for point in rivals if point.on_front), key=lambda point: (point.memory, point.avg))
        found.add_scatter(
            x=numbers([point.memory for point in front]),
            y=numbers([point.avg for point in front]),
            mode="lines",
            line={"color": "#888", "shape": "hv", "width": 1.5, "dash": "dot"},
            name="Pareto front",
            legendgroup="front",
            showlegend=place == 0,
            hoverinfo="skip",
            # All of them, for a page whose filters leave others to compare.
            meta={
                "front": [[number(p.memory), number(p.avg), keys(p.row)] for p in rivals],
                "points": [keys(p.row) for p in front],
                "group": -2 - place,
            },
        )
    for point in points:
        assert point.row.avg is not None
        own = look(point.number, point.row.config["optimizer"])
        found.add_scatter(
            x=[number(point.memory)],
            y=[number(point.avg)],
            name=escape(point.row.label),
            mode="markers",
            marker=own.point(9),
            error_y={"array": half_widths([point.row.avg]), "color": own.color, "thickness": 1.5},
            hovertemplate=f"{point.memory:,.1f} MiB: {point.row.avg} %",
            meta=meta(point.row, point.number),
        )
    found.update_xaxes(title="peak memory of a training step, with the classifier (MiB)")
    found.update_yaxes(title="Avg (%)")
    return found


_Range = tuple[float, float]


def _single(value: float | None) -> _Range | None:
    return None if value is None else (value, value)


def draw_efficiency(result: Mapping[str, Any], title: str = "What a step costs") -> go.Figure:
    """Bars of what ``zeroflow efficiency`` measured beside Table 2: first order's memory over each one's, and time over first order's.

    Args:
        result: what ``zeroflow efficiency --json`` wrote.
        title: of the figure.
    """
    rows = ratios(result)
    names = [
        escape(" ".join([found.row["optimizer"], f"q={found.row['queries']}" if found.row["queries"] else ""]))
        for found in rows
    ]
    points = [{"optimizer": found.row["optimizer"], "queries": str(found.row["queries"] or "none")} for found in rows]
    found = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    panels: list[tuple[str, list[_Range | None], list[_Range | None]]] = [
        (
            "memory saved: first order's over this (times)",
            [_single(r.saved) for r in rows],
            [_single(r.saved_here) for r in rows],
        ),
        (
            "time of a step over first order's (times)",
            [r.time for r in rows],
            [_single(r.time_here) for r in rows],
        ),
    ]
    for column, (unit, paper, here) in enumerate(panels, start=1):
        for group, (name, ranges, color, pattern) in enumerate(
            (("paper", paper, BLUE, "/"), ("here", here, ORANGE, ""))
        ):
            # A bar reaches the smallest number, its whisker the largest one of the data sets.
            beyond = [None if each is None else each[1] - each[0] for each in ranges]
            found.add_bar(
                x=numbers([None if each is None else each[0] for each in ranges]),
                y=names,
                text=["-".join(dict.fromkeys(f"{value:.2f}" for value in each)) if each else "" for each in ranges],
                error_x={
                    "array": numbers(beyond),
                    "arrayminus": [0] * len(rows),
                    "visible": any(beyond),
                    "thickness": 1.5,
                },
                name=name,
                legendgroup=name,
                orientation="h",
                showlegend=column == 1,
                row=1,
                col=column,
                marker=_bar(color, pattern),
                textposition="outside",
                cliponaxis=False,
                hovertemplate="%{y}: %{text} times",
                meta={"points": points, "group": group},
            )
        found.update_xaxes(title=unit, rangemode="tozero", row=1, col=column)
    found.update_yaxes(autorange="reversed", type="category")
    found.update_layout(barmode="group", bargap=0.25)
    return arranged(found, title, height=110 + 50 * len(rows), names=["paper", "here"], min_width=660)
