"""The command that puts a backbone behind an endpoint: serve."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import click

from zeroflow.cli.command import Command, threads_option


@click.command(
    cls=Command,
    short_help="A backbone as a black box, behind HTTP.",
    examples=(
        (
            "ZEROFLOW_ENDPOINT_TOKEN=$TOKEN zeroflow serve --backbone quickdraw_vit --port 8017",
            "on this machine alone",
        ),
        ("zeroflow run --set access=black-box --set method=simplecil --endpoint http://127.0.0.1:8017/", "ask it"),
    ),
)
@click.option("--backbone", default="quickdraw_vit", help="Name of the backbone.")
@click.option("--checkpoint", help="File, hub or none. [default: the backbone's own]")
@click.option("--image-size", type=click.IntRange(min=1), help="Pixels. [default: the backbone's own]")
@click.option("--host", default="127.0.0.1", help="Who may ask: 127.0.0.1 is this machine alone.")
@click.option("--port", default=8017, type=click.IntRange(min=0, max=65535), help="0: a free one.")
@click.option("--queue", default=16, type=click.IntRange(min=1), help="Requests that may wait; more are refused.")
@threads_option
@click.option("--address-file", type=click.Path(dir_okay=False, path_type=Path), help="Write the address there.")
def serve(
    backbone: str,
    checkpoint: str | None,
    image_size: int | None,
    host: str,
    port: int,
    queue: int,
    threads: int,
    address_file: Path | None,
) -> None:
    """Serve a backbone's features over HTTP with Ray Serve, until Ctrl-C.

    The token is that of the environment variable ZEROFLOW_ENDPOINT_TOKEN, which is required.
    """
    from zeroflow.errors import ConfigError
    from zeroflow.models.endpoint import TOKEN, valid_token
    from zeroflow.models.probe import check_buildable
    from zeroflow.sweep import serve as serving

    if not valid_token():
        raise ConfigError(f"a token is required: put one into the environment variable {TOKEN}")
    check_buildable(backbone, checkpoint, image_size)
    serving.check_installed()
    ended = threading.Event()
    with serving.serving(serving.Served(backbone, checkpoint, image_size, host, port, queue, threads)) as url:
        for number in (signal.SIGINT, signal.SIGTERM):  # now: Ray has just set its own
            signal.signal(number, lambda *_: ended.set())
        if address_file:
            address_file.write_text(url + "\n")
        click.echo(f"{backbone} is served at {url}; Ctrl-C ends it")
        ended.wait()
