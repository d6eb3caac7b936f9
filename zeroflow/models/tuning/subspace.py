"""Train another tuning in a random subspace of a few coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from zeroflow.errors import ConfigError
from zeroflow.models.backbone import Backbone
from zeroflow.models.tuning.tuning import Tuning, tunings


class Subspace(Tuning):
    """The values of another tuning, ``theta = theta_0 + P z``; only ``z`` ``[k]`` is trained, initially zero.

    Each value depends on one coordinate of z, with a random sign: P ``[d, k]`` has one non-zero entry per row, and its columns
    have length 1. So P^T P = I: an SGD step of z is the tuning's own step, projected. A perturbation of z by eps changes a
    value by eps sqrt(k / d) on average, so eps and lr should be larger than without a subspace. P is regenerated from its seed
    at every pass, in O(d), and is not part of the state.
    Source: Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018, Eq. 2 and the sparse projections
    of its appendix, here with one non-zero entry per row.

    Args:
        tuning: with the values theta_0, which stay fixed.
        dimensions: k.
        seed: of P, below 2^63.

    Raises:
        ConfigError: the tuning has fewer than ``dimensions`` values.
    """

    per_example = False

    def __init__(self, tuning: Tuning, dimensions: int, seed: int) -> None:
        super().__init__()
        self.names = [name for name, value in tuning.named_parameters() if value.requires_grad]
        self.size = sum(value.numel() for value in tuning.parameters() if value.requires_grad)
        if dimensions > self.size:
            raise ConfigError(
                f"subspace={dimensions}: expected at most {self.size}, the values of {type(tuning).__name__}"
            )
        self.tuning, self.seed = tuning.requires_grad_(False), seed
        self.z = nn.Parameter(torch.zeros(dimensions))

    def projected(self) -> Tensor:
        """P z, ``[d]``."""
        coordinates, weights = projection(self.size, len(self.z), self.seed)
        return self.z.index_select(0, coordinates.to(self.z.device)) * weights.to(self.z)

    def moved(self) -> dict[str, Tensor]:
        """The tuning's values by name."""
        start = [self.tuning.get_parameter(name) for name in self.names]
        parts = torch.split(self.projected(), [value.numel() for value in start])
        return {name: value + part.view_as(value) for name, value, part in zip(self.names, start, parts, strict=True)}

    def prefix(self, backbone: Backbone, images: Tensor) -> Any:
        return self.tuning.prefix(backbone, images)

    def forward(self, backbone: Backbone, prefix: Any) -> Tensor:
        return cast(Tensor, functional_call(self.tuning, self.moved(), (backbone, prefix), tie_weights=False))


def projection(size: int, dimensions: int, seed: int) -> tuple[Tensor, Tensor]:
    """P by rows: the coordinate of each of ``size`` values, and its entry, +-1 / length of the column; both ``[size]``.

    The first values get one coordinate each, so that none is unused; the others are drawn at random.
    """
    drawn = np.random.Generator(np.random.Philox(key=seed)).integers(2 * dimensions, size=size, dtype=np.int64)
    coordinates = drawn >> 1
    coordinates[:dimensions] = np.arange(dimensions)
    lengths = np.sqrt(np.bincount(coordinates))
    signs = 1.0 - 2.0 * (drawn & 1)
    return torch.from_numpy(coordinates), torch.from_numpy(signs / lengths[coordinates])


def create_tuning(name: str, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Tuning:
    """Create a tuning by name, in a subspace of ``settings["subspace"]`` coordinates if that is given and not 0."""
    tuning = tunings.get(name).of(backbone, generator, settings)
    dimensions = settings.get("subspace", 0)
    if not dimensions:
        return tuning
    return Subspace(tuning, dimensions, int(torch.randint(2**63 - 1, (), generator=generator)))
