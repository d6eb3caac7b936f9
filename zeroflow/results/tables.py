"""Every table that a store holds, as Markdown, LaTeX, CSV or text, with the best value bold and the second best underlined."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.results import published
from zeroflow.results.figures.enhancements import option_curves
from zeroflow.results.searches import SEARCH_LEGEND, search_rows
from zeroflow.results.summary import LEGEND, Estimate, Row, as_text, is_baseline, same_problem, summary

_BETTER = {"Avg": max, "Last": max, "Fgt": min}
"""Columns in which the best is marked."""


@dataclass(frozen=True)
class Cell:
    """What stands in a place: ``text`` for readers, ``value`` for machines; ``rank`` 1 is the best of its column, 2 the second."""

    text: str
    value: Any = None
    half_width: float | None = None
    rank: int = 0


@dataclass(frozen=True)
class Line:
    """One line; ``filters``: what a reader filters by; ``group``: lines that compete for the best; ``baseline``: the row to beat."""

    cells: tuple[Cell, ...]
    filters: Mapping[str, str] = field(default_factory=dict)
    group: Hashable = None
    baseline: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table: a name for commands, a title, headings (``words`` of them hold no numbers), lines, and what the headings mean."""

    name: str
    title: str
    headings: tuple[str, ...]
    words: frozenset[str]
    lines: tuple[Line, ...]
    legend: str = ""


def sheets(tables: Mapping[str, pa.Table], efficiency: Mapping[str, Any] | None = None) -> list[Sheet]:
    """The tables that there is something for, the summary first.

    Args:
        tables: ``trials``, and if there, ``searches`` and ``failures``, as ``Store.load`` gives them.
        efficiency: what ``zeroflow efficiency --json`` wrote.
    """
    trials = tables["trials"]
    rows = summary(trials)
    found: list[Sheet | None] = [summary_sheet(rows)]
    found += _across(rows)
    found += [_option(rows, name, option) for name, option in (("table3", "history"), ("table4", "sparsity"))]
    found += [
        _paper(trials),
        _effects(trials),
        _efficiency(efficiency),
        _searches(tables.get("searches")),
        _cells(trials),
    ]
    return [_ranked(sheet) for sheet in found if sheet is not None and sheet.lines]


def summary_sheet(rows: Sequence[Row]) -> Sheet:
    """A line per row, averaged over seeds."""
    shown = list(rows[0].shown) if rows else []
    headings = (
        *({"queries": "q"}.get(key, key) for key in shown),
        "n",
        "Avg",
        "Last",
        "Fgt",
        "gain",
        "values",
        "forwards",
        "MiB",
        "seconds",
    )
    lines = [
        Line(
            (
                *(Cell(text, row.config[key]) for key, text in row.shown.items()), _integer(row.seeds),
                *map(_estimated, (row.avg, row.last, row.fgt)), _signed(row.vs_simplecil),
                _integer(row.trainable_parameters), _integer(row.forward_passes),
                _decimal(row.peak_memory, 1), _decimal(row.seconds, 1),
            ),
            row.filters, same_problem(row.config), row.is_baseline,
        )
        for row in rows
    ]  # fmt: skip
    return Sheet(
        "summary", "All settings, averaged over seeds", headings, _words(shown), tuple(lines), " ".join(LEGEND)
    )


def _across(rows: Sequence[Row]) -> list[Sheet]:
    """Table 1: data sets side by side; nothing where there is one only."""
    names = list(dict.fromkeys(str(row.config["dataset"]) for row in rows))
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        own = lines.setdefault(row.name(without=["dataset"]), {})
        if own.setdefault(str(row.config["dataset"]), row) is not row:
            return []  # several settings of one name: the summary tells them apart
    if len(names) < 2 or sum(len(own) > 1 for own in lines.values()) < 2:
        return []
    metrics = ("Avg", "Last", "Fgt")
    found = [
        Line(
            (Cell(label, label), *(_estimated(getattr(own[name], metric.lower()) if name in own else None) for name in names for metric in metrics)),
            {**next(iter(own.values())).filters, "dataset": "all"},
            baseline=next(iter(own.values())).is_baseline,
        )
        for label, own in lines.items()
    ]  # fmt: skip
    headings = ("setting", *(f"{name} {metric}" for name in names for metric in metrics))
    return [
        Sheet("table1", "Data sets side by side (Table 1)", headings, frozenset(["setting"]), tuple(found), LEGEND[0])
    ]


