"""The ``zeroflow`` command: plan, run, sweep, search, status, report, tables, efficiency, trajectories, list, download."""

from __future__ import annotations

import fnmatch
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zeroflow.errors import ConfigError

if TYPE_CHECKING:
    from zeroflow.results.store import Store
    from zeroflow.sweep.grid import Grid
    from zeroflow.sweep.placement import SweepPlacement

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_GRID = Path("sweeps/full_grid.yaml")


class Command(click.Command):
    """Turns a ``ConfigError`` into one message and exit status 2, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from None


class Commands(Command, click.Group):
    """The same for a group of commands."""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="zeroflow")
def main() -> None:
    """Learn a stream of tasks without backpropagation and without forgetting.

    \b
    zeroflow run --set method=ease --set optimizer=zo-sgd    one cell, here, without Ray
    zeroflow plan --grid sweeps/quick.yaml                   what a grid would run
    zeroflow sweep --grid sweeps/quick.yaml                  run what is missing, with Ray
    zeroflow search my_grid.yaml                          choose lr and eps with equal budgets
    zeroflow report runs/quick -o report.html             one page with tables and figures
    zeroflow tables runs/quick --format latex                the tables for a paper
    zeroflow efficiency                                      what a step of each optimizer costs here
    zeroflow trajectories                                    paths between two tasks' minima
    """


def grid_options(command: F) -> F:
    """The options that name a grid and a store."""
    for option in (
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE",
            help="Replace a key in every cell; VALUE is YAML, a list makes an axis (seed=[0,1]). May be repeated.",
        ),
        click.option(
            "--data-dir", envvar="ZEROFLOW_DATA", default=None,
            help="Folder of the data sets that are not embedded. [env: ZEROFLOW_DATA]",
        ),
        click.option(
            "--results", default=None, metavar="DIR_OR_URI",
            help="Where the Parquet store is: a folder or s3://... [default: runs/<grid name>]",
        ),
        click.option(
            "--grid", "grid_file", type=click.Path(path_type=Path), default=None,
            help=f"Grid file. [default: {DEFAULT_GRID}]",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def _open(grid_file: Path | None, settings: tuple[str, ...], data_dir: str | None) -> tuple[Grid, str | None]:
    from zeroflow.sweep.grid import load_grid, parse_override

    if grid_file is None:
        beside = Path(__file__).resolve().parent.parent / DEFAULT_GRID
        grid_file = beside if beside.exists() else DEFAULT_GRID
        if not grid_file.exists():
            raise ConfigError(
                f"no {DEFAULT_GRID} here, which only a checkout of zeroflow has; name a grid file with --grid"
            )
    grid = load_grid(grid_file, dict(parse_override(text) for text in settings))
    folder = data_dir or grid.data_dir
    return grid, None if folder is None else str(Path(folder).expanduser().absolute())


def _root(results: str | None, name: str) -> str:
    """Where the store is. In a job's uploaded copy a relative folder would vanish with the upload: the home keeps it."""
    root = results or f"runs/{name}"
    if "://" in root or "working_dir_files" not in Path.cwd().parts:
        return root
    return str(Path.home() / "zeroflow" / Path(root).expanduser())


