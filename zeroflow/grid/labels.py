"""Short names of cells, which tell them apart."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zeroflow.grid.shared_options import OPTION_SECTIONS, known_options
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
    for config, usual in _left_at_defaults(cells):
        found[config.cell_id] += f" {usual}"
    return found


def _left_at_defaults(cells: Sequence[TrialConfig]) -> Iterator[tuple[TrialConfig, str]]:
    """Options that a cell leaves at their defaults while others of its kind set them: ``bottleneck=16``."""
    kinds: dict[tuple[str | None, ...], list[TrialConfig]] = defaultdict(list)
    for config in cells:
        kinds[config.method, config.optimizer, config.classifier].append(config)
    for own in kinds.values():
        options = [flat({key: getattr(config, key) for key in OPTION_SECTIONS}) for config in own]
        known = known_options(vars(own[0]))
        for name in dict.fromkeys(name for each in options for name in each):
            for config, each in zip(own, options, strict=True):
                if name not in each and name in known:
                    yield config, f"{name.partition('.')[2]}={known[name]}"


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with options dotted."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{option}": content for option, content in flat(value).items()}
        else:
            found[key] = value
    return found