def _option(rows: Sequence[Row], name: str, option: str) -> Sheet:
    """Tables 3 and 4: ours and, beside it, the paper's on ImageNet-A."""
    paper = {row.options.get(option, 0.0): row.values for row in published.rows(name)}
    lines = [
        Line(
            (
                Cell(line.label, line.label), Cell(f"{share:.0%}", share), _integer(row.seeds), *map(_estimated, (row.avg, row.last, row.fgt)),
                *(_decimal(paper.get(share, {}).get(metric), 2) for metric in published.METRICS),
            ),
            row.filters, (line.label, same_problem(row.config)),
        )
        for line in option_curves(rows, option)
        for share, row in zip(line.x, line.rows, strict=True)
    ]  # fmt: skip
    headings = ("setting", option, "n", "Avg", "Last", "Fgt", "paper Avg", "paper Last", "paper Fgt")
    legend = f"{LEGEND[0]} paper: EASE with ZO-SGD on ImageNet-A."
    return Sheet(
        name, f"{option.capitalize()} (Table {name[-1]})", headings, frozenset(["setting"]), tuple(lines), legend
    )


def _paper(trials: pa.Table) -> Sheet:
    """Ours beside the paper's, where a cell has its configuration."""
    lines = []
    for found in published.compare(trials):
        if not found.verified:
            continue
        cells = [
            Cell(found.published.table, found.published.table),
            Cell(" ".join(found.published.label), list(found.published.label)),
        ]
        for metric in published.METRICS:
            cells += [
                _decimal(found.published.values.get(metric), 2),
                _estimated(found.ours.get(metric)),
                _signed(found.difference(metric)),
            ]
        filters = {
            k: "none" if found.config.get(k) is None else str(found.config[k])
            for k in ("dataset", "method", "optimizer", "queries")
        }
        lines.append(Line((*cells, _integer(len(found.cells))), filters))
    headings = (
        "table",
        "row",
        *(f"{kind} {metric}" for metric in ("Avg", "Last", "Fgt") for kind in ("paper", "ours", "difference")),
        "n",
    )
    return Sheet(
        "paper",
        "Ours beside the paper's numbers",
        headings,
        frozenset(["table", "row"]),
        tuple(lines),
        "difference: ours minus the paper's, percentage points.",
    )


def _effects(trials: pa.Table) -> Sheet:
    """What one change does, in each data set of ours, beside the paper's."""
    lines = []
    for dataset in sorted(pc.unique(trials["dataset"]).to_pylist()):
        own = trials.filter(pc.field("dataset") == dataset)
        found = [
            effect
            for table in ("table1", "table3", "table4", "figure5", "hybrid")
            for effect in published.effects(table, own)
            if effect.ours is not None
        ]
        for effect in sorted(found, key=lambda effect: published.METRICS.index(effect.metric)):
            cells = (
                Cell(dataset, dataset), Cell(effect.name, effect.name), Cell(effect.metric.capitalize(), effect.metric),
                _signed(effect.paper), _estimated(effect.ours, signed=True), _integer(effect.ours.n if effect.ours else None),
                Cell(effect.verdict, effect.verdict),
            )  # fmt: skip
            lines.append(Line(cells, {"dataset": dataset, **effect.filters}))
    headings = ("dataset", "change", "metric", "paper", "ours", "n", "same sign")
    return Sheet(
        "effects", "What one change does, ours beside the paper's", headings, frozenset(["dataset", "change", "metric", "same sign"]), tuple(lines),
        "Percentage points; ours: mean over seeds, paired, ± half width of the 95 % t-interval. same sign: n.s. "
        "where that interval holds 0.",
    )  # fmt: skip


def _efficiency(result: Mapping[str, Any] | None) -> Sheet | None:
    if result is None:
        return None
    heading, *lines = published.efficiency_cells(result)
    filters = [{"optimizer": row["optimizer"], "queries": str(row["queries"] or "none")} for row in result["rows"]]
    found = tuple(Line(tuple(Cell(text, text) for text in line), own) for line, own in zip(lines, filters, strict=True))
    return Sheet(
        "table2",
        f"What a step costs on {result['device']} (Table 2)",
        tuple(heading),
        frozenset(["optimizer"]),
        found,
        " ".join(published.EFFICIENCY_LEGEND),
    )


