"""Adapters parallel to every block's MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from zeroflow.models.adapters import AdapterStack
from zeroflow.models.backbone import Backbone, Prefix
from zeroflow.models.tuning.tuning import Tuning


class Adapters(Tuning):
    """A bottleneck parallel to every block's MLP; arguments as in ``AdapterStack``."""

    needs = "blocks"

    def __init__(self, stack: AdapterStack) -> None:
        super().__init__()
        self.stack = stack

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Adapters:
        own = {name: settings[name] for name in ("scale", "dropout")}
        return cls(AdapterStack(backbone.widths, settings["bottleneck"], **own, generator=generator))

    def prefix(self, backbone: Backbone, images: Tensor) -> Prefix | Tensor:
        return backbone.prefix(images)

    def forward(self, backbone: Backbone, prefix: Prefix | Tensor) -> Tensor:
        return cast(Tensor, backbone(prefix, self.stack))
