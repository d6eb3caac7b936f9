"""Commands on stores of results: status, report, tables, merge, pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zeroflow.cli import completion
from zeroflow.cli.command import Choice, Command, Folder, check_writable, failed, json_option, price_option
from zeroflow.cli.progress import Bar
from zeroflow.errors import ConfigError

if TYPE_CHECKING:
    from zeroflow.results.store import Store


def _existing(results: str) -> Store:
    """Open a store; refuse a folder that is missing or that contains stores, which is a typing error and no empty store."""
    from zeroflow.results.store import Store

    store = Store(results)
    if "://" in store.root:
        return store
    if not Path(store.root).is_dir():
        raise ConfigError(f"results {store.root!r}: no such folder")
    inside = sorted(folder.parent.name for folder in Path(store.root).glob("*/trials"))
    if inside and not Path(store.root, "trials").is_dir():
        raise ConfigError(
            f"results {store.root!r}: no store but a folder of stores; expected one of: {', '.join(inside)}"
        )
    return store


@click.command(
    cls=Command,
    short_help="How far sweeps are, and what failed.",
    examples=(
        ("zeroflow status runs/quick", "also while a sweep runs, from another terminal"),
        ("zeroflow status runs/quick --json | jq '.failed'", "for a script"),
    ),
)
@click.argument("results", type=Folder())
@price_option
@json_option
def status(results: str, price_per_hour: float | None, as_json: bool) -> None:
    """Show how far the sweeps on a store are, what it holds, and what failed. Also while they run, from anywhere."""
    from zeroflow.results.summary import render_text, summary
    from zeroflow.sweep.status import running_sweeps

    store = _existing(results)
    trials, failures, running = store.load("trials"), store.failed(), running_sweeps(store)
    if as_json:
        whole = {
            "done": trials["cell_id"].to_pylist(),
            "failed": sorted(failures),
            "sweeps": [
                {
                    **found.record,
                    "running": found.running,
                    "missing": [config.cell_id for config in found.plan.missing],
                }
                for found in running
            ],
        }
        click.echo(json.dumps(whole, indent=1))
        return
    for found in running:
        click.echo(found.describe(price_per_hour))
    click.echo(f"{store.root}: {trials.num_rows} cells done, {len(failures)} failed")
    if trials.num_rows:
        click.echo(render_text(summary(trials)))
    for cell_id, failure in failures.items():
        click.echo(failed(f"failed: {cell_id} {failure['label']}: {failure['message']}"))


@click.command(
    cls=Command,
    short_help="One HTML page of tables and figures.",
    examples=(
        ("zeroflow report runs/quick", "report.html here"),
        ("zeroflow report runs/quick runs/trajectories -o quick.html", "several stores on one page"),
    ),
)
@click.argument("results", nargs=-1, required=True, type=Folder())
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), default=Path("report.html"), help="The page."
)
@click.option("--efficiency", type=click.Path(path_type=Path), help="What 'zeroflow efficiency --json' wrote: Table 2.")
def report(results: tuple[str, ...], output: Path, efficiency: Path | None) -> None:
    """Make one self-contained HTML page of the tables and figures of a store, or of several stores together.

    It opens without a network, and prints its path.
    """
    from zeroflow.results.report import write_report

    stores = [_existing(each) for each in results]
    check_writable(output, "--output")
    with Bar("report") as bar:
        click.echo(write_report(stores, output, efficiency=efficiency, on_progress=bar))


@click.command(
    cls=Command,
    short_help="Tables for a paper, a page, a program.",
    examples=(
        ("zeroflow tables runs/quick --table summary --format latex -o table.tex", "a table of a paper"),
        ("zeroflow tables runs/quick --table cells --format csv", "a line per cell"),
        ("zeroflow tables runs/quick --json | jq '.[0].lines[0]'", "for a script"),
    ),
)
@click.argument("results", nargs=-1, required=True, type=Folder())
@click.option(
    "--table", "names", multiple=True, metavar="NAME", help="Only this one. May be repeated.",
    shell_complete=completion.tables,
)  # fmt: skip
@click.option(
    "--format", "format_", type=Choice("format", ["text", "markdown", "latex", "csv", "json"]), default="text",
    help="Of the output.",
)  # fmt: skip
@click.option("--json", "format_", flag_value="json", help="The same as --format json.")
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="A file in place of the terminal."
)
def tables(results: tuple[str, ...], names: tuple[str, ...], format_: str, output: Path | None) -> None:
    """Print the tables of a store, or of several stores together, for a paper, a page or a program.

    The best value of a column is bold, the second best underlined. CSV holds one table: name it with --table.
    """
    from zeroflow.durable import write_atomically
    from zeroflow.errors import unknown
    from zeroflow.results.rendering import as_values, render
    from zeroflow.results.report import read
    from zeroflow.results.tables import make_tables

    if output is not None:
        check_writable(output, "--output")
    with Bar("tables") as bar:
        whole = read(*(_existing(each) for each in results), on_progress=bar)
    tables = whole.tables
    for note in whole.notes:
        click.echo(f"note: {note}", err=True)
    if not len(tables["trials"]):
        raise ConfigError(f"results {', '.join(results)}: no finished cell, {len(tables['failures'])} failed")
    found = {table.name: table for table in make_tables(tables)}
    for name in names:
        if name in completion.TABLES and name not in found:
            raise ConfigError(f"table {name!r}: these results have nothing for it; they have {', '.join(found)}")
        if name not in found:
            raise unknown("table", name, found)
    chosen = [found[name] for name in names or found]
    if format_ == "csv" and len(chosen) > 1:
        raise ConfigError(f"--format csv: holds one table; name it with --table: {', '.join(found)}")
    if format_ == "json":
        text = json.dumps([as_values(table) for table in chosen], indent=1) + "\n"
    else:
        text = render(chosen, format_)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_atomically(output, text.encode())
        click.echo(f"written: {output}")


@click.command(
    cls=Command,
    short_help="One store out of several.",
    examples=(("zeroflow merge runs/all runs/here s3://bucket/there", "bring the work of two machines together"),),
)
@click.argument("target", type=Folder())
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=Folder())
@json_option
def merge(target: str, sources: tuple[str, ...], as_json: bool) -> None:
    """Copy into a store what it lacks of others: finished cells, searches, landscapes, failures.

    Nothing in TARGET is overwritten; it is made if it is not there. Where two stores have a cell its results must be equal, or
    nothing is copied and the message names the cell, the key and both values.
    """
    from zeroflow.results.merging import merge as merge_stores
    from zeroflow.results.store import Store

    into, others = Store(target), [_existing(each) for each in sources]
    with Bar("merge", "cell") as bar:
        added = merge_stores(into, *others, on_progress=bar)
    if as_json:
        click.echo(json.dumps({"results": into.root, "added": added, "done": len(into.done())}, indent=1))
    else:
        click.echo(f"{into.root}: {added} cells added, {len(into.done())} done")


@click.command(
    cls=Command,
    short_help="One file for each table of a store.",
    examples=(
        ("zeroflow pack runs/full", "thousands of small files become a handful"),
        ("zeroflow pack s3://bucket/full", "loading takes a few requests then"),
    ),
)
@click.argument("results", type=Folder())
@json_option
def pack(results: str, as_json: bool) -> None:
    """Write the rows of a store's many small Parquet files into one for each table, and remove those that it holds.

    Everything reads as before; a sweep goes on from a packed store, and packing again takes in what it added. Refused while
    a sweep is at work on the store.
    """
    from zeroflow.results.packing import pack as pack_store

    store = _existing(results)
    with Bar("pack", "table") as bar:
        packed = pack_store(store, on_progress=bar)
    if as_json:
        click.echo(json.dumps({"results": store.root, **vars(packed)}, indent=1))
    else:
        size = f"{packed.bytes / 2**20:.2f} MiB"
        click.echo(f"{store.root}: {packed.files} files packed into {size}, {packed.cells} cells done")
