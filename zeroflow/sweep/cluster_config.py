"""How Ray reads a cluster file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from typing import Any


def as_ray_reads_it(given: Mapping[str, Any]) -> dict[str, Any]:
    """A cluster file with Ray's defaults filled in, after Ray's own checks. Starts nothing, asks nobody.

    Args:
        given: the content of the file.

    Raises:
        Exception: Ray refuses it; of whatever class Ray takes for that.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            # As `ray up` reads it: what aliases share is several things there.
            config: dict[str, Any] = prepare_config(json.loads(json.dumps(given)))
            validate_config(config)
    except SystemExit:
        raise ValueError(re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).strip()) from None
    return config
