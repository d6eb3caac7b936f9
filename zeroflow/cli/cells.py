"""Commands that compute in this process, without Ray: run, efficiency, trajectories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from zeroflow.cli.command import (
    Command,
    Folder,
    check_writable,
    data_dir_option,
    device_option,
    import_option,
    json_option,
    set_option,
    threads_option,
)
from zeroflow.cli.completion import grid_files, optimizers
from zeroflow.cli.grids import open_grid
from zeroflow.cli.progress import Bar


@click.command(
    cls=Command,
    short_help="Run one cell here, without Ray.",
    examples=(
        ("zeroflow run --set method=simplecil", "no training: half a minute"),
        ("zeroflow run --set method=ease --set optimizer=zo-sgd --set epochs=1", "trained by forward passes alone"),
        ("zeroflow run --set method=ease --results runs/mine --json | jq .avg", "kept in a store, and for a script"),
    ),
    statuses={1: "the training diverged, or a black box gave no answer"},
)
@import_option
@set_option("A key of the cell; VALUE is YAML. May be repeated.")
@data_dir_option
@click.option("--results", default=None, type=Folder(), help="Also write the result into this store.")
@device_option
@threads_option
@click.option(
    "--endpoint", metavar="URL|MODULE:NAME",
    help="Of a black box (access=black-box): the address of zeroflow serve, or a Python callable.",
)  # fmt: skip
@json_option
def run(
    settings: tuple[str, ...],
    data_dir: str | None,
    results: str | None,
    device: str,
    threads: int,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Run one cell in this process, without Ray."""
    from zeroflow import Placement, run_trial
    from zeroflow.grid.grid_file import merge_overrides, parse_override
    from zeroflow.grid.plan import check_imports, check_named_files, check_results
    from zeroflow.models.endpoint import EndpointError
    from zeroflow.optim import NonFiniteLoss
    from zeroflow.results import rows
    from zeroflow.results.store import Store
    from zeroflow.trial.checks import check_backbone_of
    from zeroflow.trial.config import TrialConfig
    from zeroflow.trial.metrics import stage_accuracy

    config = TrialConfig.from_dict(merge_overrides(parse_override(text) for text in settings), where="--set")

    def progress(stage: int, accuracy: Any, samples: Any) -> None:
        if not as_json:
            seen = stage_accuracy(accuracy[: stage + 1, : stage + 1], samples[: stage + 1])[-1]
            bar.echo(f"stage {stage + 1}/{len(samples)}: {seen:.2f} % of all classes seen so far")

    check_backbone_of(config)
    store = Store(results) if results else None
    if store:
        check_imports([config], store)
        check_named_files([config], store, data_dir)
        check_results(store, 1, data_dir)
        store.check_writable()
    bar = Bar("run")
    try:
        with bar:
            result = run_trial(
                config,
                Placement(data_dir, device, threads, endpoint=endpoint, results=store.root if store else None),
                on_stage=progress,
                on_progress=bar,
            )
    except NonFiniteLoss as error:
        raise click.ClickException(f"training diverged: {error}") from None
    except EndpointError as error:
        raise click.ClickException(str(error)) from None
    if store:
        store.write(rows.tables(result))
    if as_json:
        click.echo(json.dumps({"cell_id": result.cell_id, "config": config.canonical(), **result.summary}, indent=1))
        return
    click.echo(f"cell {result.cell_id}: {config.label()}")
    for name, value in result.summary.items():
        click.echo(f"  {name:24} {value if not isinstance(value, float) else f'{value:.4g}'}")


