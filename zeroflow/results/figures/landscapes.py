"""Old task against new task: the way of each optimizer over both losses (Figures 3 and 6), and function values (Figure 7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc
from plotly.subplots import make_subplots

from zeroflow.results.differences import as_text, numbers_of
from zeroflow.results.estimates import Estimate, estimate
from zeroflow.results.figures.style import (
    BLACK,
    BLUE,
    VERMILLION,
    Look,
    arranged,
    escape,
    figure,
    hovered,
    look,
    meta,
    number,
    numbers,
)
from zeroflow.results.summary import Row
from zeroflow.trial.metrics import Matrix

_OLD, _NEW = BLUE, VERMILLION
_LEVELS = 12
_POINT_MARKS = {"start": "circle-open", "old optimum": "star", "new optimum": "star-square", "balance": "diamond-tall"}
_MOST_FRAMES = 40
_AXES = {
    "two-parameters": ("first parameter (1)", "second parameter (1)"),
    "adapter": ("towards the old task's optimum (1)", "square to it, towards the new task's optimum (1)"),
}


@dataclass(frozen=True)
class Surface:
    """Losses of two tasks on a grid.

    Attributes:
        landscape_id: its id in the store.
        landscape: its name.
        x: the grid, ascending.
        y: the grid, ascending.
        loss_old: of the first task, ``[len(y), len(x)]``, NaN where there is none.
        loss_new: of the second task, likewise.
        points: named ones, (x, y) each.
    """

    landscape_id: str
    landscape: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    loss_old: Matrix
    loss_new: Matrix
    points: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """The way of one run over a surface: steps, places and losses, ``[n]`` each."""

    landscape_id: str
    optimizer: str
    queries: int | None
    seed: int
    objective: str
    settings: str  # what tells it from other runs of its optimizer and queries, but for the seed
    steps: tuple[int, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    loss_old: tuple[float | None, ...]
    loss_new: tuple[float | None, ...]

    @property
    def label(self) -> str:
        queries = None if self.queries is None else f"q={self.queries}"
        return " ".join(filter(None, [self.optimizer, queries, self.settings]))


def surfaces(table: pa.Table) -> list[Surface]:
    """The landscapes of the table ``surfaces``, by name."""
    found = []
    for landscape in sorted(pc.unique(table["landscape_id"]).to_pylist()):
        rows = table.filter(pc.field("landscape_id") == landscape).to_pylist()
        grid = [row for row in rows if row["point"] is None]
        x, y = (tuple(sorted({row[axis] for row in grid})) for axis in ("x", "y"))
        places = [(y.index(row["y"]), x.index(row["x"])) for row in grid]
        old, new = np.full((len(y), len(x)), np.nan), np.full((len(y), len(x)), np.nan)
        for place, row in zip(places, grid, strict=True):
            old[place] = np.nan if row["loss_old"] is None else row["loss_old"]
            new[place] = np.nan if row["loss_new"] is None else row["loss_new"]
        points = {row["point"]: (row["x"], row["y"]) for row in rows if row["point"] is not None}
        found.append(Surface(landscape, rows[0]["landscape"], x, y, old, new, points))
    return sorted(found, key=lambda surface: (surface.landscape != "two-parameters", surface.landscape_id))


def trajectories(table: pa.Table) -> list[Run]:
    """The runs of the table ``trajectories``: first order first, then by name, queries, objective, seed."""
    runs: dict[tuple[object, ...], list[dict[str, object]]] = {}
    named = ("landscape_id", "optimizer", "queries", "seed", "objective", "optimizer_options", "lr", "eps")
    for row in table.sort_by("step").to_pylist():
        runs.setdefault(tuple(row[key] for key in named), []).append(row)
    columns = ("step", "x", "y", "loss_old", "loss_new")
    found = [
        Run(*key[:5], _apart(key, runs), *(tuple(row[column] for row in rows) for column in columns))  # type: ignore[arg-type, call-arg]
        for key, rows in runs.items()
    ]
    return sorted(
        found,
        key=lambda run: (not run.optimizer.startswith("fo-"), run.optimizer, run.queries or 0, run.objective, run.seed),
    )


def _apart(key: tuple[object, ...], keys: Iterable[tuple[object, ...]]) -> str:
    """Learning rate, eps and options of a run, where others of its optimizer and queries on its landscape have other ones."""
    names = ("optimizer_options", "lr", "eps")
    twins = [dict(zip(names, other[5:], strict=True)) for other in keys if other[:3] == key[:3]]
    own = dict(zip(names, key[5:], strict=True))
    options, lr, eps = (own[name] if len({twin[name] for twin in twins}) > 1 else None for name in names)
    numbers = numbers_of(twins)
    named = [
        f"{name}={as_text(name, value, numbers)}" for name, value in (("lr", lr), ("eps", eps)) if value is not None
    ]
    more = as_text("optimizer_options", options, numbers) if options else "-"
    return " ".join(part for part in [*named, more] if part != "-")


def draw_trajectories(
    surface: Surface, runs: Sequence[Run], title: str = "The way over both losses", *, objective: str | None = None
) -> go.Figure:
    """Contours of both losses, the named points, and a line for each run, from the open circle on (Figures 3 and 6).

    Args:
        surface: from ``surfaces``.
        runs: from ``trajectories``; those of other landscapes are left out.
        title: of the figure.
        objective: ``both`` or ``old-then-new``; None: all runs.
    """
    shown = _of(surface, runs, objective)
    found = _landscape(surface, title, names=[run.label for run in shown])
    for group, run in enumerate(shown):
        found.add_scatter(**_path(run, look(group, run.optimizer), group, run.x, run.y))
    return found


def animate_trajectories(
    surface: Surface,
    runs: Sequence[Run],
    title: str = "The way over both losses, step by step",
    *,
    objective: str | None = None,
) -> go.Figure:
    """The same as an animation with a play button and a slider over the steps; at most 40 frames, the last one is seen first."""
    shown = _of(surface, runs, objective)
    found = _landscape(surface, title, names=[run.label for run in shown], height=600)
    steps = sorted({step for run in shown for step in run.steps})
    chosen = (
        [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(_MOST_FRAMES, len(steps))).astype(int))]
        if steps
        else []
    )
    first = len(found.data)
    for group, run in enumerate(shown):
        found.add_scatter(**_path(run, look(group, run.optimizer), group, run.x, run.y))
    frames = []
    for step in chosen:
        data = []
        for run in shown:
            end = sum(own <= step for own in run.steps)
            data.append({"type": "scatter", "x": numbers(run.x[:end]), "y": numbers(run.y[:end])})
        frames.append(go.Frame(name=str(step), data=data, traces=list(range(first, first + len(shown)))))
    found.frames = frames
    now = {"mode": "immediate", "frame": {"duration": 0, "redraw": False}, "transition": {"duration": 0}}
    play = {"fromcurrent": False, "frame": {"duration": 120, "redraw": False}, "transition": {"duration": 0}}
    buttons = [
        {"label": "play", "method": "animate", "args": [None, play]},
        {"label": "pause", "method": "animate", "args": [[None], now]},
    ]
    above = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"}
    found.update_layout(
        updatemenus=[
            {**above, "type": "buttons", "direction": "left", "showactive": False, "pad": {"b": 72}, "buttons": buttons}
        ],
        sliders=[
            {
                **above,
                "active": max(0, len(chosen) - 1),
                "len": 1,
                "pad": {"b": 8},
                "currentvalue": {"prefix": "step ", "xanchor": "right"},
                "steps": [{"label": str(step), "method": "animate", "args": [[str(step)], now]} for step in chosen],
            }
        ],
        margin={"t": 140},
    )
    return found


def draw_losses_against_each_other(
    surface: Surface, runs: Sequence[Run], title: str = "Old task against new task", *, objective: str | None = None
) -> go.Figure:
    """Loss of the old task over that of the new one: what a run gives up for what it gains; down and left is better."""
    shown = _of(surface, runs, objective)
    found = figure(title, names=[run.label for run in shown])
    for group, run in enumerate(shown):
        path = _path(run, look(group, run.optimizer), group, run.loss_new, run.loss_old)
        found.add_scatter(**path)
    found.update_xaxes(title="loss of the new task (nats)")
    found.update_yaxes(title="loss of the old task (nats)")
    return found


def _of(surface: Surface, runs: Sequence[Run], objective: str | None) -> list[Run]:
    """The runs to draw; of several seeds the first, for a line of each would hide the surface."""
    own = [run for run in runs if run.landscape_id == surface.landscape_id and objective in (None, run.objective)]
    first: dict[tuple[object, ...], Run] = {}
    for run in sorted(own, key=lambda run: run.seed):
        first.setdefault((run.optimizer, run.queries, run.settings, run.objective), run)
    return [run for run in own if run in first.values()]


def _path(run: Run, own: Look, group: int, x: Sequence[float | None], y: Sequence[float | None]) -> dict[str, object]:
    queries = "none" if run.queries is None else str(run.queries)
    return {
        "x": numbers(x),
        "y": numbers(y),
        "name": escape(run.label),
        "mode": "lines+markers",
        "line": own.line,
        "marker": {**own.point(5), "maxdisplayed": 24},
        "text": [f"step {step}" for step in run.steps],
        "hovertemplate": "%{text}: (%{x:.3g}, %{y:.3g})",
        "meta": {"keys": {"optimizer": run.optimizer, "queries": queries}, "group": group},
    }


def _landscape(surface: Surface, title: str, *, names: Sequence[str], height: int = 540) -> go.Figure:
    found = figure(
        title, height=height, names=[*names, "loss of the old task", "loss of the new task", *surface.points]
    )
    for name, loss, color, dash in (
        ("old task", surface.loss_old, _OLD, "solid"),
        ("new task", surface.loss_new, _NEW, "dot"),
    ):
        found.add_contour(
            x=numbers(surface.x),
            y=numbers(surface.y),
            z=[numbers(list(line)) for line in loss],
            name=f"loss of the {name}",
            contours={"coloring": "none", **_levels(loss)},
            autocontour=False,
            line={"color": color, "width": 1, "dash": dash},
            showscale=False,
            showlegend=True,
            opacity=0.7,
            hovertemplate=f"loss of the {name}: %{{z:.3g}} nats<extra></extra>",
        )
    colors = {"old optimum": _OLD, "new optimum": _NEW}
    for name, (x, y) in surface.points.items():
        found.add_scatter(
            x=[number(x)],
            y=[number(y)],
            name=escape(name),
            mode="markers",
            marker={
                "symbol": _POINT_MARKS.get(name, "hexagram"),
                "size": 14,
                "color": colors.get(name, BLACK),
                "line": {"width": 1.5, "color": "#fff" if name != "start" else BLACK},
            },
            hovertemplate="(%{x:.3g}, %{y:.3g})",
        )
    across, up = _AXES.get(surface.landscape, ("x (1)", "y (1)"))
    # A run that leaves the surface does not shrink it; lengths are alike in both directions.
    for update, title_, values in ((found.update_xaxes, across, surface.x), (found.update_yaxes, up, surface.y)):
        update(title=title_, showgrid=False, range=[min(values), max(values)] if values else None, constrain="domain")
    return found.update_yaxes(scaleanchor="x")


def _levels(loss: Matrix) -> dict[str, float]:
    """Where contour lines go: evenly over the lower nine tenths of the values, for the rest is a wall."""
    seen = loss[np.isfinite(loss)]
    if not seen.size:
        return {}
    low, high = float(seen.min()), float(np.quantile(seen, 0.9))
    step = (high - low) / _LEVELS or 1.0
    return {"start": low + step / 2, "end": high, "size": step}


@dataclass(frozen=True)
class FunctionValues:
    """Mean loss of old and new tasks of a row at each look, over its seeds.

    ``tasks`` and ``steps``: number of the task and of the stream's step, by look; a task's first step is the last one of the task before.
    """

    row: Row
    tasks: tuple[int, ...]
    steps: tuple[int, ...]
    old: tuple[Estimate | None, ...]
    new: tuple[Estimate | None, ...]


def function_values(rows: Sequence[Row], probes: pa.Table) -> list[FunctionValues]:
    """What each row's probes saw.

    Args:
        rows: from ``tables.summary``.
        probes: the table ``probes``.
    """
    owner = {cell: number for number, row in enumerate(rows) for cell in row.cells}
    seen: list[dict[tuple[int, int], tuple[list[float], list[float]]]] = [{} for _ in rows]
    for probe in probes.filter(pc.field("probe") == "function_value").to_pylist():
        if probe["cell_id"] in owner:
            both = seen[owner[probe["cell_id"]]].setdefault((probe["task"], probe["step"]), ([], []))
            for values, name in zip(both, ("loss_old", "loss_new"), strict=True):
                if probe[name] is not None:
                    values.append(probe[name])
    found = []
    for row, own in zip(rows, seen, strict=True):
        places = sorted(own)
        old, new = (tuple(estimate(v) if (v := own[place][i]) else None for place in places) for i in (0, 1))
        if places:
            tasks, steps = zip(*places, strict=True)
            found.append(FunctionValues(row, tasks, steps, old, new))
    return found


def draw_function_values(
    values: Sequence[FunctionValues], title: str = "Function values of old and new tasks"
) -> go.Figure:
    """Loss over the steps of the stream, of the task being learned and of all before (Figure 7); of several rows one is chosen.

    A line ends where a task ends; bands are 95 % t-intervals over seeds.
    """
    found = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.06)
    for group, each in enumerate(values):
        carried = meta(each.row, group)
        panels = (("old tasks", each.old, look(0, "zo-sgd")), ("new task", each.new, look(1, "fo-sgd")))
        for panel, (name, losses, own) in enumerate(panels, start=1):
            x: list[int | None] = []
            y: list[float | None] = []
            texts: list[str] = []
            around: tuple[list[int | None], list[float | None]] = ([], [])
            for task in _tasks(each):
                points = [(each.steps[i], point) for i in task if (point := losses[i]) is not None]
                x += [*(step for step, _ in points), None]
                y += [*(number(point.mean) for _, point in points), None]
                texts += [*(hovered(point, "nats", each.row.seeds) for _, point in points), ""]
                ends = [(step, point.mean, point.half_width) for step, point in points if point.half_width is not None]
                around[0].extend([*(step for step, *_ in ends), *(step for step, *_ in reversed(ends)), None])
                around[1].extend(numbers([*(m + w for _, m, w in ends), *(m - w for _, m, w in reversed(ends)), None]))
            common = {"visible": group == 0, "meta": carried, "showlegend": False, "row": panel, "col": 1}
            if any(value is not None for value in around[1]):
                found.add_scatter(
                    x=around[0],
                    y=around[1],
                    mode="lines",
                    line={"width": 0},
                    fill="toself",
                    fillcolor=own.color,
                    opacity=0.15,
                    hoverinfo="skip",
                    **common,
                )
            found.add_scatter(
                x=x,
                y=y,
                mode="lines+markers",
                name=name,
                line=own.line,
                marker=own.point(4),
                text=texts,
                hovertemplate="step %{x}: %{text}",
                **common,
            )
    found.update_yaxes(title="loss, old tasks (nats)", row=1, col=1)
    found.update_yaxes(title="loss, new task (nats)", row=2, col=1)
    found.update_xaxes(title="step of the stream (number)", row=2, col=1)
    return arranged(found, title, height=540, choose=True)


def _tasks(values: FunctionValues) -> list[list[int]]:
    """Indices of the looks of each task."""
    found: dict[int, list[int]] = {}
    for i, task in enumerate(values.tasks):
        found.setdefault(task, []).append(i)
    return list(found.values())