def _searches(table: pa.Table | None) -> Sheet | None:
    if table is None:
        return None
    lines = []
    for row in search_rows(table.to_pylist()):
        own = {key: row.config.get(key) for key in ("dataset", "method", "optimizer", "queries")}
        cells = (
            *(Cell("-" if value is None else str(value), value) for value in own.values()),
            _integer(row.tries), _integer(row.failed), _integer(row.spent), _integer(row.budget), _general(row.lr), _general(row.eps),
            _decimal(row.accuracy, 2), _integer(row.level), Cell(f"{row.edge} lr tried" if row.edge else "", row.edge),
        )  # fmt: skip
        lines.append(Line(cells, {key: "none" if value is None else str(value) for key, value in own.items()}))
    headings = (
        "dataset",
        "method",
        "optimizer",
        "q",
        "tries",
        "failed",
        "spent",
        "budget",
        "lr",
        "eps",
        "held-out",
        "level",
        "note",
    )
    return Sheet(
        "searches",
        "How learning rates were chosen",
        headings,
        _words(["dataset", "method", "optimizer"]) | {"note"},
        tuple(lines),
        SEARCH_LEGEND,
    )


_CELL_KEYS = (
    "dataset",
    "method",
    "method_options",
    "classifier",
    "classifier_options",
    "preprocessing",
    "optimizer",
    "optimizer_options",
    "queries",
    "lr",
    "eps",
    "epochs",
    "hybrid_epochs",
    "seed",
)
_ALWAYS = ("dataset", "method", "optimizer", "queries", "seed")


def _cells(trials: pa.Table) -> Sheet:
    """The whole grid: a line per finished cell, in the order of the summary."""
    cells = {row["cell_id"]: row for row in trials.to_pylist()}
    order = [cells[cell] for row in summary(trials) for cell in row.cells]
    keys = [key for key in _CELL_KEYS if key in _ALWAYS or len({row[key] for row in order} - {None}) > 1]
    lines = []
    for row in order:
        memory = None if row["peak_memory_bytes"] is None else row["peak_memory_bytes"] / 2**20
        values = (
            *(Cell(as_text(key, row[key]), row[key]) for key in keys), *(_decimal(row[metric], 2) for metric in published.METRICS),
            _integer(row["forward_passes"]), _decimal(memory, 1), _decimal(row["seconds"], 1), Cell(row["cell_id"], row["cell_id"]),
        )  # fmt: skip
        filters = {k: "none" if row[k] is None else str(row[k]) for k in ("dataset", "method", "optimizer", "queries")}
        lines.append(Line(values, filters, baseline=is_baseline(row)))
    headings = (
        *({"queries": "q"}.get(key, key) for key in keys),
        "avg",
        "last",
        "fgt",
        "forwards",
        "MiB",
        "seconds",
        "cell_id",
    )
    return Sheet(
        "cells", "The whole grid", headings, _words(keys) | {"cell_id"}, tuple(lines), "A line per finished cell."
    )


def _ranked(sheet: Sheet) -> Sheet:
    """The same with the best and the second best of every group marked, by what is shown."""
    lines = list(sheet.lines)
    for column, heading in enumerate(sheet.headings):
        better = _BETTER.get(heading.rsplit(" ", 1)[-1]) if not heading.startswith(("paper", "ours", "diff")) else None
        for group in dict.fromkeys(line.group for line in lines) if better else ():
            own = [i for i, line in enumerate(lines) if line.group == group and line.cells[column].value is not None]
            values = sorted({round(lines[i].cells[column].value, 2) for i in own}, reverse=better is max)
            if len(values) < 2:
                continue  # nothing to choose from
            for i in own:
                cell = lines[i].cells[column]
                place = values.index(round(cell.value, 2)) + 1
                if place <= 2:
                    cells = (*lines[i].cells[:column], replace(cell, rank=place), *lines[i].cells[column + 1 :])
                    lines[i] = replace(lines[i], cells=cells)
    return replace(sheet, lines=tuple(lines))


def render(found: Sequence[Sheet], format: str) -> str:
    """Tables one after the other.

    Args:
        format: a key of ``FORMATS``. CSV holds one table: give one.
    """
    return "\n".join(FORMATS[format](sheet) for sheet in found)


def plain(sheet: Sheet) -> dict[str, Any]:
    """A table as plain values for JSON: of every line the values by heading, and the half widths as in CSV."""
    wide = _wide(sheet)
    lines = []
    for line in sheet.lines:
        values: dict[str, Any] = {}
        for i, (heading, cell) in enumerate(zip(sheet.headings, line.cells, strict=True)):
            values |= {heading: cell.value} | ({f"{heading} ±": cell.half_width} if i in wide else {})
        lines.append(values)
    return {"table": sheet.name, "title": sheet.title, "legend": sheet.legend, "lines": lines}


def _wide(sheet: Sheet) -> set[int]:
    """The columns with intervals."""
    return {i for i in range(len(sheet.headings)) if any(line.cells[i].half_width is not None for line in sheet.lines)}