@main.command()
@grid_options
@click.option("--cells", is_flag=True, help="List every missing cell.")
@click.option(
    "--price-per-hour", type=click.FloatRange(min=0), metavar="PRICE",
    help="Of one GPU, or of one CPU where cells use no GPU: adds what the missing cells cost.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
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

    from zeroflow.results.store import Store
    from zeroflow.sweep.plan import make_plan

    grid, folder = _open(grid_file, settings, data_dir)
    found = make_plan(grid, Store(_root(results, grid.name)), folder)
    if as_json:
        parts = {"done": found.done, "failed": found.failed, "missing": found.missing}
        ids = {name: [config.cell_id for config in part] for name, part in parts.items()}
        waiting = {name: [config.cell_id for config in part] for name, part in found.unavailable.items()}
        cost = None if price_per_hour is None else found.estimate.cost(price_per_hour)
        estimate = {**dataclasses.asdict(found.estimate), "price_per_hour": price_per_hour, "cost": cost}
        whole = {**ids, "unavailable": waiting, "seconds": found.seconds, "estimate": estimate}
        click.echo(json.dumps(whole, indent=1))
    else:
        click.echo(found.describe(folder, cells=cells, price_per_hour=price_per_hour))


@main.command(cls=Command)
@grid_options
@click.option("--dry-run", is_flag=True, help="Print the plan with every missing cell, and stop.")
@click.option("--retry-failed", is_flag=True, help="Run failed cells again too.")
@click.option("--workers-per-trial", type=click.IntRange(min=1), help="Processes that share a cell's queries.")
@click.option("--max-concurrent", type=click.IntRange(min=1), help="Cells at a time. [default: as many as fit]")
@click.option("--ray-address", help="A running Ray: an address or 'auto'. [default: RAY_ADDRESS, else a new local one]")
@click.option("--report/--no-report", default=True, help="Write report.html into the results at the end.")
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
) -> None:
    """Run the cells of a grid that are not done yet, with Ray Tune and Ray Train, into a Parquet store.

    Ends with status 0 only if every cell that can run here is done.
    """
    from zeroflow.models.backbone import check_buildable
    from zeroflow.results.report import write_report
    from zeroflow.results.store import Store
    from zeroflow.results.tables import render_text, summary
    from zeroflow.sweep.driver import run_sweep
    from zeroflow.sweep.plan import check_data, make_plan

    started = time.monotonic()
    grid, folder = _open(grid_file, settings, data_dir)
    store = Store(_root(results, grid.name))
    found = make_plan(grid, store, folder)
    click.echo(found.describe(folder, cells=dry_run))
    cells = found.runnable(retry_failed)
    for config in cells:
        check_buildable(config.backbone, config.checkpoint, config.image_size)
    if dry_run:
        return
    placement = _placed(grid, workers_per_trial, max_concurrent)
    check_data(cells, folder, placement)
    stopped = None
    if cells:
        click.echo(f"results: {store.root}")
        end = run_sweep(cells, store, placement, name=grid.name, data_dir=folder, address=ray_address, echo=click.echo)
        stopped = end.stopped
    click.echo("\n" + render_text(summary(_rows_of(grid, store))))
    if report and "://" not in store.root and store.done():
        try:
            click.echo(f"\nreport: {write_report(store.root, Path(store.root) / 'report.html')}")
        except OSError as error:
            click.echo(f"\nno report: {error.strerror}", err=True)
    left = make_plan(grid, store, folder)
    absent = sum(len(c) for c in left.unavailable.values())
    if stopped:
        click.echo(f"the sweep was stopped: {stopped}; the same command goes on from here", err=True)
    click.echo(
        f"{len(left.done)} of {len(grid.cells)} cells done, {len(left.failed)} failed, {len(left.missing)} missing, "
        f"{absent} without their data set; {time.monotonic() - started:.0f} s"
    )
    if stopped or left.failed or left.missing:
        for config in left.failed:
            click.echo(f"failed: {config.cell_id} {config.label()} (--retry-failed runs it again)", err=True)
        sys.exit(1)


@main.command()
@click.argument("grid_file", metavar="GRID", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a key in every cell; what is chosen then is printed and not written into the file.",
)
@click.option("--data-dir", envvar="ZEROFLOW_DATA", default=None, help="Folder of the data sets. [env: ZEROFLOW_DATA]")
@click.option(
    "--results",
    default=None,
    metavar="DIR_OR_URI",
    help="Where candidates and searches are stored. [default: runs/<grid name>_search]",
)
@click.option("--dry-run", is_flag=True, help="Print searches, tries and an estimate, and stop.")
@click.option("--print", "only_print", is_flag=True, help="Print what was chosen; leave the grid file as it is.")
@click.option("--retry-failed", is_flag=True, help="Run failed candidates again too.")
@click.option("--workers-per-trial", type=click.IntRange(min=1), help="Processes that share a cell's queries.")
@click.option("--max-concurrent", type=click.IntRange(min=1), help="Cells at a time. [default: as many as fit]")
@click.option("--ray-address", help="A running Ray: an address or 'auto'. [default: RAY_ADDRESS, else a new local one]")
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
) -> None:
    """Choose lr and eps of a grid's cells by its section 'search', and write them into the grid file.

    Every optimizer gets the same budget of forward passes, on held-out training data of the first task. Candidates that have
    been run are not run again. Ends with status 0 only if every search has ended and chosen.
    """
    from zeroflow.models.backbone import check_buildable
    from zeroflow.results.searches import render_searches, search_rows
    from zeroflow.results.store import Store
    from zeroflow.sweep.candidates import plan_search
    from zeroflow.sweep.choice import outcomes, write
    from zeroflow.sweep.chosen import render, write_chosen
    from zeroflow.sweep.driver import run_sweep
    from zeroflow.sweep.plan import make_plan

    grid, folder = _open(grid_file, settings, data_dir)
    wanted = plan_search(grid, folder)
    candidates = wanted.candidates
    store = Store(_root(results, candidates.name))
    found = make_plan(candidates, store, folder)
    click.echo(wanted.describe())
    click.echo(found.describe(folder))
    cells = found.runnable(retry_failed)
    for config in cells:
        check_buildable(config.backbone, config.checkpoint, config.image_size)
    if dry_run:
        return
    stopped = None
    if cells:
        click.echo(f"results: {store.root}")
        placement = _placed(grid, workers_per_trial, max_concurrent)
        stopped = run_sweep(
            cells, store, placement, name=candidates.name, data_dir=folder, address=ray_address, echo=click.echo
        ).stopped
    ended = outcomes(wanted, store)
    write(ended, store)
    if ended:
        click.echo("\n" + render_searches(search_rows(row for outcome in ended for row in outcome.rows)))
    rules = [outcome.rule for outcome in ended if outcome.chosen]
    if rules and (only_print or settings):
        click.echo(render(rules))
    elif rules:
        try:
            changed = write_chosen(grid_file, rules)
        except ConfigError:
            click.echo(render(rules))
            raise
        click.echo(f"{grid_file}: {'chosen values written' if changed else 'holds the chosen values already'}")
    if stopped:
        click.echo(f"the search was stopped: {stopped}; the same command goes on from here", err=True)
    for outcome in ended:
        if not outcome.chosen:
            click.echo(f"nothing chosen: {outcome.search.label}: every candidate failed", err=True)
    click.echo(
        f"{len(rules)} of {len(wanted.searches)} searches have chosen; {sum(wanted.waiting.values())} cells wait for data"
    )
    if stopped or len(rules) < len(wanted.searches):
        sys.exit(1)


