"""One HTML file that holds everything a reader asks of a store; it opens without a network.

Filters and themes are in ``page/report.js``: every figure is put into the page as JSON whose marks say to which method,
optimizer, data set and number of queries they belong, and so does every line of a table.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from plotly.offline import get_plotlyjs

from zeroflow.durable import write_atomically
from zeroflow.errors import ConfigError
from zeroflow.progress import Progress, silent
from zeroflow.results import agreement, figures
from zeroflow.results.efficiency import efficiency_table
from zeroflow.results.findings import findings
from zeroflow.results.reading import load
from zeroflow.results.rendering import MARKED, Table, html_grid, words
from zeroflow.results.report_figures import Drawn, Entry, by_dataset, choose
from zeroflow.results.storage import remove_leftovers
from zeroflow.results.store import Store
from zeroflow.results.summary import FILTERS, HELD_OUT, Row, summary
from zeroflow.results.tables import make_tables

_PROVENANCE = (
    "dataset", "backbone", "tasks", "base_classes", "increments", "stop_after", "class_order_seed", "fixed_class_order", "validation",
    "dtype",
    "zeroflow_version", "torch_version", "timm_version", "ray_version", "python_version",
    "device", "threads", "workers",
)  # fmt: skip
_READ = ("trials", "stages", "accuracy", "confusion", "probes", "searches", "trajectories", "surfaces", "failures")
_NAMES = {"dataset": "data set", "method": "method", "optimizer": "optimizer", "queries": "queries"}


@dataclass(frozen=True)
class Results:
    """The tables of one store or of several together, a cell counting once.

    Attributes:
        stores: their names, which tell nothing of this machine.
        tables: by name.
        notes: what is not among them, and why.
    """

    stores: tuple[str, ...]
    tables: Mapping[str, pa.Table]
    notes: tuple[str, ...] = ()


def read(*results: Store | str | Path, on_progress: Progress = silent) -> Results:
    """What a report reads of some stores; ``on_progress``: see ``Progress``, a unit is a table.

    Cells judged on held-out training samples (of a search) are left out where there are others: what they chose is told by
    the table of searches, and their accuracies are no results.

    Raises:
        ConfigError: a newer zeroflow wrote one of them, or an object store cannot be reached.
    """
    stores = [each if isinstance(each, Store) else Store(each) for each in results]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tables: dict[str, pa.Table] = {}
        for number, name in enumerate(_READ):
            on_progress(f"reading {name}", number, len(_READ))
            tables[name] = load(stores, name)
        for several in agreement.several_versions(tables["trials"]):
            warnings.warn(several, stacklevel=1)
    failures = tables["failures"]
    tables["failures"] = failures.filter(pc.invert(pc.is_in(failures["cell_id"], tables["trials"]["cell_id"])))
    names = {store.root: _name(store.root) for store in stores}
    notes = list(dict.fromkeys(str(each.message) for each in caught))
    for root, name in names.items():
        notes = [note.replace(root, name) for note in notes]
    trials = tables["trials"]
    tested = trials.filter(pc.equal(trials["validation"], 0.0))
    if 0 < len(tested) < len(trials):
        notes.append(
            f"{len(trials) - len(tested)} more cells were judged on held-out training samples, to choose settings; a report of "
            "their store alone shows them."
        )
        for name in ("stages", "accuracy", "confusion", "probes"):
            tables[name] = tables[name].filter(pc.is_in(tables[name]["cell_id"], tested["cell_id"]))
        tables["trials"] = tested
    elif len(trials) and not len(tested):
        notes.append(HELD_OUT)
    return Results(tuple(names.values()), tables, tuple(notes))


def _name(root: str) -> str:
    """A store as a page for others names it: an URI, a path below the current folder, or the name of its folder alone."""
    if "://" in root:
        return root
    path, here = Path(root), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) and path != here else path.name


def write_report(
    results: Store | str | Path | Sequence[Store | str | Path],
    out: str | Path,
    *,
    efficiency: str | Path | None = None,
    on_progress: Progress = silent,
) -> Path:
    """Write the report of a store, or of several together: summary, tables and figures with filters, provenance.

    Args:
        results: a store, its folder or its URI, or several.
        out: the HTML file; replaced whole.
        efficiency: what ``zeroflow efficiency --json`` wrote, to be shown too.
        on_progress: see ``Progress``; a unit is a table that is read, then a data set or another part of the page.

    Returns:
        ``out``, absolute.

    Raises:
        ConfigError: a newer zeroflow wrote a store, or ``efficiency`` is no such file; nothing is written then.
    """
    out = Path(out).absolute()
    cost = None if efficiency is None else _measured(Path(efficiency))
    found = read(
        *(results if isinstance(results, Sequence) and not isinstance(results, str) else [results]),
        on_progress=on_progress,
    )
    write_atomically(out, page(found, cost, on_progress).encode())
    remove_leftovers(out.parent, out.name)
    return out


def page(results: Results, efficiency: Mapping[str, Any] | None = None, on_progress: Progress = silent) -> str:
    """The report as HTML; ``on_progress``: see ``write_report``."""
    trials = results.tables["trials"]
    rows = summary(trials)
    own = resources.files("zeroflow.results").joinpath("page")
    drawn = choose(results.tables, rows, efficiency, on_progress)
    units = len(by_dataset(rows)) + 2
    on_progress("tables", units - 1, units)
    tables = make_tables(results.tables, efficiency) if len(trials) else []
    has_figures = any(section.entries for section in drawn.sections)
    parts = [
        "<!doctype html>\n<html lang='en' data-theme='light'>\n<head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>zeroflow results</title>",
        f"<style>{own.joinpath('report.css').read_text(encoding='utf-8')}</style>",
        f"<script>{_THEME}</script>",
        f"<script>{get_plotlyjs()}</script>" if has_figures else "",
        "</head>\n<body>\n<a class='skip' href='#main'>Skip to the results</a>",
        "<header><h1>zeroflow results</h1><button id='theme' type='button'>light / dark</button></header>",
        "<main id='main'>",
        _opening(results, rows, nothing=not has_figures),
        _filters(_marks(rows, results.tables)),
        *(_table(_by_avg(table), "Summary") for table in tables if table.name == "summary"),
        *_sections(drawn),
        *_tables([table for table in tables if table.name != "summary"]),
        _failures(results.tables["failures"]),
        _provenance(trials, results.stores),
        _definitions(trials),
        "</main>",
        f"<script type='application/json' id='templates'>{_json(_templates())}</script>",
        *(f"<script>{own.joinpath(name).read_text(encoding='utf-8')}</script>" for name in _SCRIPTS if has_figures),
        "" if has_figures else f"<script>{_SWITCH}</script>",
        "</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


_SCRIPTS = ("tables.js", "report.js")

# In the head, so that no page flashes in the wrong colours.
_THEME = """{ let theme = null; try { theme = localStorage.getItem("theme"); } catch { /* a page from a file may not */ }
document.documentElement.dataset.theme = theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"); }"""
_SWITCH = """document.getElementById("theme").addEventListener("click", () => {
const root = document.documentElement; root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; });"""


def _measured(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        efficiency_table(found)
    except OSError as error:
        raise ConfigError(f"efficiency {str(file)!r}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"efficiency {str(file)!r}: expected what 'zeroflow efficiency --json FILE' writes") from None
    return found


# What stands first.


def _opening(results: Results, rows: Sequence[Row], *, nothing: bool) -> str:
    done, failed = len(results.tables["trials"]), len(results.tables["failures"])
    where = ", ".join(f"<code>{escape(name)}</code>" for name in results.stores)
    text = f"<p>{done} cells done, {failed} failed, in {where}.</p>"
    if nothing:
        why = "every cell that was tried has failed, see below" if failed else "no cell has been finished here yet"
        text += f"<p><strong>Nothing to show: {why}.</strong> <code>zeroflow sweep --results DIR</code> fills a store, <code>zeroflow status DIR</code> says how far it is.</p>"
    text += "".join(f"<p class='note'>{escape(note)}</p>" for note in results.notes)
    # Rows of a data set by themselves: their names say no more than tells them apart.
    trials = results.tables["trials"]
    items = "".join(
        f"<li{_of_dataset(name)}>{escape(sentence)}</li>"
        for name in by_dataset(rows)
        for sentence in findings(summary(trials.filter(pc.field("dataset") == name)))
    )
    return text + (f"<ul class='findings'>{items}</ul>" if items else "")


def _of_dataset(name: str | None) -> str:
    """Marks what is shown with one data set only; of all where ``None``."""
    return "" if name is None else f" data-dataset='{escape(name, quote=True)}'"


def _marks(rows: Sequence[Row], tables: Mapping[str, pa.Table]) -> list[tuple[dict[str, str], int]]:
    """What there is to filter: the keys of rows, with their cells, and of runs on landscapes."""
    marks = [(row.filters, row.seeds) for row in rows]
    for optimizer, queries in dict.fromkeys(
        zip(*(tables["trajectories"][key].to_pylist() for key in ("optimizer", "queries")), strict=True)
    ):
        marks.append(({"optimizer": optimizer, "queries": "none" if queries is None else str(queries)}, 0))
    return marks


def _filters(marks: Sequence[tuple[Mapping[str, str], int]]) -> str:
    """A button for every value; with several data sets the one with most cells is chosen at first."""
    if not marks:
        return ""
    sets: list[str] = []
    for key in FILTERS:
        counts: dict[str, int] = {}
        for own, cells in marks:
            if key in own:
                counts[own[key]] = counts.get(own[key], 0) + cells
        if not counts:
            continue
        values = sorted(
            counts,
            key=lambda value: (value != "none", not value.isdigit(), int(value) if value.isdigit() else 0, value),
        )
        if key == "method":
            values.sort(key=lambda value: value != "simplecil")
        first = max(counts, key=lambda value: counts[value]) if key == "dataset" and len(counts) > 1 else None
        buttons = "".join(
            f"<button type='button' data-key='{key}' data-value='{escape(value, quote=True)}' aria-pressed='{'true' if value == first else 'false'}'>"
            f"{escape(value)}</button>"
            for value in values
        )
        sets.append(
            f"<div class='set' role='group' aria-label='{_NAMES[key]}'><span class='faint'>{_NAMES[key]}</span><div>{buttons}</div></div>"
        )
    return (
        f"<details id='filters' open><summary>Filters</summary>{''.join(sets)}<div class='end'>"
        "<label><input type='checkbox' id='keep-baseline' checked> always show SimpleCIL</label>"
        "<button type='button' id='clear'>clear</button>"
        "<span class='faint'>Press any number of values; they act on every table and figure, those of data sets on the sentences above too. None pressed: all.</span></div></details>"
    )


# Figures


def _sections(drawn: Drawn) -> Iterable[str]:
    number = 0
    for section in drawn.sections:
        yield f"<section{_of_dataset(section.dataset)}><h2>{escape(section.heading)}</h2>"
        yield from (f"<p class='note'>{escape(sentence)}</p>" for sentence in section.above)
        for entry in section.entries:
            yield _figure(entry, number)
            number += 1
        yield "</section>"
    yield from (f"<p class='note'>{escape(text)}</p>" for text in drawn.missing)


def _figure(entry: Entry, number: int) -> str:
    spec = entry.figure.to_plotly_json()
    layout = spec["layout"]
    layout.pop("template", None), layout.pop("title", None)  # the page's own
    top = layout.get("margin", {}).get("t", 20)
    layout["margin"] = {**layout.get("margin", {}), "t": top}
    choose = "<p><label>setting <select></select></label></p>" if layout.get("meta", {}).get("choose") else ""
    # A frame shows the first points of lines that are there already: how many of each, or a page would be of frames alone.
    spec["frames"] = [
        {"name": frame["name"], "traces": frame["traces"], "ends": [len(trace["x"]) for trace in frame["data"]]}
        for frame in spec.get("frames", ())
    ]
    return (
        f"<div class='figure' id='figure-{number}' role='group' aria-labelledby='title-{number}'>"
        f"<h3 id='title-{number}'>{escape(entry.title)}</h3><p class='caption'>{escape(entry.caption)}</p>{choose}"
        "<p class='note'></p><button type='button' class='all' aria-pressed='false' hidden>show all</button>"
        f"<div class='wide' tabindex='0' role='region' aria-labelledby='title-{number}'>"
        f"<div class='plot' style='min-height: {min(900, layout.get('height', 440))}px'></div></div>"
        f"<script type='application/json'>{_json(spec)}</script></div>"
    )


def _templates() -> dict[str, Any]:
    """The figures' template on a light and on a dark page."""
    light = figures.TEMPLATE.to_plotly_json()
    light["layout"] |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    dark = json.loads(json.dumps(light))
    dark["layout"]["font"]["color"] = "#e6e6e6"
    for axis in ("xaxis", "yaxis"):
        dark["layout"][axis] |= {"gridcolor": "#33373d", "linecolor": "#a3a8b0"}
    dark["layout"]["hoverlabel"] = {"namelength": -1, "bgcolor": "#22262b", "font": {"color": "#e6e6e6"}}
    return {"light": light, "dark": dark}


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


# Tables


def _tables(found: Sequence[Table]) -> Iterable[str]:
    if found:
        yield "<h2>Tables</h2>"
    for table in found:
        yield _table(table)


def _table(table: Table, heading: str = "") -> str:
    """A table whose lines can be filtered, sorted and exported."""
    title = heading or table.title
    level, identity = ("h2" if heading else "h3"), f"table-{table.name}"
    legend = " ".join([*table.notes, *([MARKED] if table.is_marked else []), "A click on a heading sorts."])
    return (
        f"<div class='sheet'><{level} id='{identity}'>{escape(title)}</{level}>"
        f"{''.join(f'<p class=note>{escape(sentence)}</p>' for sentence in table.above)}"
        f"<div class='tools'><label>find <input type='search' placeholder='a few letters'></label>"
        f"<button type='button' data-export='csv'>CSV</button><button type='button' data-export='latex'>LaTeX</button>"
        f"<span class='count faint'{' role=status' if heading else ''}></span></div>"
        f"<div class='wide{' tall' if len(table.lines) > 25 else ''}' tabindex='0' role='region' aria-labelledby='{identity}'>"
        f"{html_grid(table, buttons=True)}</div><p class='caption'>{escape(legend)}</p></div>"
    )


def _by_avg(table: Table) -> Table:
    """The best Avg first, data set by data set."""
    avg = table.headings.index("Avg")
    datasets = list(dict.fromkeys(line.mark.filters["dataset"] for line in table.lines))
    lines = sorted(
        table.lines,
        key=lambda line: (datasets.index(line.mark.filters["dataset"]), -_or_least(line.cells[avg].value)),
    )
    return replace(table, lines=tuple(lines), sorted_by=avg)


def _or_least(value: float | None) -> float:
    return float("-inf") if value is None else value


def _failures(failed: pa.Table) -> str:
    columns = ("label", "cell_id", "error", "message", "attempts")
    lines = [[str(row[key]) for key in columns] for row in failed.to_pylist()]
    if not lines:
        return ""
    return f"<h2>Failed cells</h2>{_plain_table('Failed cells', ['cell', 'cell_id', 'error', 'message', 'attempts'], lines)}"


def _provenance(trials: pa.Table, stores: Sequence[str]) -> str:
    commits = {
        "-" if commit is None else f"{commit}{' with changes' if dirty else ''}"
        for commit, dirty in zip(trials["git_commit"].to_pylist(), trials["git_dirty"].to_pylist(), strict=True)
    }
    found = {"cells": {str(len(trials))}, "read from": set(stores), "git_commit": commits}
    for key in _PROVENANCE:
        found[key] = {"-" if value is None else str(value) for value in trials[key].to_pylist()}
    for key in agreement.VERSIONED:  # files without their folders, which are this machine's
        texts = [text for text in pc.unique(trials[key]).to_pylist() if text]
        found[key] = {f"{Path(name).name} {digest}" for text in texts for name, digest in json.loads(text).items()}
    times = pc.min_max(trials["finished_at"]).as_py()
    found["finished"] = {f"{times[end]:%Y-%m-%d %H:%M:%S} UTC" for end in ("min", "max") if times[end]}
    lines = [[key, ", ".join(sorted(values))] for key, values in found.items() if values and values != {"-"}]
    return f"<h2>Provenance</h2>{_plain_table('Provenance', ['', ''], lines)}" if len(trials) else ""


def _definitions(trials: pa.Table) -> str:
    """What the metrics mean, as recorded with the cells."""
    recorded = sorted(text for text in pc.unique(trials["metric_definitions"]).to_pylist() if text)
    lines = [[name, meaning] for text in recorded for name, meaning in json.loads(text).items()]
    return (
        f"<h2>Metric definitions</h2>{_plain_table('Metric definitions', ['metric', 'meaning'], lines)}"
        if lines
        else ""
    )


def _plain_table(name: str, heading: list[str], lines: list[list[str]]) -> str:
    """An HTML table of long words."""
    return f"<div class='wide' tabindex='0' role='region' aria-label='{name}'>{html_grid(Table.of(words(*heading), lines), kind='text long')}</div>"
