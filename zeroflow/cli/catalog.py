"""Commands for what is available: list, download."""

from __future__ import annotations

import fnmatch
import json
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zeroflow.cli import completion
from zeroflow.cli.command import Choice, Command, import_option, json_option
from zeroflow.cli.progress import Bar
from zeroflow.errors import ConfigError, unknown

if TYPE_CHECKING:
    from zeroflow.models.listing import ListedBackbone


@click.command(
    "list",
    cls=Command,
    short_help="What a grid may name.",
    examples=(
        ("zeroflow list methods", "all of a kind"),
        ("zeroflow list optimizers 'zo-*'", "those that a pattern fits"),
        ("zeroflow list backbones 'convnext_*'", "timm's too: size, images, tunings, weights that are here"),
        ("zeroflow list datasets --json | jq keys", "for a script"),
    ),
)
@click.argument("kind", type=Choice("kind", (*completion.REGISTRIES, completion.BACKBONES)))
@click.argument("pattern", required=False, shell_complete=completion.names_of_kind)
@import_option
@json_option
def list_(kind: str, pattern: str | None, as_json: bool) -> None:
    """List what a grid may name, with a line on each; PATTERN is shell-style, e.g. 'zo-*'."""
    if kind == completion.BACKBONES:
        _list_backbones(pattern, as_json)
        return
    pattern = pattern or "*"
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


def _list_backbones(pattern: str | None, as_json: bool) -> None:
    from zeroflow.models.listing import list_backbones, timm_counts

    found = list_backbones(pattern)
    if as_json:
        click.echo(json.dumps({backbone.name: backbone.as_json() for backbone in found}, indent=1))
    else:
        for backbone in found:
            click.echo(_described(backbone))
    if pattern is None:
        architectures, weights = timm_counts()
        click.echo(
            f"and {architectures:,} architectures of timm with {weights:,} pretrained weights: name a pattern, e.g. "
            "zeroflow list backbones 'convnext_*'",
            err=as_json,
        )


def _described(backbone: ListedBackbone) -> str:
    """A line on the architecture, and the tags of its weights below."""
    from zeroflow.models.tuning import tunings

    like = backbone.anatomy
    if like is None:
        line = f"{backbone.name:32} cannot be built here: {backbone.problem}"
    else:
        lacking = [name for name in tunings.names() if name not in like.tunings]
        able = f"all tunings but {', '.join(lacking)}" if lacking else "all tunings"
        if len(lacking) > len(like.tunings):
            able = f"tunings {', '.join(like.tunings)}"
        size = f"{like.parameters / 1e6:.1f}M"
        line = f"{backbone.name:32} {size:>8} parameters, width {like.width:5}, {like.image_size:4} px, {able}"
    tags = []
    for name, weights in backbone.weights.items():
        other = weights.image_size if like and weights.image_size != like.image_size else None
        notes = [f"{other} px"] * bool(other) + ["on this machine"] * weights.here
        tag = name.partition(".")[2] or "its own weights"
        tags.append(tag + (f" ({', '.join(notes)})" if notes else ""))
    below = textwrap.fill(
        ", ".join(tags) or "no pretrained weights",
        max(shutil.get_terminal_size().columns, 60),
        break_on_hyphens=False,
        break_long_words=False,
        initial_indent="    ",
        subsequent_indent="    ",
    )
    return f"{line}\n{below}"


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