def _placed(grid: Grid, workers_per_trial: int | None, max_concurrent: int | None) -> SweepPlacement:
    """The grid's placement with what the command line says."""
    import dataclasses

    return dataclasses.replace(
        grid.placement,
        forced={} if workers_per_trial is None else {"workers_per_trial": workers_per_trial},
        max_concurrent=max_concurrent or grid.placement.max_concurrent,
    )


def _rows_of(grid: Grid, store: Store) -> Any:
    """The store's trials that belong to this grid."""
    import pyarrow as pa
    import pyarrow.compute as pc

    trials = store.load("trials")
    return trials.filter(pc.is_in(trials["cell_id"], pa.array([config.cell_id for config in grid.cells])))


@main.command()
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A key of the cell; VALUE is YAML.")
@click.option("--data-dir", envvar="ZEROFLOW_DATA", default=None, help="Folder of the data sets. [env: ZEROFLOW_DATA]")
@click.option("--results", default=None, metavar="DIR_OR_URI", help="Also write the result into this store.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def run(
    settings: tuple[str, ...], data_dir: str | None, results: str | None, device: str, threads: int, as_json: bool
) -> None:
    """Run one cell in this process, without Ray.

    Example: zeroflow run --set method=ease --set optimizer=zo-sgd --set epochs=1
    """
    from zeroflow.optim import NonFiniteLoss
    from zeroflow.results import records
    from zeroflow.results.store import Store
    from zeroflow.sweep.grid import merge_overrides, parse_override
    from zeroflow.trial.config import TrialConfig
    from zeroflow.trial.loop import Placement, run_trial
    from zeroflow.trial.metrics import stage_accuracy

    config = TrialConfig.from_dict(merge_overrides(parse_override(text) for text in settings), where="--set")

    def progress(stage: int, accuracy: Any, samples: Any) -> None:
        if not as_json:
            seen = stage_accuracy(accuracy[: stage + 1, : stage + 1], samples[: stage + 1])[-1]
            click.echo(f"stage {stage + 1}/{len(samples)}: {seen:.2f} % of all classes seen so far")

    store = Store(results) if results else None
    if store:
        store.check_writable()
    try:
        result = run_trial(config, Placement(data_dir, device, threads), on_stage=progress)
    except NonFiniteLoss as error:
        raise click.ClickException(f"training diverged: {error}") from None
    if store:
        store.write(records.tables(result))
    if as_json:
        click.echo(json.dumps({"cell_id": result.cell_id, "config": config.canonical(), **result.summary}, indent=1))
        return
    click.echo(f"cell {result.cell_id}: {config.label()}")
    for name, value in result.summary.items():
        click.echo(f"  {name:24} {value if not isinstance(value, float) else f'{value:.4g}'}")


