"""The command that says why a cell's training does not move."""

from __future__ import annotations

import dataclasses
import json

import click

from zeroflow.cli.command import Command, Folder, data_dir_option, import_option, json_option
from zeroflow.errors import ConfigError, unknown


@click.command(
    cls=Command,
    short_help="Say why training does not move.",
    examples=(
        ("zeroflow diagnose runs/quick 25b6c12a064fabb0", "a cell of a store, by its id or how that begins"),
        ("zeroflow diagnose runs/quick 25b6 --json", "the numbers, for a script"),
    ),
)
@click.argument("results", type=Folder())
@click.argument("cell")
@import_option
@data_dir_option
@click.option(
    "--directions", default=16, show_default=True, type=click.IntRange(2), help="Random directions to look along."
)
@click.option("--batches", default=4, show_default=True, type=click.IntRange(2), help="Mini-batches to look at.")
@json_option
def diagnose(results: str, cell: str, data_dir: str | None, directions: int, batches: int, as_json: bool) -> None:
    """Say why a cell's training does not move, from its stored steps and some 200 forward passes at its start.

    How near its estimate comes to the gradient, whether eps is in rounding noise or beyond curvature, the learning rate that the
    noise allows, and how many forward passes a lower loss would take.
    """
    from zeroflow import Placement
    from zeroflow.results.store import Store
    from zeroflow.studies.diagnosis import diagnose as examine
    from zeroflow.trial.config import TrialConfig

    store = Store(results)
    known = sorted(store.done())
    found = [id_ for id_ in known if id_.startswith(cell)]
    if not found:
        raise unknown(f"cell in {results}", cell, known)
    if len(found) > 1:
        raise ConfigError(f"cell {cell!r}: {len(found)} cells of {results} begin so: {', '.join(found[:5])}")
    row = store.row("trials", found[0])
    assert row is not None
    config = TrialConfig.from_dict(json.loads(row["config"]))
    steps = [step for step in store.load("steps", cells=found).to_pylist() if step["task"] == 0]
    # A step without any finite loss was skipped.
    losses = [step["loss"] for step in sorted(steps, key=lambda step: step["step"]) if step["loss"] is not None]
    result = examine(config, Placement(data_dir), losses, directions=directions, batches=batches)
    if as_json:
        click.echo(json.dumps({"cell_id": config.cell_id, **dataclasses.asdict(result)}, indent=1))
        return
    click.echo(f"{config.cell_id} {config.label()}\n")
    for sentence in result.sentences(config):
        click.echo(sentence)
