"""What the paper's enhancements change: the history of estimates, sparsity, hybrid training; and ours beside the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import pyarrow as pa
from plotly.subplots import make_subplots

from zeroflow.results.effects import Effect, alike, exact_lr
from zeroflow.results.estimates import Estimate, estimate
from zeroflow.results.figures.accuracy import add_curve
from zeroflow.results.figures.style import (
    BLUE,
    ORANGE,
    arranged,
    escape,
    figure,
    half_widths,
    keys,
    look,
    number,
    numbers,
)
from zeroflow.results.published import Comparison, settings
from zeroflow.results.summary import Row

SHARES = {"history": "share of the historical estimate (1)", "sparsity": "share of components left out (1)"}
"""The optimizer's options of Tables 3 and 4, and what they say on an axis."""


@dataclass(frozen=True)
class OptionLine:
    """Rows that differ in one option of the optimizer alone, in its order; without it counts as 0."""

    label: str
    x: tuple[float, ...]
    rows: tuple[Row, ...]


def option_curves(rows: Sequence[Row], option: str) -> list[OptionLine]:
    """A line for each setting that was run with at least two values of an option of the optimizer.

    Args:
        rows: from ``tables.summary``.
        option: ``history`` or ``sparsity``.
    """
    lines: dict[str, dict[float, Row]] = {}
    labels: dict[str, str] = {}
    for row in rows:
        own = json.loads(row.config["optimizer_options"] or "{}")
        share = own.pop(option, 0.0)
        # Learning rate and the rest must agree: a curve shows one change.
        rest = json.dumps([{**row.config, "optimizer_options": None}, own], sort_keys=True, default=str)
        lines.setdefault(rest, {})[float(share)] = row
        apart = row.shown.get("optimizer_options", "").split()
        others = " ".join(each for each in apart if each.partition("=")[0] in own)
        labels[rest] = " ".join(filter(None, [row.name(without=["optimizer_options"]), others]))
    return [
        OptionLine(labels[rest], tuple(sorted(line)), tuple(line[share] for share in sorted(line)))
        for rest, line in lines.items()
        if len(line) > 1
    ]


def draw_option_curves(lines: Sequence[OptionLine], option: str, title: str = "") -> go.Figure:
    """Avg, Last and Fgt over an option's values with 95 % t-intervals (Tables 3 and 4), a panel each."""
    found = make_subplots(cols=3, horizontal_spacing=0.09)
    for group, line in enumerate(lines):
        own = look(group, line.rows[0].config["optimizer"])
        for column, (metric, unit) in enumerate({"avg": "%", "last": "%", "fgt": "points"}.items(), start=1):
            points: list[Estimate | None] = [getattr(row, metric) for row in line.rows]
            found.add_scatter(
                x=list(line.x),
                y=[None if each is None else number(each.mean) for each in points],
                name=escape(line.label),
                legendgroup=str(group),
                showlegend=column == 1,
                mode="lines+markers",
                line=own.line,
                marker=own.point(),
                error_y={"array": half_widths(points), "color": own.color, "thickness": 1.5},
                text=[str(each) for each in points],
                hovertemplate=f"%{{x}}: %{{text}} {unit}",
                meta={"points": [keys(row) for row in line.rows], "group": group},
                row=1,
                col=column,
            )
    for column, axis in enumerate(("Avg (%)", "Last (%)", "Fgt (points)"), start=1):
        found.update_xaxes(title=SHARES[option] if column == 2 else None, row=1, col=column)
        found.update_yaxes(title={"text": axis, "standoff": 4}, row=1, col=column)
    return arranged(
        found, title or f"Accuracy against {option}", height=340, names=[line.label for line in lines], min_width=700
    )


@dataclass(frozen=True)
class Gain:
    """Accuracy per stage of hybrid training minus that of first order alone for as many epochs, percentage points, paired by seed."""

    row: Row
    alone: Row
    classes: tuple[int, ...]
    difference: tuple[Estimate, ...]

    @property
    def label(self) -> str:
        config = self.row.config
        exact = config["hybrid_epochs"]
        return f"{config['method']}: {exact} epochs {self.alone.config['optimizer']} + {config['epochs'] - exact} {config['optimizer']}"


def hybrid_gains(rows: Sequence[Row], trials: pa.Table, stages: pa.Table) -> list[Gain]:
    """For each hybrid row that has its first-order counterpart, what its last epochs without gradients changed.

    The counterpart has the same stream, settings and epochs, and the learning rate of the hybrid's exact gradients.

    Args:
        rows: from ``summary.summary``.
        trials: the table, for the seeds of the cells.
        stages: the table.
    """
    seeds = dict(zip(trials["cell_id"].to_pylist(), trials["seed"].to_pylist(), strict=True))
    found: dict[str, dict[int, float]] = {}
    for stage in stages.select(["cell_id", "classes_seen", "accuracy"]).to_pylist():
        if stage["accuracy"] is not None:
            found.setdefault(stage["cell_id"], {})[stage["classes_seen"]] = stage["accuracy"]
    gains = []
    for row in rows:
        if not row.config["hybrid_epochs"]:
            continue
        for alone in _alone(row, rows):
            pairs = [(a, b) for a in row.cells for b in alone.cells if seeds[a] == seeds[b]]
            gain = _differences(found, pairs)
            if gain:
                gains.append(Gain(row, alone, tuple(gain), tuple(map(estimate, gain.values()))))
    return gains


