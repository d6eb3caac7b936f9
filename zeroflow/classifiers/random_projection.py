"""Random projection: ridge regression on many random features of a feature, the classifier of RanPAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroflow.classifiers.classifier import register_classifier
from zeroflow.classifiers.ridge import Ridge


@register_classifier("random-projection", "ridge regression on random features, relu(x W): RanPAC's classifier")
class RandomProjection(Ridge):
    """Ridge regression that sees relu(x W) in place of the feature x, with a fixed random W.

    Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023,
    Algorithm 1.

    Attributes:
        projection: W, standard normal, float32 ``[width, M]``; not saved, since it is drawn again.
    """

    draws = True
    projection: Tensor

    @dataclass(frozen=True)
    class Options(Ridge.Options):
        """Options of ``Ridge``, and the size of the projection.

        Attributes:
            dimension: M; 0: the published 10,000, or 2,000 for features narrower than 512. The statistics are
                M x M numbers: 800 MB for 10,000.
        """

        dimension: int = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.dimension < 0:
                raise ValueError(f"dimension={self.dimension!r}: expected an integer >= 1, or 0 for the usual one")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.register_buffer("projection", torch.zeros(0, 0), persistent=False)

    def expanded_width(self, width: int, generator: torch.Generator) -> int:
        size = self.options.dimension or (10_000 if width >= 512 else 2_000)
        # On the CPU, where generators are: the same numbers on every device.
        self.projection = torch.randn(width, size, generator=generator).to(self.gram.device)
        return size

    def expand(self, features: Tensor) -> Tensor:
        # In float64 already here: in float32 how a task is cut into mini-batches would show in the seventh digit.
        return (super().expand(features) @ self.projection.to(self.gram)).relu_()