@main.command()
@click.argument("results", nargs=-1, required=True)
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), default=Path("report.html"), show_default=True
)
@click.option("--efficiency", type=click.Path(path_type=Path), help="What 'zeroflow efficiency --json' wrote: Table 2.")
def report(results: tuple[str, ...], output: Path, efficiency: Path | None) -> None:
    """Make one self-contained HTML page of the tables and figures of a store, or of several stores together."""
    from zeroflow.results.report import write_report

    click.echo(write_report([_existing(each) for each in results], output, efficiency=efficiency))


@main.command()
@click.argument("results", nargs=-1, required=True)
@click.option("--table", "names", multiple=True, metavar="NAME", help="Only this one. May be repeated.")
@click.option(
    "--format", "format_", type=click.Choice(["text", "markdown", "latex", "csv"]), default="text", show_default=True
)
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="A file in place of the terminal."
)
def tables(results: tuple[str, ...], names: tuple[str, ...], format_: str, output: Path | None) -> None:
    """Print the tables of a store, or of several stores together, for a paper, a page or a program.

    The best value of a column is bold, the second best underlined. CSV holds one table: name it with --table.

    Example: zeroflow tables runs/quick --table summary --format latex -o table.tex
    """
    from zeroflow.errors import unknown
    from zeroflow.results.report import read
    from zeroflow.results.sheets import render, sheets
    from zeroflow.results.store import write_atomically

    tables = read(*(_existing(each) for each in results)).tables
    if not len(tables["trials"]):
        raise ConfigError(f"results {', '.join(results)}: no finished cell, {len(tables['failures'])} failed")
    found = {sheet.name: sheet for sheet in sheets(tables)}
    for name in names:
        if name not in found:
            raise unknown("table", name, found)
    chosen = [found[name] for name in names or found]
    if format_ == "csv" and len(chosen) > 1:
        raise ConfigError(f"--format csv: holds one table; name it with --table: {', '.join(found)}")
    text = render(chosen, format_)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_atomically(output, text.encode())
        click.echo(f"written: {output}")


def _existing(results: str) -> Store:
    """A store; a folder that is not there is a slip of the pen, not an empty store."""
    from zeroflow.results.store import Store

    store = Store(results)
    if "://" not in store.root and not Path(store.root).is_dir():
        raise ConfigError(f"results {store.root!r}: no such folder")
    return store