def _alone(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows of first order alone that a hybrid row differs from in its last epochs only."""
    base = "fo-adam" if "adam" in row.config["optimizer"] else "fo-sgd"
    same = alike(row.config)
    # What goes on with other settings is not first order alone, even where both do.
    found = [
        other
        for other in rows
        if other.config["optimizer"] == base and not other.config["later"] and alike(other.config) == same
    ]
    rate = exact_lr(row.config)
    if rate is None:
        return found if len(found) == 1 else []
    return [other for other in found if other.config["lr"] == rate]


def _differences(stages: Mapping[str, Mapping[int, float]], pairs: Sequence[tuple[str, str]]) -> dict[int, list[float]]:
    """By number of classes seen, the differences of all pairs of cells."""
    found: dict[int, list[float]] = {}
    for one, other in pairs:
        for classes, accuracy in sorted(stages.get(one, {}).items()):
            if classes in stages.get(other, {}):
                found.setdefault(classes, []).append(accuracy - stages[other][classes])
    return found


def _told_apart(gains: Sequence[Gain]) -> list[str]:
    """Labels, with what tells lines of one label apart: class orders, say."""
    names = []
    for gain in gains:
        twins = [other for other in gains if other.label == gain.label]
        parts = []
        for side in ("row", "alone"):
            own = getattr(gain, side)
            common = [key for key in own.shown if len({getattr(other, side).shown.get(key) for other in twins}) == 1]
            parts.append(own.name(without=common))
        names.append(" ".join(dict.fromkeys(filter(None, [gain.label, *parts]))))
    return names


def draw_hybrid_gains(gains: Sequence[Gain], title: str = "Hybrid training against first order alone") -> go.Figure:
    """A line per hybrid row over the classes seen, with the 95 % t-interval over seeds as a band; above 0 it helped."""
    names = _told_apart(gains)
    found = figure(title, names=names)
    for group, (gain, name) in enumerate(zip(gains, names, strict=True)):
        config = gain.row.config
        own = look(group, config["optimizer"])
        add_curve(
            found,
            gain.classes,
            gain.difference,
            escape(name),
            own,
            {"keys": keys(gain.row), "group": group},
            "points",
            max(point.n for point in gain.difference),
        )
    found.add_hline(y=0, line={"color": "#888", "width": 1})
    found.update_xaxes(title="classes seen (number)")
    found.update_yaxes(title="accuracy minus first order's (points)")
    return found


def draw_comparisons(comparisons: Sequence[Comparison], metric: str = "avg", title: str = "") -> go.Figure:
    """Ours beside the paper's: a line per row that was run, from the published value to ours with its 95 % t-interval."""
    shown = [found for found in comparisons if metric in found.ours and metric in found.published.values]
    unit = "points" if metric == "fgt" else "%"
    found = _dumbbells(
        title or f"{metric.capitalize()}: ours beside the paper's",
        [
            (
                " ".join(filter(None, [each.published.name, setting])),
                each.published.values[metric],
                each.ours[metric],
                _filters(each.config),
            )
            for each, setting in zip(shown, settings(shown), strict=True)
        ],
        unit,
    )
    found.update_xaxes(title=f"{metric.capitalize()} ({unit})")
    return found


def draw_effects(effects: Sequence[Effect], metric: str = "avg", title: str = "") -> go.Figure:
    """What one change does, ours beside the paper's: a line per change, with the 95 % t-interval of ours; 0 is no change.

    Data sets differ, so sizes may; the paper's findings hold here where both lie on the same side of 0.
    """
    shown = [each for each in effects if each.metric == metric and each.ours is not None]
    found = _dumbbells(
        title or f"What changes {metric.capitalize()}: ours beside the paper's",
        [(each.name, each.paper, each.ours, dict(each.filters)) for each in shown if each.ours is not None],
        "points",
    )
    found.add_vline(x=0, line={"color": "#888", "width": 1})
    found.update_xaxes(title=f"change of {metric.capitalize()} (points)")
    return found


def _filters(config: Mapping[str, object]) -> dict[str, str]:
    return {
        key: "none" if config.get(key) is None else str(config[key])
        for key in ("dataset", "method", "optimizer", "queries")
    }


def _dumbbells(title: str, lines: Sequence[tuple[str, float | None, Estimate, dict[str, str]]], unit: str) -> go.Figure:
    found = figure(title, height=110, rows=len(lines), names=["paper", "ours"], min_width=560)
    names = [escape(name) for name, *_ in lines]
    points = [carried for *_, carried in lines]
    found.add_scatter(
        x=numbers([paper for _, paper, _, _ in lines]),
        y=names,
        mode="markers",
        name="paper",
        marker={"symbol": "diamond-open", "color": BLUE, "size": 10, "line": {"width": 2}},
        hovertemplate=f"%{{y}}: %{{x:.2f}} {unit}",
        meta={"points": points, "group": 0},
    )
    found.add_scatter(
        x=numbers([ours.mean for _, _, ours, _ in lines]),
        y=names,
        mode="markers",
        name="ours",
        marker={"symbol": "circle", "color": ORANGE, "size": 9},
        error_x={"array": half_widths([ours for _, _, ours, _ in lines]), "color": ORANGE, "thickness": 1.5},
        text=[str(ours) for _, _, ours, _ in lines],
        hovertemplate=f"%{{y}}: %{{text}} {unit}",
        meta={"points": points, "group": 1},
    )
    found.update_yaxes(autorange="reversed", type="category")
    return found
