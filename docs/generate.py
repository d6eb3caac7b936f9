"""Write the numbers into the documents: every one comes from a committed store or a committed measurement.

``python docs/generate.py`` fills the blocks between ``<!-- generated: NAME -->`` and ``<!-- end -->`` in the Markdown files
of the project; ``--check`` changes nothing and ends with status 1 if a block is out of date.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import bans
import click
import findings
import front
import gallery
import measurements
import optimizer_measurements
import registered
import reproduction
from measurements import RESULTS, ROOT

from zeroflow.results import load
from zeroflow.results.rendering import Column, Table, markdown_grid, words
from zeroflow.results.schema import markdown
from zeroflow.results.searches import render_searches, search_rows
from zeroflow.results.summary import render_markdown, summary

BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def sweep_table(store: str) -> str:
    """The result table of a committed store, and where it comes from."""
    trials = load(RESULTS / store, "trials")
    rows = trials.to_pylist()
    commits = sorted({measurements.commit_of(row) for row in rows})
    hours = sum(row["seconds"] for row in rows) / 3600
    devices = ", ".join(sorted({f"{row['device']}, {row['threads']} thread(s)" for row in rows}))
    source = (
        f"{len(rows)} cells, {hours:.2f} hours of one cell at a time on {devices}; commit {', '.join(commits)}; "
        f"torch {rows[0]['torch_version']}, timm {rows[0]['timm_version']}, Ray {rows[0]['ray_version']}."
    )
    return f"{render_markdown(summary(trials))}\n\n{source}\n"


def console(arguments: Sequence[str], printed: str) -> str:
    """A command and what it prints, as a terminal shows them."""
    lines = [line.rstrip() for line in printed.strip().splitlines()]
    return "\n".join(["```console", f"$ zeroflow {' '.join(arguments)}", *lines, "```", ""])


def terminal(*arguments: str) -> str:
    """A command, and what it prints when it is run in the checkout."""
    run = subprocess.run(
        [sys.executable, "-m", "zeroflow.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return console(arguments, run.stdout.replace(f"{ROOT}/", ""))


def kept(*arguments: str, file: str) -> str:
    """A command, and what it printed when it was run: last digits of losses differ between machines."""
    return console(arguments, (RESULTS / file).read_text())


def captured(store: str, table: str) -> str:
    """What the terminal showed while a store was filled; ``table``: stands for the result table."""
    lines = (RESULTS / store / "terminal.txt").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("dataset "))
    last = next(i for i, line in enumerate(lines) if line.startswith("gain:"))
    return "\n".join(["```console", *lines[:first], table, *lines[last + 1 :], "```", ""])


def searches(store: str) -> str:
    """The searches of a committed store."""
    rows = load(RESULTS / store, "searches").to_pylist() if (RESULTS / store).is_dir() else []
    if not rows:
        return (
            f"Not run yet: `zeroflow search sweeps/{store.removesuffix('_search')}.yaml --results results/{store}`.\n"
        )
    return render_searches(search_rows(rows))


def landscape(name: str) -> str:
    """Where the runs on a landscape ended, in the middle of it and at the end."""
    folder = RESULTS / "trajectories"
    rows = (
        [row for row in load(folder, "trajectories").to_pylist() if row["landscape"] == name] if folder.is_dir() else []
    )
    if not rows:
        return "Not run yet.\n"
    points = [row for row in load(folder, "surfaces").to_pylist() if row["landscape"] == name]
    columns = [
        *words("optimizer"),
        "q",
        Column("lr", "g"),
        *words("objective", "at the end of"),
        Column("x", ".2f"),
        Column("y", ".2f"),
        Column("from the plane", ".2f"),
        Column("old loss", ".3f"),
        Column("new loss", ".3f"),
    ]
    lines: list[tuple[Any, ...]] = [
        (f"*{each['point']}*", *[""] * 4, each["x"], each["y"], "", each["loss_old"], each["loss_new"])
        for each in points
        if each["point"]
    ]
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["optimizer"], row["queries"], row["lr"], row["seed"], row["objective"]), []).append(row)
    for (optimizer, queries, lr, _, objective), path in runs.items():
        switch = [row for before, row in itertools.pairwise(path) if before["task"] != row["task"]]
        for what, row in [*(("the old task", row) for row in switch), ("all", path[-1])]:
            place = (row[key] for key in ("x", "y", "distance", "loss_old", "loss_new"))
            lines.append((optimizer, queries or "-", lr, objective, what, *place))
    first = points[0]
    return "\n".join(
        [
            f"**{name}**: losses of the points and runs.",
            "",
            markdown_grid(Table.of(columns, lines)),
            "",
            f"Commit {measurements.commit_of(first)}; {first['device']}, torch {first['torch_version']}.",
            "",
        ]
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "optimizer-list": registered.optimizer_list,
    "method-list": registered.method_list,
    "classifier-list": registered.classifier_list,
    "classifier-cost": measurements.classifier_cost,
    "method-refusals": registered.method_refusals,
    "estimators": registered.estimators,
    "optimizers": lambda: sweep_table("optimizers"),
    "training-curves": optimizer_measurements.training_curves,
    "optimizers-search": lambda: sweep_table("optimizers_search"),
    "quick-table": lambda: sweep_table("quick"),
    "quick-terminal": lambda: captured("quick", "(the table above)"),
    "search": lambda: sweep_table("search"),
    "room-search": lambda: sweep_table("room_search"),
    "room-table": lambda: sweep_table("room"),
    "table1-search": lambda: searches("table1_quickdraw_search"),
    "families-search": lambda: searches("families_quickdraw_search"),
    "figure6-search": lambda: searches("figure6_quickdraw_search"),
    "trajectories-two-parameters": lambda: landscape("two-parameters"),
    "trajectories-adapter": lambda: landscape("adapter"),
    "cell-overhead": measurements.cell_overhead,
    "data-loading": measurements.data_loading,
    "features": measurements.features,
    "backbones": measurements.backbones,
    "query-workers": measurements.query_workers,
    "replay": measurements.replay,
    "forecast": measurements.forecast,
    "many-cells": measurements.many_cells,
    "commands": registered.commands,
    "doors": registered.doors,
    "schema": markdown,
    "gallery": lambda: gallery.page(RESULTS),
    "plan": lambda: terminal(
        "plan", "--grid", "sweeps/quick.yaml", "--results", "results/quick", "--set", "seed=[0,1,2,3,4]"
    ),
    "packing": measurements.packing,
    "durability": measurements.durability,
    "kills": measurements.kills,
    "diagnosis": lambda: kept("diagnose", "results/quick", "63a1633bf7e7d97f", file="quick/diagnosis.txt"),
    "metrics": registered.metric_definitions,
    "model-card": registered.model_card,
    "optimizer-time": optimizer_measurements.optimizer_time,
    "optimizer-memory": optimizer_measurements.optimizer_memory,
    "optimizer-peers": optimizer_measurements.optimizer_peers,
    "optimizer-quality": optimizer_measurements.optimizer_quality,
    "own-model": optimizer_measurements.own_model,
    **reproduction.blocks(lambda: RESULTS),
    **findings.blocks(lambda: RESULTS),
    **front.blocks(lambda: RESULTS),
    **bans.blocks(lambda: RESULTS),
}


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Change nothing; fail if a block is out of date.")
def main(check: bool) -> None:
    stale = []
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("zeroflow/**/*.md")]):
        text = path.read_text()
        filled = BLOCK.sub(lambda found: found[1] + BLOCKS[found["name"]]() + found[3], text)
        if filled != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(filled)
    for name in stale:
        click.echo(f"{'out of date' if check else 'written'}: {name}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
