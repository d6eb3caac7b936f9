"""Commands on a grid file: plan, sweep."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zeroflow.cli.command import (
    Command,
    Folder,
    data_dir_option,
    failed,
    import_option,
    json_option,
    price_option,
    set_option,
)
from zeroflow.cli.completion import grid_files
from zeroflow.cli.progress import Bar
from zeroflow.errors import ConfigError

if TYPE_CHECKING:
    from zeroflow.grid.grid_file import Grid
    from zeroflow.grid.placement import SweepPlacement
    from zeroflow.grid.plan import Plan
    from zeroflow.results.store import Store
    from zeroflow.trial.config import TrialConfig

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_GRID = Path("sweeps/full_grid.yaml")


def grid_options(command: F) -> F:
    """The options that name a grid and a store."""
    for option in (
        import_option,
        set_option("Replace a key in every cell; VALUE is YAML, a list makes an axis (seed=[0,1]). May be repeated."),
        data_dir_option,
        click.option(
            "--results",
            default=None,
            type=Folder(),
            help="Where the Parquet store is: a folder or s3://... [default: <grid name> in ZEROFLOW_RESULTS, else in runs]",
        ),
        click.option(
            "--grid",
            "grid_file",
            type=click.Path(path_type=Path),
            default=None,
            shell_complete=grid_files,
            help=f"Grid file. [default: {DEFAULT_GRID}]",
        ),
    ):
        command = option(command)
    return command


def ray_options(command: F) -> F:
    """The options of how Ray runs cells."""
    for option in (
        click.option(
            "--ray-address", help="A running Ray: an address or 'auto'. [default: RAY_ADDRESS, else a new local one]"
        ),
        click.option("--max-concurrent", type=click.IntRange(min=1), help="Cells at a time. [default: as many as fit]"),
        click.option("--workers-per-trial", type=click.IntRange(min=1), help="Processes that share a cell's queries."),
    ):
        command = option(command)
    return command


def open_grid(grid_file: Path | None, settings: tuple[str, ...], data_dir: str | None) -> tuple[Grid, str | None]:
    """A grid, the default one for None, and the folder of its data sets."""
    from zeroflow.grid.grid_file import load_grid, parse_override

    if grid_file is None:
        beside = Path(__file__).resolve().parents[2] / DEFAULT_GRID
        grid_file = beside if beside.exists() else DEFAULT_GRID
        if not grid_file.exists():
            raise ConfigError(
                f"no {DEFAULT_GRID} here, which only a checkout of zeroflow has; name a grid file with --grid"
            )
    grid = load_grid(grid_file, dict(parse_override(text) for text in settings))
    folder = data_dir or grid.data_dir
    return grid, None if folder is None else str(Path(folder).expanduser().absolute())


def results_root(results: str | None, name: str) -> str:
    """The folder or URI of the store. In a Ray job, a relative folder would be deleted with the upload, so use the home."""
    root = results or f"{(os.environ.get('ZEROFLOW_RESULTS') or 'runs').rstrip('/')}/{name}"
    if "://" in root or "working_dir_files" not in Path.cwd().parts:
        return root
    return str(Path.home() / "zeroflow" / Path(root).expanduser())


@click.command(
    cls=Command,
    short_help="What a grid would run, and at what cost.",
    examples=(
        ("zeroflow plan --grid sweeps/quick.yaml", "what is done and what is missing"),
        (
            "zeroflow plan --set optimizer=zo-sgd --set queries=[1,4] --cells",
            "the default grid with two keys replaced, cell by cell",
        ),
        ("zeroflow plan --grid sweeps/quick.yaml --json | jq '.missing | length'", "for a script"),
    ),
)
@grid_options
@click.option("--cells", is_flag=True, help="List every missing cell.")
@price_option
@json_option
def plan(
    grid_file: Path | None,
    results: str | None,
    data_dir: str | None,
    settings: tuple[str, ...],
    cells: bool,
    price_per_hour: float | None,
    as_json: bool,
) -> None:
    """Show which cells of a grid are done, failed, missing, or lack their data, and what the missing ones will cost.

    Writes nothing. The estimate comes from the cells that have finished in the same store.
    """
    import dataclasses

    from zeroflow.grid.plan import make_plan
    from zeroflow.results.store import Store

    grid, folder = open_grid(grid_file, settings, data_dir)
    found = make_plan(grid, Store(results_root(results, grid.name)), folder)
    check_backbones(found.runnable, grid.placement, None)
    if as_json:
        parts = {"done": found.done, "failed": found.failed, "missing": found.missing}
        ids = {name: [config.cell_id for config in part] for name, part in parts.items()}
        waiting = {name: [config.cell_id for config in part] for name, part in found.unavailable.items()}
        cost = None if price_per_hour is None else found.estimate.cost(price_per_hour)
        estimate = {**dataclasses.asdict(found.estimate), "price_per_hour": price_per_hour, "cost": cost}
        whole = {**ids, "unavailable": waiting, "seconds": found.seconds, "estimate": estimate}
        click.echo(json.dumps(whole, indent=1))
    else:
        if counted := found.describe_data(folder):
            click.echo(counted)
        click.echo(found.describe(folder, cells=cells, price_per_hour=price_per_hour))


@click.command(
    cls=Command,
    short_help="Run what is missing of a grid, with Ray.",
    examples=(
        ("zeroflow sweep --grid sweeps/quick.yaml --dry-run", "what would run"),
        ("zeroflow sweep --grid sweeps/quick.yaml", "run it; the same line again runs what is missing then"),
        (
            "zeroflow sweep --grid sweeps/quick.yaml --retry-failed --max-concurrent 2",
            "failed cells too, two at a time",
        ),
    ),
    statuses={
        0: "every cell that can run here is done",
        1: "cells have failed or are missing; the same command goes on",
    },
)
@grid_options
@click.option("--dry-run", is_flag=True, help="Print the plan with every missing cell, and stop.")
@click.option("--retry-failed", is_flag=True, help="Run failed cells again too.")
@ray_options
@click.option("--report/--no-report", default=True, help="Write report.html into the results at the end.")
@json_option
def sweep(
    grid_file: Path | None,
    results: str | None,
    data_dir: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    retry_failed: bool,
    workers_per_trial: int | None,
    max_concurrent: int | None,
    ray_address: str | None,
    report: bool,
    as_json: bool,
) -> None:
    """Run the cells of a grid that are not done yet, with Ray Tune and Ray Train, into a Parquet store."""
    from zeroflow.grid.plan import check_data, check_results, make_plan
    from zeroflow.results.store import Store
    from zeroflow.results.summary import render_text, summary
    from zeroflow.sweep.driver import run_sweep

    started, say = time.monotonic(), partial(click.echo, err=as_json)
    grid, folder = open_grid(grid_file, settings, data_dir)
    grid = placed(grid, workers_per_trial, max_concurrent)
    store = Store(results_root(results, grid.name))
    found = make_plan(grid, store, folder, retry_failed=retry_failed)
    say(found.describe(folder, cells=dry_run))
    cells, placement = found.runnable, grid.placement
    check_backbones(cells, placement, ray_address)
    if dry_run:
        if as_json:
            click.echo(json.dumps(_counts(grid, store, found), indent=1))
        return
    if cells:
        check_results(store, len(cells), folder)
    with Bar("data sets") as bar:
        check_data(cells, folder, placement, bar)
    stopped = None
    if cells:
        say(f"results: {store.root}")
        end = run_sweep(cells, store, placement, name=grid.name, data_dir=folder, address=ray_address, echo=say)
        stopped = end.stopped
    say("\n" + render_text(summary(_rows_of(grid, store))))
    if report and "://" not in store.root and store.done():
        _report(store, say)
    left = make_plan(grid, store, folder)
    absent = len(_absent(left))
    if stopped:
        click.echo(f"the sweep was stopped: {stopped}; the same command goes on from here", err=True)
    if as_json:
        click.echo(json.dumps({**_counts(grid, store, left), "stopped": stopped}, indent=1))
    say(
        f"{len(left.done)} of {len(grid.cells)} cells done, {len(left.failed)} failed, {len(left.missing)} missing, "
        f"{absent} without their data set; {time.monotonic() - started:.0f} s"
    )
    if stopped or left.failed or left.missing:
        for config in left.failed:
            click.echo(failed(f"failed: {config.cell_id} {config.label()} (--retry-failed runs it again)"), err=True)
        sys.exit(1)


def _report(store: Store, say: Callable[[str], None]) -> None:
    """Write report.html into a folder of results; a full disk ends no sweep."""
    from zeroflow.results.report import write_report

    try:
        say(f"\nreport: {write_report(store.root, Path(store.root) / 'report.html')}")
    except OSError as error:
        click.echo(f"\nno report: {error.strerror}", err=True)


def placed(grid: Grid, workers_per_trial: int | None, max_concurrent: int | None) -> Grid:
    """The grid with its placement overridden by the command line."""
    import dataclasses

    placement = dataclasses.replace(
        grid.placement,
        forced={} if workers_per_trial is None else {"workers_per_trial": workers_per_trial},
        max_concurrent=max_concurrent or grid.placement.max_concurrent,
    )
    return dataclasses.replace(grid, placement=placement)


def check_backbones(cells: Sequence[TrialConfig], placement: SweepPlacement, address: str | None) -> None:
    """Refuse backbones that cannot be built or reached."""
    from zeroflow.sweep.serve import wanted
    from zeroflow.trial.checks import check_backbone_of

    for config in cells:
        check_backbone_of(config)
    wanted(cells, placement, local=not (address or os.environ.get("RAY_ADDRESS")))


def _counts(grid: Grid, store: Store, plan: Plan) -> dict[str, Any]:
    """Output of ``sweep --json``: the ids of cells by outcome."""
    parts = {"done": plan.done, "failed": plan.failed, "missing": plan.missing, "unavailable": _absent(plan)}
    ids = {name: [config.cell_id for config in part] for name, part in parts.items()}
    return {"grid": grid.name, "results": store.root, **ids}


def _absent(plan: Plan) -> list[TrialConfig]:
    """The cells that wait for their data set."""
    return [config for waiting in plan.unavailable.values() for config in waiting]


def _rows_of(grid: Grid, store: Store) -> Any:
    """The store's trials that belong to this grid."""
    import pyarrow as pa
    import pyarrow.compute as pc

    trials = store.load("trials")
    return trials.filter(pc.is_in(trials["cell_id"], pa.array([config.cell_id for config in grid.cells])))
