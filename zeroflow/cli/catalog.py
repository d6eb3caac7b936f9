"""Commands on what there is: list, download."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import click

from zeroflow.cli import completion
from zeroflow.cli.command import Choice, Command, json_option
from zeroflow.cli.progress import Bar
from zeroflow.errors import ConfigError, unknown


@click.command(
    "list",
    cls=Command,
    short_help="What a grid may name.",
    examples=(
        ("zeroflow list methods", "all of a kind"),
        ("zeroflow list optimizers 'zo-*'", "those that a pattern fits"),
        ("zeroflow list datasets --json | jq keys", "for a script"),
    ),
)
@click.argument("kind", type=Choice("kind", completion.REGISTRIES))
@click.argument("pattern", default="*", shell_complete=completion.names_of_kind)
@json_option
def list_(kind: str, pattern: str, as_json: bool) -> None:
    """List what a grid may name, with a line on each; PATTERN is shell-style, e.g. 'zo-*'."""
    registry = completion.registry(kind)
    families = fnmatch.filter((f"{prefix}:NAME" for prefix in registry.families), pattern)
    entries = {name: registry.get(name).description for name in [*registry.names(pattern), *families]}
    if not entries and not set("*?[") & set(pattern):
        raise unknown(registry.kind, pattern, registry.names())
    if as_json:
        click.echo(json.dumps(entries, indent=1))
        return
    for name, description in entries.items():
        extra = ""
        if kind == "optimizers":
            info = registry.get(name)
            extra = f"  [forward passes a step: {info.cost}]"
        click.echo(f"{name:18} {description}{extra}")


@click.command(
    cls=Command,
    short_help="Fetch the archive of a data set.",
    examples=(
        ("zeroflow download cifar100 --data-dir ~/data", "fetch it"),
        ("zeroflow download cub --data-dir ~/data --archive ~/cub.zip", "an archive that is here already"),
    ),
)
@click.argument("dataset", shell_complete=completion.datasets)
@click.option(
    "--data-dir", envvar="ZEROFLOW_DATA", required=True, type=click.Path(file_okay=False),
    help="Where it belongs. [env: ZEROFLOW_DATA]",
)  # fmt: skip
@click.option(
    "--archive",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The archive, if it is here already.",
)
def download(dataset: str, data_dir: str, archive: Path | None) -> None:
    """Fetch a data set's published archive, check its md5 and unpack it in the folder of the data sets."""
    from zeroflow.data import datasets
    from zeroflow.data.archives import obtain

    info, root = datasets.get(dataset), Path(data_dir).expanduser()
    if not info.missing(root):
        click.echo(f"{dataset}: is here already")
        return
    if info.archive is None:
        raise ConfigError(f"{dataset}: has no published archive. {info.where}")
    with Bar(f"download {dataset}", "B") as bar:
        click.echo(obtain(info.archive, root, archive, bar))
