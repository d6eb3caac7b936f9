"""The blocks of ``reproduction.md`` and ``efficiency.md``: the paper's numbers, ours where they were measured, how to get them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from zeroflow.results import effects, efficiency, load, published
from zeroflow.results.rendering import Column, Table, markdown_grid, words
from zeroflow.results.schema import SCHEMAS

HEADS = {"avg": "Avg", "last": "Last", "fgt": "Fgt"}


def stores(results: Path) -> list[Path]:
    """The folders of results that hold finished cells."""
    return sorted(folder.parent for folder in results.glob("*/trials") if folder.is_dir())


def all_trials(results: Path) -> pa.Table:
    return pa.concat_tables([SCHEMAS["trials"].empty_table(), *(load(store, "trials") for store in stores(results))])


def rows_page(results: Path, table: str) -> str:
    """Every row of a table of accuracies: published, ours, difference, command, verified."""
    found = published.compare(all_trials(results), published.rows(table))
    metrics = list(found[0].published.values)
    columns = [
        *words("row"),
        *(c for m in metrics for c in (Column(HEADS[m], ".2f"), Column("ours"), Column("difference", "+.2f"))),
        *words("verified", "command"),
    ]
    lines = []
    for row in found:
        cells: list[Any] = []
        for metric in metrics:
            cells += [row.published.values[metric], row.ours.get(metric), row.difference(metric)]
        verified = f"yes, {len(row.cells)} seed(s), lr {row.config['lr']}" if row.verified else "no"
        name = ", ".join(row.published.label)
        lines.append([name, *cells, verified, f"`{row.published.command}`"])
    ran = {row.published.label for row in found if row.verified}
    every = {row.published.label for row in found}
    return "\n".join([markdown_grid(Table.of(columns, lines)), "", f"Run: {len(ran)} of {len(every)} rows.", ""])


def what_training_changed() -> str:
    """The paper's own APER rows on each data set beside what others publish without any training."""
    rows = [row for row in published.rows("table1") if row.label[0] == "APER"]
    lines = []
    for name in dict.fromkeys(row.label[-1] for row in rows):
        own = [row for row in rows if row.label[-1] == name]
        kinds = {
            "exact gradients": [r for r in own if "FO" in r.label],
            "forward passes": [r for r in own if "FO" not in r.label],
        }
        for kind, group in kinds.items():
            spans = [_span([row.values[metric] for row in group]) for metric in ("avg", "last")]
            lines.append([name, f"{kind} ({len(group)} rows)", *spans])
        if found := published.pilot_simplecil().get(name):
            lines.append([name, "no training: class means, PILOT's figure", f"about {found[0]}", f"about {found[1]}"])
    return markdown_grid(Table.of([*words("data set", "APER with"), "Avg", "Last"], lines)) + "\n"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def ranpac_page() -> str:
    """RanPAC's published values beside the best of the paper's rows."""
    rows, found = published.rows("table1"), published.ranpac()
    names = list(next(iter(found.values())))
    lines = [[name, *(values[data] for data in names)] for name, values in found.items()]
    kinds = {"exact gradients": True, "forward passes": False}
    for kind, exact in kinds.items():
        best = [
            max(r.values["last"] for r in rows if r.label[-1] == data and ("FO" in r.label) == exact) for data in names
        ]
        lines.append([f"the paper's best row with {kind}, EASE or APER", *best])
    columns = [*words("Last, percent"), *(Column(name, ".1f") for name in names)]
    return markdown_grid(Table.of(columns, lines)) + "\n"


def efficiency_page(results: Path) -> str:
    """Table 2 as published, and ours from a GPU."""
    command = "`zeroflow efficiency --device cuda --json results/benchmarks/table2_cuda.json`"
    here = [result for result in efficiency_results(results) if _is_papers(result)]
    heads = ("GB", *(f"{name}, s" for name in published.DATASETS))
    columns = [
        *words("optimizer"),
        "q",
        *(
            c
            for i, h in enumerate(heads)
            for c in (Column(h, ".1f" if i else ".2f"), Column("ours", ".1f" if i else ".2f"))
        ),
        *words("verified"),
    ]
    lines = []
    for row in efficiency.table2():
        matches: list[tuple[Any, Any]] = [
            (result, own)
            for result in here
            for own in result["rows"]
            if (own["optimizer"], own["queries"] or 1) == (row.optimizer, row.queries) and own["peak_memory_bytes"]
        ]
        for result, own in matches or [(None, None)]:
            cells = [row.memory_gb, own["peak_memory_bytes"] / 1e9 if own else None]
            for name, seconds in row.seconds_per_epoch.items():
                cells += [seconds, own["seconds_per_epoch"][name] if own else None]
            verified = f"yes, on {result['device']}" if result else "no"
            lines.append([row.optimizer, row.queries, *cells, verified])
    return "\n".join([markdown_grid(Table.of(columns, lines)), "", f"Command, for all rows: {command}", ""])