def _markdown(sheet: Sheet) -> str:
    def text(cell: Cell) -> str:
        shown = re.sub(r"([\\|*_<>`])", r"\\\1", cell.text)
        return {0: shown, 1: f"**{shown}**", 2: f"<u>{shown}</u>"}[cell.rank]

    rule = [":--" if name in sheet.words else "--:" for name in sheet.headings]
    lines = [
        [name.replace("|", "\\|") for name in sheet.headings],
        rule,
        *([text(cell) for cell in line.cells] for line in sheet.lines),
    ]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    legend = f"{sheet.legend} " if sheet.legend else ""
    return f"### {sheet.title}\n\n{body}\n\n{legend}{_MARKED if _is_marked(sheet) else ''}".rstrip() + "\n"


_MARKED = "Bold: the best of its data set; underlined: the second best."


def _is_marked(sheet: Sheet) -> bool:
    return any(cell.rank for line in sheet.lines for cell in line.cells)


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _latex(sheet: Sheet) -> str:
    def text(cell: Cell) -> str:
        shown = "--" if cell.text == "-" else _tex(cell.text)
        return {0: shown, 1: rf"\textbf{{{shown}}}", 2: rf"\underline{{{shown}}}"}[cell.rank]

    columns = "".join("l" if name in sheet.words else "r" for name in sheet.headings)
    body = []
    for i, line in enumerate(sheet.lines):
        if i and line.group != sheet.lines[i - 1].group:
            body.append(r"\midrule")
        body.append(" & ".join(map(text, line.cells)) + r" \\")
    legend = f"{sheet.legend} {_MARKED if _is_marked(sheet) else ''}".strip()
    return "\n".join([
        "% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{_tex(f'{sheet.title}. {legend}')}}}",
        rf"\label{{tab:{sheet.name}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
        " & ".join(map(_tex, sheet.headings)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def _csv(sheet: Sheet) -> str:
    """Values as they were measured; beside an estimate the half width of its interval."""
    wide = _wide(sheet)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(name for i, h in enumerate(sheet.headings) for name in ((h, f"{h} ±") if i in wide else (h,)))
    for line in sheet.lines:
        values: list[Any] = []
        for i, cell in enumerate(line.cells):
            values += [cell.value, cell.half_width] if i in wide else [cell.value]
        writer.writerow("" if value is None else value for value in values)
    return out.getvalue()


def _plain(sheet: Sheet) -> str:
    """For a terminal; the best is marked ``*``, the second best ``'``."""
    lines = [[cell.text + ("" if not cell.rank else " *'"[cell.rank]) for cell in line.cells] for line in sheet.lines]
    columns = []
    for name, *values in zip(sheet.headings, *lines, strict=True):
        width = max(map(len, [name, *values]))
        adjust = str.ljust if name in sheet.words else str.rjust
        columns.append([adjust(value, width) for value in [name, "-" * width, *values]])
    body = "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
    marked = "\n*: the best of its data set; ': the second best." if _is_marked(sheet) else ""
    return f"{sheet.title}\n\n{body}\n\n{sheet.legend}{marked}\n"


FORMATS: Mapping[str, Callable[[Sheet], str]] = {"text": _plain, "markdown": _markdown, "latex": _latex, "csv": _csv}


def _words(keys: Iterable[str]) -> frozenset[str]:
    words = (
        "dataset",
        "transform",
        "preprocessing",
        "backbone",
        "checkpoint",
        "method",
        "method_options",
        "classifier",
        "classifier_options",
        "optimizer",
        "optimizer_options",
        "schedule",
        "dtype",
        "increments",
        "fixed_class_order",
    )
    return frozenset(key for key in keys if key in words)


def _estimated(found: Estimate | None, *, signed: bool = False) -> Cell:
    if found is None:
        return Cell("-")
    text = (
        f"{found.mean:+.2f}" + ("" if found.half_width is None else f" ± {found.half_width:.2f}")
        if signed
        else str(found)
    )
    return Cell(text, found.mean, found.half_width)


def _decimal(value: float | None, digits: int) -> Cell:
    return Cell("-" if value is None else f"{value:,.{digits}f}", value)


def _signed(value: float | None) -> Cell:
    return Cell("-" if value is None else f"{value:+.2f}", value)


def _integer(value: float | None) -> Cell:
    return Cell("-" if value is None else f"{value:,.0f}", value)


def _general(value: Any) -> Cell:
    return Cell("-" if value is None else f"{value:g}" if isinstance(value, float) else str(value), value)
