"""One HTML file that holds everything a reader asks of a store; it opens without a network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.results import figures
from zeroflow.results.store import Store, remove_leftovers, write_atomically
from zeroflow.results.tables import LEGEND, Row, cells, is_text, summary

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --page: #fff; --line: #d5d5d5; --soft: #f4f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --page: #17191c; --line: #3a3d42; --soft: #202327; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; }
td.long { white-space: pre-wrap; overflow-wrap: anywhere; }
thead th, tr.baseline td { background: var(--soft); }
.figure { background: #fff; margin: 1rem 0; padding: .25rem; border-radius: 4px; }
"""

_PROVENANCE = (
    "dataset", "backbone", "tasks", "base_classes", "increments", "stop_after", "class_order_seed", "fixed_class_order", "dtype",
    "zeroflow_version", "torch_version", "timm_version", "ray_version", "python_version",
    "device", "threads", "workers",
)  # fmt: skip


def write_report(results: Store | str | Path, out: str | Path) -> Path:
    """Write the report of a store: summary, figures per data set, provenance, definitions.

    Args:
        results: a store, its folder or its URI. out: the HTML file; replaced whole.

    Returns:
        ``out``, absolute.
    """
    store, out = results if isinstance(results, Store) else Store(results), Path(out).absolute()
    trials, failed = store.load("trials"), store.failed()
    rows = summary(trials)
    parts = [
        "<!doctype html>\n<html lang='en'>\n<head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>zeroflow results</title><style>{_STYLE}</style></head>\n<body>\n<h1>zeroflow results</h1>",
        f"<p>{len(trials)} cells done, {len(failed)} failed, in <code>{escape(store.root)}</code>.</p>",
        _summary(rows),
        *_drawn(_figures(store, trials)),
        _provenance(trials),
        _failures(failed.values()),
        _definitions(trials),
        "</body>\n</html>\n",
    ]
    write_atomically(out, "\n".join(parts).encode())
    remove_leftovers(out.parent, out.name)
    return out


def _summary(rows: Sequence[Row]) -> str:
    heading, *lines = cells(rows)
    marks = ["baseline" if row.is_baseline else "" for row in rows]
    return f"<h2>Summary</h2>{_table(heading, lines, marks)}<p>{'<br>'.join(map(escape, LEGEND))}</p>"


def _figures(store: Store, trials: pa.Table) -> Iterable[go.Figure]:
    """The figures of each data set; the heat map is that of the cell with the best Avg."""
    stages, accuracy = store.load("stages"), store.load("accuracy")
    for dataset in sorted(pc.unique(trials["dataset"]).to_pylist()):
        own = trials.filter(pc.field("dataset") == dataset)
        rows = summary(own)
        yield figures.draw_stage_curves(figures.stage_curves(rows, stages), f"{dataset}: accuracy along the stream")
        yield figures.draw_accuracy_against_forwards(rows, f"{dataset}: accuracy against work")
        yield figures.draw_costs(rows, f"{dataset}: what it costs")
        best = own.sort_by([("avg", "descending"), ("cell_id", "ascending")]).slice(0, 1).to_pylist()[0]
        label = next(row.label for row in rows if best["cell_id"] in row.cells)
        matrix = figures.task_accuracy(accuracy, best["cell_id"])
        yield figures.draw_task_accuracy(
            matrix, f"{dataset}: accuracy per task, {label}, seed {best['seed']} (best Avg)"
        )


def _drawn(found: Iterable[go.Figure]) -> Iterable[str]:
    yield "<h2>Figures</h2>"
    for number, figure in enumerate(found):
        drawn = figure.to_html(
            full_html=False, include_plotlyjs=number == 0, div_id=f"figure-{number}",
            default_height=figure.layout.height, config={"displaylogo": False, "responsive": True},
        )  # fmt: skip
        yield f"<div class='figure'>{drawn}</div>"


def _provenance(trials: pa.Table) -> str:
    commits = {
        "-" if commit is None else f"{commit}{' with changes' if dirty else ''}"
        for commit, dirty in zip(trials["git_commit"].to_pylist(), trials["git_dirty"].to_pylist(), strict=True)
    }
    found = {"cells": {str(len(trials))}, "git_commit": commits}
    for key in _PROVENANCE:
        found[key] = {"-" if value is None else str(value) for value in trials[key].to_pylist()}
    times = pc.min_max(trials["finished_at"]).as_py()
    found["finished"] = {f"{times[end]:%Y-%m-%d %H:%M:%S} UTC" for end in ("min", "max") if times[end]}
    lines = [[key, ", ".join(sorted(values))] for key, values in found.items()]
    return f"<h2>Provenance</h2>{_table(['', ''], lines, words=True)}"


def _failures(failed: Iterable[dict[str, Any]]) -> str:
    lines = [[str(row[key]) for key in ("label", "cell_id", "error", "message", "attempts")] for row in failed]
    if not lines:
        return ""
    return f"<h2>Failed cells</h2>{_table(['cell', 'cell_id', 'error', 'message', 'attempts'], lines, words=True)}"


def _definitions(trials: pa.Table) -> str:
    """What the metrics mean, as recorded with the cells."""
    recorded = sorted(text for text in pc.unique(trials["metric_definitions"]).to_pylist() if text)
    lines = [[name, meaning] for text in recorded for name, meaning in json.loads(text).items()]
    return f"<h2>Metric definitions</h2>{_table(['metric', 'meaning'], lines, words=True)}" if lines else ""


def _table(heading: list[str], lines: list[list[str]], marks: Sequence[str] = (), *, words: bool = False) -> str:
    """An HTML table of plain text; ``marks`` are classes of the lines, ``words``: long text in every column."""

    def line(tag: str, values: list[str], mark: str = "") -> str:
        kinds = ["text long" if words else "text" if is_text(name) else "" for name in heading]
        inner = "".join(f"<{tag} class='{k}'>{escape(v)}</{tag}>" for k, v in zip(kinds, values, strict=True))
        return f"<tr class='{mark}'>{inner}</tr>"

    body = [line("td", values, mark) for values, mark in zip(lines, marks or [""] * len(lines), strict=True)]
    head = f"<thead>{line('th', heading)}</thead>" if any(heading) else ""
    return f"<div class='wide'><table>{head}<tbody>{''.join(body)}</tbody></table></div>"
