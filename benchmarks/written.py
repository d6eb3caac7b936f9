"""How a benchmark's result is shown and kept: with where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from zeroflow.trial.result import provenance


def write(result: Mapping[str, Any], output: Path | None, placement: Mapping[str, Any], *, shown: bool = True) -> None:
    """Print a result with versions, device and commit, and write it to ``output`` where that is given."""
    facts = {key: value for key, value in provenance(torch.device("cpu"), placement).items() if key != "finished_at"}
    text = json.dumps({**result, **facts}, indent=1)
    if shown:
        click.echo(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
