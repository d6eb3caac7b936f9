"""Full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zeroflow.models.backbone import Backbone
from zeroflow.models.tuning.tuning import Tuning


class Full(Tuning):
    """Train every weight of a copy of the backbone."""

    per_example = False
    needs = "weights"

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.tuned = copy.deepcopy(backbone).requires_grad_(True)

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Full:
        return cls(backbone)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return self.tuned.whole(prefix)
