"""The scales and shifts of a backbone's own norms."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zeroflow.models.backbone import Backbone
from zeroflow.models.timm_backbone import norms
from zeroflow.models.tuning.tuning import Tuning


class NormAffine(Tuning):
    """Scale and shift of every norm, starting from their pretrained values: 2 x width values per norm, no new parameters.

    Source: TENT trains these at test time (Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021,
    Section 3.2); here for any kind of norm, and batch norms keep their running statistics.

    Args:
        backbone: its other weights are shared, not copied.
    """

    per_example = False
    needs = "norms"

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        own = {id(value) for norm in norms(backbone) for value in norm.parameters(recurse=False)}
        # deepcopy treats entries of its memo as copied already.
        shared: dict[int, Any] = {
            id(value): value for value in [*backbone.parameters(), *backbone.buffers()] if id(value) not in own
        }
        self.tuned = copy.deepcopy(backbone, shared)
        for norm in norms(self.tuned):
            for value in norm.parameters(recurse=False):  # some contain the layer before them
                value.requires_grad_(True)

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> NormAffine:
        return cls(backbone)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return self.tuned.whole(prefix)
