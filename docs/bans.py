"""The generated blocks of the pages on gradient bans."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import findings

from zeroflow.results import load
from zeroflow.results.estimates import estimate
from zeroflow.results.rendering import Column, Table, markdown_grid, words
from zeroflow.results.summary import render_markdown, summary

_SPENT = ("requests", "queried_images", "images_per_point")


def table(results: Path, name: str) -> str:
    """The result table of a store; what makes it, while it is not there."""
    if not (results / name / "trials").is_dir():
        return findings.NOT_RUN.format(name=name)
    trials = load(results / name, "trials")
    return f"{render_markdown(summary(trials))}\n{findings.source(results, name)}"


def spent(results: Path) -> str:
    """What black boxes were asked, beside the table."""
    found = table(results, "blackbox_quickdraw")
    if not (results / "blackbox_quickdraw" / "trials").is_dir():
        return found
    trials = load(results / "blackbox_quickdraw", "trials")
    by_cell = {row["cell_id"]: row for row in trials.to_pylist()}
    lines = []
    for row in summary(trials):
        cells = [by_cell[cell] for cell in row.cells]
        means = [estimate([cell[name] for cell in cells]).mean for name in _SPENT]
        lines.append((row.label, len(cells), *means))
    columns = [
        *words(""),
        "n",
        Column("requests", ",.0f"),
        Column("queried images", ",.0f"),
        Column("images per point of Avg", ",.1f"),
    ]
    return "\n".join([found, markdown_grid(Table.of(columns, lines)), ""])


def served(results: Path) -> str:
    """Throughput of the served backbone beside the one in the same process."""
    file = results / "benchmarks" / "served_backbone.json"
    if not file.exists():
        return f"Not measured yet: `python benchmarks/served_backbone.py --output results/benchmarks/{file.name}`.\n"
    found = json.loads(file.read_text())
    return (
        f"Batches of {found['batch']}: {found['served_images_per_second']:.0f} images a second through the endpoint, "
        f"{found['local_images_per_second']:.0f} in the same process, ratio {found['ratio']:.2f} (target at least "
        f"{found['target']}), medians of {found['rounds']} rounds in turns. `{found['command']}`; {found['device']}, torch "
        f"{found['torch_version']}; commit {(found['git_commit'] or 'unknown')[:10]}{'+' if found['git_dirty'] else ''}.\n"
    )


def blocks(results: Callable[[], Path]) -> dict[str, Callable[[], str]]:
    """The blocks by name; ``results``: where the stores are."""
    return {
        "black-box": lambda: spent(results()),
        "served-backbone": lambda: served(results()),
        "int8": lambda: table(results(), "int8_quickdraw"),
        "nondifferentiable": lambda: table(results(), "nondifferentiable_quickdraw"),
    }