def _is_papers(result: dict[str, Any]) -> bool:
    """Whether a measurement is of Table 2's setting, on a GPU."""
    backbone = result["backbone"].partition(".")[0]
    same = (backbone, result["image_size"], result["batch_size"]) == ("vit_base_patch16_224", 224, 48)
    return same and not result["device"].startswith("cpu")


def efficiency_results(results: Path) -> list[dict[str, Any]]:
    """What ``zeroflow efficiency`` measured and was committed."""
    return [json.loads(file.read_text()) for file in sorted((results / "benchmarks").glob("table2_*.json"))]


def ratios_page(results: Path) -> str:
    """Published and measured costs as ratios to first order, of every committed measurement."""
    parts = []
    for result in efficiency_results(results):
        commit = (result["git_commit"] or "unknown")[:10] + ("+" if result["git_dirty"] else "")
        parts += [
            f"### {result['backbone']}, {result['image_size']} pixels, batch {result['batch_size']}, {result['device']}",
            "",
            markdown_grid(efficiency.efficiency_table(result)),
            "",
            f"The model: {result['model_bytes'] / 1e9:.3f} GB; a plain forward pass: {result['forward_memory_bytes'] / 1e9:.3f} "
            f"GB, {result['forward_seconds']:.4f} s. `{result['command']}`; {result['threads']} thread(s), torch "
            f"{result['torch_version']}, timm {result['timm_version']}; commit {commit}.",
            "",
        ]
    if not parts:
        return "Nothing measured yet: `zeroflow efficiency --json results/benchmarks/table2_NAME.json`.\n"
    return "\n".join([*parts, *efficiency.EFFICIENCY_LEGEND, "", f"Assumed: {'; '.join(result['assumptions'])}.", ""])


TWINS = {
    "table1": "Each optimizer minus first order, mean over the paper's four data sets",
    "figure5": "More queries minus one; the paper has no numbers, its text says that accuracy rises",
    "table3": "With history minus without",
    "table4": "With sparsity minus without",
    "hybrid": "The last epochs zeroth-order minus all first-order; the paper has no numbers, its text says that it gains",
}


def effects_page(results: Path, table: str) -> str:
    """Whether an effect of the paper appears on QuickDraw-100, as far as its store is there."""
    store = results / f"{table}_quickdraw"
    command = f"`python sweeps/full_grid.py --grid sweeps/{table}_quickdraw.yaml --results results/{table}_quickdraw`"
    if store not in stores(results):
        return f"{TWINS[table]}: `results/{store.name}` is not there yet; {command} makes it.\n"
    trials = load(store, "trials")
    found = effects.effects(table, trials)
    metrics = list(dict.fromkeys(effect.metric for effect in found))
    seen = Counter[tuple[str, str]]()
    by_name: dict[tuple[str, int], list[effects.Effect]] = {}  # settings of one name (other epochs) each have a row
    for effect in found:
        number = seen[effect.name, effect.metric]
        seen[effect.name, effect.metric] += 1
        by_name.setdefault((effect.name, number), []).append(effect)
    columns = [*words("change"), *(head for metric in metrics for head in (f"{HEADS[metric]}: paper", "here"))]
    rows = []
    for (name, _), own in by_name.items():
        cells = []
        for effect in own:
            paper = f"{effect.paper:+.2f}" if effect.paper is not None else "+" if effect.expected > 0 else "-"
            here = "-" if effect.ours is None else f"{_signed(effect.ours)} ({effect.verdict})"
            cells += [paper, here]
        rows.append([name, *cells])
    lines = [f"{TWINS[table]}, percentage points.", "", markdown_grid(Table.of(columns, rows))]
    if table == "table1":
        lines += ["", *_order_lines(trials)]
    return "\n".join([*lines, "", command, ""])


def _signed(ours: Any) -> str:
    return f"{ours.mean:+.2f}" + ("" if ours.half_width is None else f" ± {ours.half_width:.2f}")


def _order_lines(trials: pa.Table) -> list[str]:
    lines = []
    for method in ("ease", "aper-adapter"):
        tau, between = effects.order(method, trials)
        if tau is not None:
            lines.append(
                f"{method}: Kendall's tau between our order of the nine optimizers by Avg and the paper's is {tau:.2f}; between "
                f"the paper's own data sets it is {between:.2f} on average."
            )
    return lines


def blocks(results: Callable[[], Path]) -> dict[str, Callable[[], str]]:
    """By name; ``results`` gives the folder of the committed stores."""
    return {
        "reproduction-training": what_training_changed,
        "reproduction-ranpac": ranpac_page,
        **{f"reproduction-{t}": lambda t=t: rows_page(results(), t) for t in ("table1", "table3", "table4", "ease")},  # type: ignore[misc]
        **{f"effects-{t}": lambda t=t: effects_page(results(), t) for t in TWINS},  # type: ignore[misc]
        "reproduction-table2": lambda: efficiency_page(results()),
        "efficiency-ratios": lambda: ratios_page(results()),
    }
