"""Short names of cells, which tell them apart."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from zeroflow.trial.config import TrialConfig


def labels(cells: Sequence[TrialConfig]) -> dict[str, str]:
    """Labels by cell id; where several cells have one label, with the keys and options behind it that tell them apart."""
    alike: dict[str, list[TrialConfig]] = defaultdict(list)
    for config in cells:
        alike[config.label()].append(config)
    found = {}
    for label, own in alike.items():
        keys = [flat(dataclasses.asdict(config)) for config in own]
        # In the order of the configuration's keys.
        apart = [
            key
            for key in dict.fromkeys(key for each in keys for key in each)
            if len({str(each.get(key)) for each in keys}) > 1
        ]
        for config, each in zip(own, keys, strict=True):
            ends = [f"{key.rpartition('.')[2]}={each[key]}" for key in apart if each.get(key) is not None]
            found[config.cell_id] = " ".join([label, *ends])
    return found


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with options dotted."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{option}": content for option, content in flat(value).items()}
        else:
            found[key] = value
    return found
