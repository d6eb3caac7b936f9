"""Where an optimizer's own state stands in a state dict: as bytes in the first parameter group.

Every way of saving optimizers keeps what is in groups; ``torch.distributed.checkpoint`` drops all keys beside them, and loads
tensors and dicts only where it has seen the same ones before.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

OWN = "zeroflow"
"""Key in the first group; in the groups of an optimizer itself it keeps the place, empty."""


def packed(own: Mapping[str, Any]) -> bytes:
    """Numbers and tensors as bytes."""
    file = io.BytesIO()
    torch.save(dict(own), file)
    return file.getvalue()


def unpacked(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what was packed, torch's own part of the state dict).

    Raises:
        ValueError: there is nothing of a zeroflow optimizer's.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    content = groups[0].pop(OWN, b"") if groups else b""
    own = state_dict.get(OWN)  # earlier versions had it beside torch's keys
    if content:
        own = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if own is None:
        raise ValueError("state_dict: expected one of a zeroflow optimizer (key 'zeroflow'), found only torch's keys")
    return own, {"state": state_dict["state"], "param_groups": groups}
