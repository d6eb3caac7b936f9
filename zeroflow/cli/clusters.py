"""Commands on a cluster: check-cluster, sync-data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from zeroflow.cli.command import BAD_INPUT, Command, Folder, failed, json_option, set_option
from zeroflow.cli.completion import grid_files
from zeroflow.cli.grids import open_grid
from zeroflow.cli.progress import Bar


@click.command(
    "check-cluster",
    cls=Command,
    short_help="What is wrong with a cluster, and its price.",
    examples=(
        ("zeroflow check-cluster cluster/gpu.yaml --grid sweeps/full_grid.yaml", "before `ray up cluster/gpu.yaml`"),
        ("zeroflow check-cluster cluster/gpu.yaml --offline", "the file alone; asks no account and no bucket"),
    ),
    statuses={
        0: "nothing is wrong that can be seen from here",
        BAD_INPUT: "bad input, or something is wrong: every problem on a line of its own",
    },
)
@click.argument("cluster_file", metavar="CLUSTER", type=click.Path(path_type=Path))
@click.option(
    "--grid", "grid_file", type=click.Path(path_type=Path), default=None, shell_complete=grid_files,
    help="What is to run there: looks for its data, tells hours and price.",
)  # fmt: skip
@set_option("Replace a key in every cell of the grid, as for plan.")
@click.option(
    "--results", default=None, type=Folder(),
    help="Where the Parquet store will be. [default: the file's ZEROFLOW_RESULTS/<grid name>]",
)  # fmt: skip
@click.option("--offline", is_flag=True, help="Ask neither the account nor the bucket.")
@json_option
def check_cluster(
    cluster_file: Path,
    grid_file: Path | None,
    settings: tuple[str, ...],
    results: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Check a cluster file before anything is paid for; starts nothing.

    The file by Ray's rules and ours; of an AWS file the account: credentials, kinds of machines, quotas, security group and
    roles. That results can be written, and the grid's data sets are where machines will get them from. What the cluster costs
    at most in an hour, and with cells that have finished in the store what the missing ones will take.
    """
    from zeroflow.clusters.cluster_file import read_cluster
    from zeroflow.clusters.launch import check_launch

    cluster = read_cluster(cluster_file)
    grid = open_grid(grid_file, settings, None)[0] if grid_file else None
    found = check_launch(cluster, grid, results, ask=not offline)
    if as_json:
        missing = None if found.plan is None else len(found.plan.missing)
        told = {"cluster": str(cluster_file), "problems": list(found.problems), "facts": list(found.facts)}
        numbers = {"missing": missing, "hours": found.hours, "cost": found.cost, "hourly": found.hourly}
        click.echo(json.dumps({**told, **numbers}, indent=1))
    else:
        for fact in found.facts:
            click.echo(fact)
        for problem in found.problems:
            click.echo(failed(f"problem: {problem}"), err=True)
        click.echo(f"{cluster_file}: {len(found.problems)} problem(s)")
    if found.problems:
        sys.exit(BAD_INPUT)


@click.command(
    "sync-data",
    cls=Command,
    short_help="Copy data sets from a bucket to this machine.",
    examples=(("zeroflow sync-data s3://bucket/data --data-dir ~/data", "what is not there yet"),),
)
@click.argument("source", type=Folder())
@click.option(
    "--data-dir", envvar="ZEROFLOW_DATA", required=True, type=click.Path(file_okay=False, path_type=Path),
    help="Where they belong. [env: ZEROFLOW_DATA]",
)  # fmt: skip
def sync_data(source: str, data_dir: Path) -> None:
    """Copy the files of SOURCE, a bucket's address or a folder, that are missing here or have another size."""
    from zeroflow.clusters.data_sync import synchronise

    with Bar("sync-data") as bar:
        copied = synchronise(source, data_dir.expanduser(), bar)
    click.echo(f"{copied} file(s) copied to {data_dir}")
