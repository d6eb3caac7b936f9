"""Commands on a grid file: plan, sweep, search."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zeroflow.cli.command import Command, Folder, data_dir_option, failed, json_option, price_option, set_option
from zeroflow.cli.completion import grid_files
from zeroflow.cli.progress import Bar
from zeroflow.errors import ConfigError

if TYPE_CHECKING:
    from zeroflow.grid.grid_file import Grid
    from zeroflow.grid.placement import SweepPlacement
    from zeroflow.grid.plan import Plan
    from zeroflow.grid.search_plan import SearchPlan
    from zeroflow.results.store import Store
    from zeroflow.trial.config import TrialConfig

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_GRID = Path("sweeps/full_grid.yaml")


def grid_options(command: F) -> F:
    """The options that name a grid and a store."""
    for option in (
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


def _root(results: str | None, name: str) -> str:
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
    found = make_plan(grid, Store(_root(results, grid.name)), folder)
    _check_backbones(found.runnable(False), grid.placement, None)
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
    store = Store(_root(results, grid.name))
    found = make_plan(grid, store, folder)
    say(found.describe(folder, cells=dry_run))
    cells = found.runnable(retry_failed)
    placement = _placed(grid, workers_per_trial, max_concurrent)
    _check_backbones(cells, placement, ray_address)
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


@click.command(
    cls=Command,
    short_help="Choose lr and eps with equal budgets.",
    examples=(
        ("zeroflow search my_grid.yaml --dry-run", "what would be tried"),
        ("zeroflow search my_grid.yaml", "try it, and write what was chosen into the file"),
        ("zeroflow search my_grid.yaml --json > chosen.json", "the choice on standard output too"),
    ),
    statuses={0: "every search has chosen", 1: "a search has not ended, or every one of its candidates failed"},
)
@click.argument("grid_file", metavar="GRID", type=click.Path(path_type=Path), shell_complete=grid_files)
@set_option("Replace a key in every cell; what is chosen then is printed and not written into the file.")
@data_dir_option
@click.option(
    "--results", default=None, type=Folder(),
    help="Where candidates and searches are stored. [default: runs/<grid name>_search]",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print searches, tries and an estimate, and stop.")
@click.option("--print", "only_print", is_flag=True, help="Print what was chosen; leave the grid file as it is.")
@click.option("--retry-failed", is_flag=True, help="Run failed candidates again too.")
@ray_options
@json_option
def search(
    grid_file: Path,
    settings: tuple[str, ...],
    data_dir: str | None,
    results: str | None,
    dry_run: bool,
    only_print: bool,
    retry_failed: bool,
    workers_per_trial: int | None,
    max_concurrent: int | None,
    ray_address: str | None,
    as_json: bool,
) -> None:
    """Choose lr and eps of a grid's cells by its section 'search', and write them into the grid file.

    Every optimizer gets the same budget of forward passes, on held-out training data of the first task. Candidates that have
    been run are not run again.
    """
    from zeroflow.grid.plan import check_results, make_plan
    from zeroflow.grid.search_plan import plan_search
    from zeroflow.results.store import Store
    from zeroflow.sweep.driver import run_sweep

    say = partial(click.echo, err=as_json)
    grid, folder = open_grid(grid_file, settings, data_dir)
    wanted = plan_search(grid, folder)
    candidates = wanted.candidates
    store = Store(_root(results, candidates.name))
    plan = make_plan(candidates, store, folder)
    say(wanted.describe())
    say(plan.describe(folder))
    cells = plan.runnable(retry_failed)
    placement = _placed(grid, workers_per_trial, max_concurrent)
    _check_backbones(cells, placement, ray_address)
    if dry_run:
        return
    stopped = None
    if cells:
        check_results(store, len(cells), folder)
        say(f"results: {store.root}")
        end = run_sweep(cells, store, placement, name=candidates.name, data_dir=folder, address=ray_address, echo=say)
        stopped = end.stopped
    _conclude(wanted, store, stopped, grid_file, only_print or bool(settings), as_json, say)


def _conclude(
    wanted: SearchPlan,
    store: Store,
    stopped: str | None,
    grid_file: Path,
    only_print: bool,
    as_json: bool,
    say: Callable[[str], None],
) -> None:
    """Choose among what has been run, store and write what was chosen, and end with the status that says how it went."""
    from zeroflow.grid.search_selection import outcomes, write
    from zeroflow.grid.search_writeback import render
    from zeroflow.results.searches import render_searches, search_rows

    ended = outcomes(wanted, store)
    write(ended, store)
    if ended:
        say("\n" + render_searches(search_rows(row for outcome in ended for row in outcome.rows)))
    rules = [outcome.rule for outcome in ended if outcome.chosen]
    if rules and (only_print):
        say(render(rules))
    elif rules:
        _write_chosen(grid_file, rules, say)
    if stopped:
        click.echo(f"the search was stopped: {stopped}; the same command goes on from here", err=True)
    for outcome in ended:
        if not outcome.chosen:
            click.echo(failed(f"nothing chosen: {outcome.search.label}: every candidate failed"), err=True)
    waiting = sum(wanted.waiting.values())
    if as_json:
        unchosen = [outcome.search.label for outcome in ended if not outcome.chosen]
        found = {"results": store.root, "grid": str(grid_file), "chosen": rules, "failed": unchosen}
        click.echo(
            json.dumps({**found, "searches": len(wanted.searches), "waiting": waiting, "stopped": stopped}, indent=1)
        )
    say(f"{len(rules)} of {len(wanted.searches)} searches have chosen; {waiting} cells wait for data")
    if stopped or len(rules) < len(wanted.searches):
        sys.exit(1)


def _write_chosen(grid_file: Path, rules: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
    """Write what was chosen into the grid file; print it where that cannot be done."""
    from zeroflow.grid.search_writeback import render, write_chosen

    try:
        changed = write_chosen(grid_file, rules)
    except ConfigError:
        say(render(rules))
        raise
    say(f"{grid_file}: {'chosen values written' if changed else 'holds the chosen values already'}")


def _placed(grid: Grid, workers_per_trial: int | None, max_concurrent: int | None) -> SweepPlacement:
    """The grid's placement, overridden by the command line."""
    import dataclasses

    return dataclasses.replace(
        grid.placement,
        forced={} if workers_per_trial is None else {"workers_per_trial": workers_per_trial},
        max_concurrent=max_concurrent or grid.placement.max_concurrent,
    )


def _check_backbones(cells: Sequence[TrialConfig], placement: SweepPlacement, address: str | None) -> None:
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