@click.command(
    cls=Command,
    short_help="What a step of each optimizer costs here.",
    examples=(
        ("zeroflow efficiency", "the rows of Table 2"),
        (
            "zeroflow efficiency --backbone quickdraw_vit --optimizers fo-sgd,zo-sgd,zo-sgd:4 --steps 3",
            "a small model, three rows",
        ),
        ("zeroflow efficiency --json table2.json", "keep it: zeroflow report --efficiency table2.json shows it"),
    ),
)
@click.option("--backbone", default="vit_base_patch16_224.augreg_in21k", help="Its architecture, with random weights.")
@click.option("--image-size", type=click.IntRange(min=1), help="Pixels. [default: the backbone's own]")
@click.option("--batch-size", default=48, type=click.IntRange(min=1), help="Images of a step.")
@device_option
@threads_option
@click.option(
    "--optimizers", "names", metavar="NAME[:QUERIES],...", shell_complete=optimizers,
    help="What is measured. [default: the rows of the paper's Table 2]",
)  # fmt: skip
@click.option("--steps", default=10, type=click.IntRange(min=1), help="Timed steps of each.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help="Also write it all into a file; -: JSON on standard output, and nothing else there.",
)  # fmt: skip
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
    from zeroflow.methods import methods
    from zeroflow.models.probe import check_tuning
    from zeroflow.results.efficiency import render_efficiency
    from zeroflow.studies.efficiency import PAPER, Setting, measure, parse_optimizers

    check_tuning(backbone, "none", image_size, None, "adapter", vars(methods.get("ease").parse({})))
    setting = Setting(backbone, image_size, batch_size, steps=steps, device=device, threads=threads)
    candidates = parse_optimizers(names) if names else PAPER
    if file and str(file) != "-":
        check_writable(file, "--json")
    with Bar("efficiency") as bar:
        result = measure(setting, candidates, bar)
    options = [f"--backbone {backbone}", f"--batch-size {batch_size}", f"--device {device}", f"--threads {threads}"]
    options += [f"--image-size {image_size}"] if image_size else []
    options += [f"--optimizers {names.replace(' ', '')}"] if names else []
    result = {"command": " ".join(["zeroflow efficiency", *options, f"--steps {steps}"]), **result}
    if str(file) == "-":
        click.echo(json.dumps(result, indent=1))
        return
    for line in render_efficiency(result):
        click.echo(line)
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"written: {file}")


@click.command(
    cls=Command,
    short_help="Paths between the minima of two tasks.",
    examples=(
        ("zeroflow trajectories", "a problem of two parameters, in seconds"),
        ("zeroflow trajectories --grid sweeps/figure6_quickdraw.yaml", "and the values of an adapter"),
        ("zeroflow report runs/trajectories", "the paths as figures and animations"),
    ),
)
@click.option(
    "--grid", "grid_file", type=click.Path(path_type=Path), shell_complete=grid_files,
    help="Cells of method finetune whose paths are followed on an adapter's landscape. [default: two parameters only]",
)  # fmt: skip
@data_dir_option
@click.option("--results", default="runs/trajectories", type=Folder(), help="Where the store is.")
@device_option
@threads_option
@json_option
def trajectories(
    grid_file: Path | None, data_dir: str | None, results: str, device: str, threads: int, as_json: bool
) -> None:
    """Follow optimizers between an old task's minimum and a new one's: the paper's Figures 3 and 6.

    The nine optimizers on a problem of two parameters with known minima; with a grid, its cells' optimizers on the values of one
    adapter too, shown on the plane through the start and both tasks' optima, with both losses on that plane.
    """
    from zeroflow import Placement
    from zeroflow.results import rows
    from zeroflow.results.store import Store
    from zeroflow.studies.landscapes import TwoParameters, check_cells
    from zeroflow.studies.trajectories import NINE, Study, adapter_study, study

    store = Store(results)
    grid, folder = open_grid(grid_file, (), data_dir) if grid_file else (None, data_dir)
    if grid:
        check_cells(grid.cells)
    store.check_writable()

    found = []

    def keep(one: Study) -> None:
        store.write_landscape(*rows.landscape(one))
        found.append(one)

    with Bar("trajectories") as bar:
        keep(study(TwoParameters(), NINE, bar))
        if grid:
            keep(adapter_study(grid.cells, Placement(data_dir=folder, device=device, threads=threads), bar))
    if as_json:
        landscapes = [
            {"landscape": f.landscape, "landscape_id": f.landscape_id, "looks": len(f.looks), "surface": len(f.surface)}
            for f in found
        ]
        click.echo(json.dumps({"results": store.root, "landscapes": landscapes}, indent=1))
        return
    for one in found:
        click.echo(f"{one.landscape}: {len(one.looks)} looks, {len(one.surface)} points of the surface")
    click.echo(f"results: {store.root}")