@main.command()
@click.argument("results")
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Of one GPU, or of one CPU for cells without.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def status(results: str, price_per_hour: float | None, as_json: bool) -> None:
    """Show how far the sweeps on a store are, what it holds, and what failed. Also while they run, from anywhere."""
    from zeroflow.results.tables import render_text, summary
    from zeroflow.sweep.status import running_sweeps

    store = _existing(results)
    trials, failures, running = store.load("trials"), store.failed(), running_sweeps(store)
    if as_json:
        whole = {
            "done": trials["cell_id"].to_pylist(),
            "failed": sorted(failures),
            "sweeps": [
                {**found.record, "missing": [config.cell_id for config in found.plan.missing]} for found in running
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
        click.echo(f"failed: {cell_id} {failure['label']}: {failure['message']}")


@main.command()
@click.option("--backbone", default="vit_base_patch16_224.augreg_in21k", show_default=True, help="Random weights.")
@click.option("--image-size", type=click.IntRange(min=1), help="Pixels. [default: the backbone's own]")
@click.option("--batch-size", default=48, show_default=True, type=click.IntRange(min=1), help="Images of a step.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="CPU threads.")
@click.option(
    "--optimizers",
    "names",
    metavar="NAME[:QUERIES],...",
    help="What is measured. [default: the rows of the paper's Table 2]",
)
@click.option("--steps", default=10, show_default=True, type=click.IntRange(min=1), help="Timed steps of each.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Also write it all into a file.")
def efficiency(
    backbone: str,
    image_size: int | None,
    batch_size: int,
    device: str,
    threads: int,
    names: str | None,
    steps: int,
    file: Path | None,
) -> None:
    """Measure what a step of each optimizer costs here: the paper's Table 2. Needs no data set and no Ray.

    EASE's adapters on random images, by default in a ViT-B/16 with mini-batches of 48: peak memory, seconds, forward passes.
    Published ratios stand beside the measured ones.
    """
    from zeroflow.results import published
    from zeroflow.trial.efficiency import PAPER, Setting, measure, parse_optimizers

    setting = Setting(backbone, image_size, batch_size, steps=steps, device=device, threads=threads)
    candidates = parse_optimizers(names) if names else PAPER
    if file:
        _writable(file)
    result = measure(setting, candidates, lambda what: click.echo(what, err=True))
    options = [f"--backbone {backbone}", f"--batch-size {batch_size}", f"--device {device}", f"--threads {threads}"]
    options += [f"--image-size {image_size}"] if image_size else []
    options += [f"--optimizers {names.replace(' ', '')}"] if names else []
    result = {"command": " ".join(["zeroflow efficiency", *options, f"--steps {steps}"]), **result}
    for line in published.render_efficiency(result):
        click.echo(line)
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"written: {file}")


@main.command()
@click.option(
    "--grid",
    "grid_file",
    type=click.Path(path_type=Path),
    help="Cells of method finetune whose paths are followed on an adapter's landscape. [default: two parameters only]",
)
@click.option("--data-dir", envvar="ZEROFLOW_DATA", default=None, help="Folder of the data sets. [env: ZEROFLOW_DATA]")
@click.option(
    "--results", default="runs/trajectories", show_default=True, metavar="DIR_OR_URI", help="Where the store is."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="CPU threads.")
def trajectories(grid_file: Path | None, data_dir: str | None, results: str, device: str, threads: int) -> None:
    """Follow optimizers between an old task's minimum and a new one's: the paper's Figures 3 and 6.

    The nine optimizers on a problem of two parameters with known minima; with a grid, its cells' optimizers on the values of one
    adapter too, shown on the plane through the start and both tasks' optima, with both losses on that plane.

    Example: zeroflow trajectories --grid sweeps/figure6_quickdraw.yaml
    """
    from zeroflow.results import records
    from zeroflow.results.store import Store
    from zeroflow.trial.landscapes import TwoParameters, check_cells
    from zeroflow.trial.loop import Placement
    from zeroflow.trial.trajectories import NINE, adapter_study, study

    store = Store(results)
    grid, folder = _open(grid_file, (), data_dir) if grid_file else (None, data_dir)
    if grid:
        check_cells(grid.cells)
    store.check_writable()

    def tell(what: str) -> None:
        click.echo(what, err=True)

    found = [study(TwoParameters(), NINE, tell)]
    if grid:
        found.append(adapter_study(grid.cells, Placement(data_dir=folder, device=device, threads=threads), tell))
    for one in found:
        store.write_landscape(*records.landscape(one))
        click.echo(f"{one.landscape}: {len(one.looks)} looks, {len(one.surface)} points of the surface")
    click.echo(f"results: {store.root}")


def _writable(file: Path) -> None:
    """Refuse, before hours of work, a file that could not be written after it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json {file}: cannot be written: {error.strerror}") from None


@main.command("list")
@click.argument("kind", type=click.Choice(["optimizers", "methods", "datasets", "transforms"]))
@click.argument("pattern", default="*")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def list_(kind: str, pattern: str, as_json: bool) -> None:
    """List what a grid may name, with a line on each; PATTERN is shell-style, e.g. 'zo-*'."""
    from zeroflow import data, methods, optim

    registry: Any = {
        "optimizers": optim.optimizers, "methods": methods.methods, "datasets": data.datasets,
        "transforms": data.transforms,
    }[kind]  # fmt: skip
    families = fnmatch.filter((f"{prefix}:NAME" for prefix in registry.families), pattern)
    entries = {name: registry.get(name).description for name in [*registry.names(pattern), *families]}
    if as_json:
        click.echo(json.dumps(entries, indent=1))
        return
    for name, description in entries.items():
        extra = ""
        if kind == "optimizers":
            info = optim.optimizers.get(name)
            extra = f"  [forward passes a step: {info.cost}]"
        click.echo(f"{name:18} {description}{extra}")


@main.command()
@click.argument("dataset")
@click.option("--data-dir", envvar="ZEROFLOW_DATA", required=True, help="Where it belongs. [env: ZEROFLOW_DATA]")
@click.option(
    "--archive",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The archive, if it is here already.",
)
def download(dataset: str, data_dir: str, archive: Path | None) -> None:
    """Fetch a data set's published archive, check its md5 and unpack it in the folder of the data sets.

    Example: zeroflow download cifar100 --data-dir ~/data
    """
    from zeroflow.data import datasets
    from zeroflow.data.archives import obtain

    info, root = datasets.get(dataset), Path(data_dir).expanduser()
    if not info.missing(root):
        click.echo(f"{dataset}: is here already")
        return
    if info.archive is None:
        raise ConfigError(f"{dataset}: has no published archive. {info.where}")
    click.echo(obtain(info.archive, root, archive))


if __name__ == "__main__":
    main()
