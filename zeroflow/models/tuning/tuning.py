"""What a tuning is, and the registry of tunings: what is trained, and how it changes the forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zeroflow.models.backbone import Backbone
from zeroflow.registry import Registry


class Tuning(nn.Module, ABC):
    """Trainable values beside a frozen backbone, which is handed in at each call and is no part of this module."""

    per_example: ClassVar[bool] = True
    """Whether its values may differ from example to example of a mini-batch, as ``zo-per-example`` needs it."""

    needs: ClassVar[str] = "features"
    """What of a backbone it needs, one of ``zeroflow.models.backbone.PARTS``."""

    @classmethod
    def of(cls, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Tuning:
        """A fresh one for ``backbone``; ``generator`` makes its initial values, of the settings it takes what it knows."""
        return cls()

    def prefix(self, backbone: Backbone, images: Tensor) -> Any:
        """The part of a forward pass that no trained value changes, without a graph; ``images`` ``[N, C, H, W]``."""
        return images

    @abstractmethod
    def forward(self, backbone: Backbone, prefix: Any) -> Tensor:
        """Features ``[N, width]`` from ``prefix``."""


class Untuned(Tuning):
    """The backbone as it is: only a head is trained."""

    def prefix(self, backbone: Backbone, images: Tensor) -> Tensor:
        with torch.no_grad():
            return backbone(images)

    def forward(self, backbone: Backbone, prefix: Tensor) -> Tensor:
        return prefix


tunings: Registry[type[Tuning]] = Registry("tuning")
