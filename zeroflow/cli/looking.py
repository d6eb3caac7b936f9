"""The command that shows the input of models: look."""

from __future__ import annotations

from pathlib import Path

import click

from zeroflow.cli.command import Command, check_writable, data_dir_option, import_option, set_option
from zeroflow.cli.completion import grid_files
from zeroflow.cli.grids import open_grid
from zeroflow.cli.progress import Bar
from zeroflow.errors import ConfigError


@click.command(
    cls=Command,
    short_help="The images that a grid's models see.",
    examples=(
        ("zeroflow look sweeps/quick.yaml", "a page with a few images of every task"),
        ("zeroflow look my_grid.yaml --set dataset=folder:birds --output birds.png", "one picture, of one data set"),
    ),
)
@click.argument("grid_file", metavar="GRID", type=click.Path(path_type=Path), shell_complete=grid_files)
@click.option(
    "--output", "-o", default="look.html", type=click.Path(dir_okay=False, path_type=Path), help="A .html or .png file.",
)  # fmt: skip
@import_option
@set_option("Replace a key in every cell; VALUE is YAML, a list makes an axis (seed=[0,1]). May be repeated.")
@data_dir_option
def look(grid_file: Path, output: Path, settings: tuple[str, ...], data_dir: str | None) -> None:
    """Draw what the models of a grid see, before anything is run: images cropped and normalised, with their classes.

    For each data set, transform, image size and preprocessing of the grid: a few training and test images of every task, and
    the numbers that the model gets, smallest to largest. Data sets that are not here are left out and named.
    """
    from zeroflow.data import datasets
    from zeroflow.studies.look_sheet import FORMATS
    from zeroflow.studies.looks import looks

    if output.suffix.lower() not in FORMATS:
        raise ConfigError(f"--output {output}: expected a name that ends with {' or '.join(FORMATS)}")
    grid, folder = open_grid(grid_file, settings, data_dir)
    check_writable(output, "--output")
    lacking = {
        name: datasets.get(name).missing(Path(folder) if folder else None) for name in {c.dataset for c in grid.cells}
    }
    here = [config for config in grid.cells if not lacking[config.dataset]]
    waiting = [
        f"data set {name!r} is not here: missing {', '.join(map(str, paths))}. {datasets.get(name).where}"
        for name, paths in sorted(lacking.items())
        if paths
    ]
    if not here:
        raise ConfigError("\n".join(waiting))
    for line in waiting:
        click.echo(line, err=True)
    with Bar("look") as bar:
        found = list(looks(here, folder, bar))
    output.write_bytes(FORMATS[output.suffix.lower()](found))
    for one in found:
        click.echo("\n  ".join([one.title, *one.numbers()]))
    click.echo(f"written: {output}")
