"""The command that chooses lr, eps and options: search."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zeroflow.cli.command import Command, Folder, data_dir_option, failed, import_option, json_option, set_option
from zeroflow.cli.completion import grid_files
from zeroflow.cli.grids import check_backbones, open_grid, placed, ray_options, results_root
from zeroflow.errors import ConfigError

if TYPE_CHECKING:
    from zeroflow.grid.search_plan import SearchPlan
    from zeroflow.results.store import Store


@click.command(
    cls=Command,
    short_help="Choose lr, eps, options with equal budgets.",
    examples=(
        ("zeroflow search my_grid.yaml --dry-run", "what would be tried"),
        ("zeroflow search my_grid.yaml", "try it, and write what was chosen into the file"),
        ("zeroflow search my_grid.yaml --json > chosen.json", "the choice on standard output too"),
    ),
    statuses={0: "every search has chosen", 1: "a search has not ended, or every one of its candidates failed"},
)
@click.argument("grid_file", metavar="GRID", type=click.Path(path_type=Path), shell_complete=grid_files)
@import_option
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
    """Choose lr, eps and options of a grid's cells by its section 'search', and write them into the grid file.

    Every optimizer gets the same budget of forward passes, on held-out training data of the first task. Candidates that have
    been run are not run again.
    """
    from zeroflow.grid.plan import check_results, make_plan
    from zeroflow.grid.search_plan import plan_search
    from zeroflow.grid.search_writeback import changed_by
    from zeroflow.results.store import Store
    from zeroflow.sweep.driver import run_sweep

    say = partial(click.echo, err=as_json)
    grid, folder = open_grid(grid_file, settings, data_dir)
    grid = placed(grid, workers_per_trial, max_concurrent)
    wanted = plan_search(grid, folder)
    candidates = wanted.candidates
    store = Store(results_root(results, candidates.name))
    plan = make_plan(candidates, store, folder, retry_failed=retry_failed)
    say(wanted.describe())
    say(plan.describe(folder))
    cells, placement = plan.runnable, candidates.placement
    check_backbones(cells, placement, ray_address)
    if wanted.searches and not (only_print or settings):
        for rules in wanted.extremes():
            changed_by(grid_file, rules)
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
