"""Every table that a store holds, with the best value and the second best of a column marked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from zeroflow.results import efficiency, published
from zeroflow.results.differences import Differences
from zeroflow.results.effects import by_stream, effects
from zeroflow.results.figures.enhancements import option_curves
from zeroflow.results.orders import order_table
from zeroflow.results.rendering import Cell, Column, Mark, Table, words
from zeroflow.results.schema import CONFIG_KEYS
from zeroflow.results.searches import SEARCH_LEGEND, search_rows
from zeroflow.results.summary import (
    FILTERS,
    LEGEND,
    Row,
    is_baseline,
    is_text,
    same_problem,
    summary,
    summary_table,
)

_BETTER = {"Avg": max, "Last": max, "Fgt": min}
"""Columns in which the best is marked."""

_HEADS = tuple(_BETTER)


def make_tables(tables: Mapping[str, pa.Table], measured: Mapping[str, Any] | None = None) -> list[Table]:
    """The tables that there is something for, the summary first.

    Args:
        tables: ``trials``, and if there, ``searches`` and ``failures``, as ``Store.load`` gives them.
        measured: what ``zeroflow efficiency --json`` wrote.
    """
    trials = tables["trials"]
    rows = summary(trials)
    found = [
        summary_table(rows),
        *_across(rows),
        order_table(rows),
        _option(rows, "table3", "history"),
        _option(rows, "table4", "sparsity"),
        _paper(trials),
        _effects(trials),
        *([_efficiency(measured)] if measured else []),
        *([_searches(tables["searches"])] if "searches" in tables else []),
        _cells(trials),
    ]
    return [_ranked(table) for table in found if table.lines]


def _across(rows: Sequence[Row]) -> list[Table]:
    """Table 1: data sets side by side; nothing where there is one only."""
    names = list(dict.fromkeys(str(row.config["dataset"]) for row in rows))
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        own = lines.setdefault(row.name(without=["dataset"]), {})
        if own.setdefault(str(row.config["dataset"]), row) is not row:
            return []  # several settings of one name: the summary tells them apart
    if len(names) < 2 or sum(len(own) > 1 for own in lines.values()) < 2:
        return []
    columns = [*words("setting"), *(Column(f"{name} {head}") for name in names for head in _HEADS)]
    return [
        Table.of(
            columns,
            [
                (
                    label,
                    *(getattr(own.get(name), head.lower(), None) for name in names for head in _HEADS),
                )
                for label, own in lines.items()
            ],
            name="table1",
            title="Data sets side by side (Table 1)",
            notes=LEGEND[:1],
            marks=[
                Mark(
                    {**next(iter(own.values())).filters, "dataset": "all"},
                    # A row may lack a data set, and data sets may have streams of their own.
                    groups={f"{name} {head}": same_problem(row.config) for name, row in own.items() for head in _HEADS},
                    baseline=next(iter(own.values())).is_baseline,
                )
                for own in lines.values()
            ],
        )
    ]


def _option(rows: Sequence[Row], name: str, option: str) -> Table:
    """Tables 3 and 4: ours and, beside it, the paper's on ImageNet-A."""
    paper = {row.options.get(option, 0.0): row.values for row in published.rows(name)}
    found = [
        (line.label, share, row)
        for line in option_curves(rows, option)
        for share, row in zip(line.x, line.rows, strict=True)
    ]
    columns: list[Column | str] = [
        *words("setting"),
        option,
        "n",
        *_HEADS,
        *(Column(f"paper {head}", ",.2f") for head in _HEADS),
    ]
    return Table.of(
        columns,
        [
            (
                label,
                Cell(f"{100 * share:g}%", share),
                row.seeds,
                row.avg,
                row.last,
                row.fgt,
                *(paper.get(share, {}).get(metric) for metric in published.METRICS),
            )
            for label, share, row in found
        ],
        name=name,
        title=f"{option.capitalize()} (Table {name[-1]})",
        notes=[LEGEND[0], "paper: EASE with ZO-SGD on ImageNet-A."],
        marks=[Mark(row.filters, (label, same_problem(row.config))) for label, _, row in found],
    )


def _paper(trials: pa.Table) -> Table:
    """Ours beside the paper's, where a cell has its configuration."""
    found = [each for each in published.compare(trials) if each.verified]
    settings = published.settings(found)
    apart = words("setting") if any(settings) else []
    columns: list[Column | str] = [
        *words("table", "row"),
        *apart,
        *(
            column
            for head in _HEADS
            for column in (
                Column(f"paper {head}", ",.2f"),
                Column(f"ours {head}"),
                Column(f"difference {head}", "+.2f"),
            )
        ),
        "n",
    ]
    return Table.of(
        columns,
        [
            (
                each.published.table,
                each.published.name,
                *(setting or "-" for _ in apart),
                *(
                    value
                    for metric in published.METRICS
                    for value in (each.published.values.get(metric), each.ours.get(metric), each.difference(metric))
                ),
                len(each.cells),
            )
            for each, setting in zip(found, settings, strict=True)
        ],
        name="paper",
        title="Ours beside the paper's numbers",
        notes=["difference: ours minus the paper's, percentage points."],
        marks=[Mark(_filters(each.config)) for each in found],
    )


