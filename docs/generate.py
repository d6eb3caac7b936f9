"""Write the numbers into the documents: every one comes from a committed store or a committed measurement.

``python docs/generate.py`` fills the blocks between ``<!-- generated: NAME -->`` and ``<!-- end -->`` in the Markdown files
of the project; ``--check`` changes nothing and ends with status 1 if a block is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import click

from zeroflow.results import load
from zeroflow.results.tables import render_markdown, summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def sweep_table(store: str) -> str:
    """The result table of a committed store, and where it comes from."""
    trials = load(RESULTS / store, "trials")
    rows = trials.to_pylist()
    commits = sorted({(row["git_commit"] or "unknown")[:10] + ("+" if row["git_dirty"] else "") for row in rows})
    hours = sum(row["seconds"] for row in rows) / 3600
    devices = ", ".join(sorted({f"{row['device']}, {row['threads']} thread(s)" for row in rows}))
    source = (
        f"{len(rows)} cells, {hours:.2f} hours of one cell at a time on {devices}; commit {', '.join(commits)}; "
        f"torch {rows[0]['torch_version']}, timm {rows[0]['timm_version']}, Ray {rows[0]['ray_version']}."
    )
    return f"{render_markdown(summary(trials))}\n\n{source}\n"


def wall_time(store: str) -> str:
    """How long a sweep took from its command to its end."""
    record = json.loads((RESULTS / store / "sweeps.jsonl").read_text().splitlines()[0])
    minutes = record["seconds"] / 60
    return f"The {record['cells']} cells took {minutes:.1f} minutes on {record['cpus']} CPU cores, start of Ray included.\n"


def cell_overhead() -> str:
    return "```\n" + (RESULTS / "benchmarks" / "cell_overhead.txt").read_text().strip() + "\n```\n"


def model_card() -> str:
    """Recipe and measured numbers of the embedded backbone."""
    recipe = json.loads((ROOT / "zeroflow/models/embedded/quickdraw_vit.json").read_text())
    trials = load(RESULTS / "backbone", "trials").to_pylist()
    trained = next(row for row in trials if row["checkpoint"] is None)
    random = next(row for row in trials if row["checkpoint"] == "none")
    keys = ("classes", "drawings", "epochs", "batch_size", "lr", "seed", "steps", "torch")
    lines = [f"| {key.replace('_', ' ')} | {recipe[key]} |" for key in keys]
    lines += [
        f"| training loss, first and last epoch | {recipe['loss_per_epoch'][0]:.3f}, {recipe['loss_per_epoch'][-1]:.3f} |",
        f"| minutes on the machine that trained it | {recipe['seconds'] / 60:.0f} |",
    ]
    measured = [
        f"| {name} | {row['last']:.2f} | {row['avg']:.2f} |"
        for name, row in (("this checkpoint", trained), ("random initialisation", random))
    ]
    return "\n".join(
        ["| recipe | |", "|---|---|", *lines, "", "Class means of frozen features on the 100 unseen classes (SimpleCIL):", "",
         "| weights | all 100 classes, % | mean over ten stages, % |", "|---|---:|---:|", *measured, ""]
    )  # fmt: skip


BLOCKS: dict[str, Callable[[], str]] = {
    "quick-table": lambda: sweep_table("quick"),
    "quick-time": lambda: wall_time("quick"),
    "search": lambda: sweep_table("search"),
    "room-search": lambda: sweep_table("room_search"),
    "room-table": lambda: sweep_table("room"),
    "cell-overhead": cell_overhead,
    "model-card": model_card,
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
