"""The base class of tunings (what is trained, and how it changes the forward pass) and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zeroflow.models.backbone import Backbone
from zeroflow.registry import Registry


class Tuning(nn.Module, ABC):
    """Trainable values for a frozen backbone, which is an argument of each call and not part of this module."""

    per_example: ClassVar[bool] = True
    """Whether its values may differ between the examples of a mini-batch, as ``zo-per-example`` requires."""

    needs: ClassVar[str] = "features"
    """What it needs of a backbone, one of ``zeroflow.models.backbone.PARTS``."""

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Tuning:
        """Create one for ``backbone``; ``generator`` is the source of initial values; unknown settings are ignored."""
        return cls()

    def prefix(self, backbone: Backbone, images: Tensor) -> Any:
        """The part of a forward pass that no trained value changes, without a graph, for ``images`` ``[N, C, H, W]``."""
        return images

    @abstractmethod
    def forward(self, backbone: Backbone, prefix: Any) -> Tensor:
        """Features ``[N, width]`` from ``prefix``."""


class Untuned(Tuning):
    """The backbone without changes: only a head is trained."""

    def prefix(self, backbone: Backbone, images: Tensor) -> Tensor:
        with torch.no_grad():
            return backbone(images)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return prefix


tunings: Registry[type[Tuning]] = Registry("tuning")