def _effects(trials: pa.Table) -> Table:
    """What one change does, in each data set of ours, beside the paper's."""
    found = []
    for dataset, stream, own in by_stream(trials):
        measured = [
            effect
            for table in ("table1", "table3", "table4", "figure5", "hybrid")
            for effect in effects(table, own)
            if effect.ours is not None
        ]
        measured.sort(key=lambda effect: published.METRICS.index(effect.metric))
        found += [(dataset, ", ".join(filter(None, [dataset, stream])), effect) for effect in measured]
    columns: list[Column | str] = [
        *words("dataset", "change", "metric"),
        Column("paper", "+.2f"),
        Column("ours", "+.2f"),
        "n",
        *words("same sign"),
    ]
    return Table.of(
        columns,
        [
            (
                where,
                effect.name,
                Cell(effect.metric.capitalize(), effect.metric),
                effect.paper,
                effect.ours,
                effect.ours.n if effect.ours else None,
                effect.verdict,
            )
            for _, where, effect in found
        ],
        name="effects",
        title="What one change does, ours beside the paper's",
        notes=[
            "Percentage points; ours: mean over seeds, in each class order, paired, ± half width of the 95 % t-interval; n: pairs. "
            "same sign: n.s. where that interval holds 0, tie where the paper's or ours is shown as 0.00, no spread where all pairs have the same difference."
        ],
        marks=[Mark({"dataset": dataset, **effect.filters}) for dataset, _, effect in found],
    )


def _efficiency(measured: Mapping[str, Any]) -> Table:
    marks = [
        Mark({"optimizer": row["optimizer"], "queries": str(row["queries"] or "none")}) for row in measured["rows"]
    ]
    found = efficiency.efficiency_table(measured)
    lines = tuple(replace(line, mark=mark) for line, mark in zip(found.lines, marks, strict=True))
    return replace(found, name="table2", title=f"What a step costs on {measured['device']} (Table 2)", lines=lines)


def _searches(table: pa.Table) -> Table:
    found = search_rows(table.to_pylist())
    searched = words("options") if any(row.options for row in found) else []
    settings = words("setting") if any(row.setting for row in found) else []
    columns: list[Column | str] = [
        *words("dataset", "method", "optimizer"),
        "q",
        *settings,
        "tries",
        "failed",
        Column("spent", ","),
        Column("budget", ","),
        Column("lr", "g"),
        Column("eps", "g"),
        *searched,
        Column("held-out", ",.2f"),
        "level",
        *words("note"),
    ]
    return Table.of(
        columns,
        [
            (
                *(row.config.get(key) for key in FILTERS),
                *(row.setting or "-" for _ in settings),
                row.tries,
                row.failed,
                row.spent,
                row.budget,
                row.lr,
                row.eps,
                *(Cell(row.options_text or "-", json.dumps(row.options) if row.options else None) for _ in searched),
                row.accuracy,
                row.level,
                Cell(f"{row.edge} lr tried" if row.edge else "", row.edge),
            )
            for row in found
        ],
        name="searches",
        title="How learning rates were chosen",
        notes=[SEARCH_LEGEND],
        marks=[Mark(_filters(row.config)) for row in found],
    )


_ALWAYS = (*FILTERS, "seed")


def _cells(trials: pa.Table) -> Table:
    """The whole grid: a line per finished cell, in the order of the summary."""
    cells = {row["cell_id"]: row for row in trials.to_pylist()}
    order = [cells[cell] for row in summary(trials) for cell in row.cells]
    differences = Differences(order)
    telling = {*_ALWAYS, *differences.named}
    every = [*FILTERS, *(key for key in CONFIG_KEYS if key not in FILTERS)]
    keys = [key for key in every if key in telling or differences.varies(key)]
    texts = [{key: differences.text(key, row) for key in keys} for row in order]
    columns: list[Column | str] = [
        *(Column({"queries": "q"}.get(key, key), left=is_text(key)) for key in keys),
        *(Column(metric, ",.2f") for metric in published.METRICS),
        Column("forwards", ",.0f"),
        Column("MiB", ",.1f"),
        Column("seconds", ",.1f"),
        *words("cell_id"),
    ]
    return Table.of(
        columns,
        [
            (
                *(Cell(own[key], row[key]) for key in keys),
                *(row[metric] for metric in published.METRICS),
                row["forward_passes"],
                _step_memory(row),
                row["seconds"],
                row["cell_id"],
            )
            for row, own in zip(order, texts, strict=True)
        ],
        name="cells",
        title="The whole grid",
        notes=["A line per finished cell."],
        marks=[Mark(_filters(row), baseline=is_baseline(row)) for row in order],
    )


def _step_memory(trial: Mapping[str, Any]) -> float | None:
    """Peak memory of a training step, MiB; None of what has no steps."""
    peak = None if trial["optimizer"] is None else trial["peak_memory_bytes"]
    return None if peak is None else peak / 2**20


def _filters(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: "none" if config.get(key) is None else str(config[key]) for key in FILTERS}


def _ranked(table: Table) -> Table:
    """The same with the best and the second best of every group marked, by what is shown."""
    lines = list(table.lines)
    for column, heading in enumerate(table.headings):
        better = _BETTER.get(heading.rsplit(" ", 1)[-1]) if not heading.startswith(("paper", "ours", "diff")) else None
        groups = [line.mark.groups.get(heading, line.mark.group) for line in lines]
        for group in dict.fromkeys(groups) if better else ():
            own = [i for i, line in enumerate(lines) if groups[i] == group and line.cells[column].value is not None]
            values = sorted({round(lines[i].cells[column].value, 2) for i in own}, reverse=better is max)
            if len(values) < 2:
                continue  # nothing to choose from
            for i in own:
                cell = lines[i].cells[column]
                place = values.index(round(cell.value, 2)) + 1
                if place <= 2:
                    cells = (*lines[i].cells[:column], replace(cell, rank=place), *lines[i].cells[column + 1 :])
                    lines[i] = replace(lines[i], cells=cells)
    return replace(table, lines=tuple(lines))
