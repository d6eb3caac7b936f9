"""The ``zeroflow`` command. Each module has a group of commands, which import what they need when they run."""

from __future__ import annotations

import click

from zeroflow.cli.catalog import download, list_
from zeroflow.cli.cells import efficiency, run, trajectories
from zeroflow.cli.clusters import check_cluster, sync_data
from zeroflow.cli.command import Commands
from zeroflow.cli.diagnosing import diagnose
from zeroflow.cli.grids import plan, sweep
from zeroflow.cli.looking import look
from zeroflow.cli.searching import search
from zeroflow.cli.serving import serve
from zeroflow.cli.stores import merge, pack, report, status, tables

__all__ = ["main", "sweep"]


@click.group(
    cls=Commands,
    examples=(
        ("zeroflow run --set method=ease --set optimizer=zo-sgd", "one cell, here, without Ray"),
        ("zeroflow plan --grid sweeps/quick.yaml", "what a grid would run"),
        ("zeroflow look sweeps/quick.yaml", "what its models would see"),
        ("zeroflow sweep --grid sweeps/quick.yaml", "run what is missing, with Ray"),
        ("zeroflow status runs/quick", "how far it is, from another terminal"),
        ("zeroflow report runs/quick -o report.html", "one page with tables and figures"),
    ),
)
@click.version_option(package_name="zeroflow")
def main() -> None:
    """Learn a stream of tasks without backpropagation and without forgetting.

    Tab completion, --json, exit statuses: docs/commands.md. Help on a command: zeroflow COMMAND -h
    """


for command in (
    plan,
    look,
    run,
    sweep,
    search,
    status,
    report,
    tables,
    merge,
    pack,
    efficiency,
    trajectories,
    diagnose,
    serve,
    list_,
    download,
    check_cluster,
    sync_data,
):
    main.add_command(command)
