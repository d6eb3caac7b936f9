"""What packing a store gains: loading its tables from a file per cell against from a file per table.

``python benchmarks/packing.py`` writes made-up results through the real store, loads every table loose, packs, and loads every
table packed, in a temporary folder and over a local S3 server (moto's, as the tests have it). Times are medians of rounds; what
counts are ratios of one run: a machine's speed drops out, though not what a real network would add to each request.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from pyarrow import fs
from store import fill, grid_of, medians
from written import write

from zeroflow.results import Store, pack

TABLES = ("trials", "stages", "accuracy", "steps")


@contextmanager
def s3_server() -> Iterator[None]:
    """An S3 server with an empty bucket ``bucket``, and the environment of someone who uses it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: object) -> None: ...

    backend = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, backend, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{server.server_port}", scheme="http", allow_bucket_creation=True
    ).create_dir("bucket")
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def measure(root: str, cells: int, rounds: int) -> dict[str, object]:
    """Fill a store, and time what a reader waits for before and after it is packed."""
    fill(Store(root), grid_of(cells).cells[:cells])
    parts = {name: lambda name=name: Store(root).load(name) for name in TABLES} | {"done": lambda: Store(root).done()}
    before = [len(Store(root).load(name)) for name in TABLES]
    some = sorted(Store(root).done())[cells // 2 : cells // 2 + 5]
    parts["five cells' steps"] = lambda: Store(root).load("steps", cells=some)
    loose = medians(parts, rounds)
    started = time.perf_counter()
    packed = pack(root)
    seconds = time.perf_counter() - started
    whole = medians(parts, rounds)
    assert [len(Store(root).load(name)) for name in TABLES] == before
    return {
        "loose_files": packed.files,
        "packing_in_loading_all": round(seconds / sum(loose[name] for name in TABLES), 2),
        "bytes": packed.bytes,
        "loose_seconds": {name: round(value, 4) for name, value in loose.items()},
        "packed_seconds": {name: round(value, 4) for name, value in whole.items()},
        "times_faster": {name: round(loose[name] / whole[name], 1) for name in parts},
    }


@click.command()
@click.option("--cells", default=10_000, show_default=True, type=click.IntRange(min=10), help="In a folder.")
@click.option("--s3-cells", default=1_000, show_default=True, type=click.IntRange(min=10), help="On the S3 server.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A JSON file to write, too.")
def main(cells: int, s3_cells: int, rounds: int, output: Path | None) -> None:
    """Print what packing a store gains."""
    with tempfile.TemporaryDirectory() as folder:
        local = {"where": "folder", "cells": cells, **measure(f"{folder}/results", cells, rounds)}
    with s3_server():
        remote = {"where": "S3", "cells": s3_cells, **measure("s3://bucket/results", s3_cells, rounds)}
    command = f"python benchmarks/packing.py --cells {cells} --s3-cells {s3_cells} --rounds {rounds}"
    write({"command": command, "rounds": rounds, "stores": [local, remote]}, output, {})


if __name__ == "__main__":
    main()
