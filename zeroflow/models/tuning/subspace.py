"""A tuning of which only a few random coordinates are trained."""

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
    """The values of another tuning, ``theta = theta_0 + P z``: ``z`` ``[k]``, zero at first, is all that is trained.

    Each value belongs to one coordinate of z, with a random sign: P ``[d, k]`` has one number in a row, and its columns have
    length 1. So P^T P = I: a step of z by SGD is the tuning's own step, projected. A perturbation of z by eps moves a value by
    eps sqrt(k / d) on average, so eps and lr want to be larger than without. P is made again from its seed at every pass, in
    O(d), and is part of no state.
    Source: Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018, Eq. 2 and the sparse projections of
    its appendix, here with one number in a row.

    Args:
        tuning: at theta_0, which stays.
        dimensions: k.
        seed: of P, below 2^63.

    Raises:
        ConfigError: it has fewer values than that.
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
    """P by rows: the coordinate that each of ``size`` values belongs to, and its number there, +-1 / length; each ``[size]``.

    The first values have a coordinate each, so that none is idle; all others are drawn.
    """
    drawn = np.random.Generator(np.random.Philox(key=seed)).integers(2 * dimensions, size=size, dtype=np.int64)
    coordinates = drawn >> 1
    coordinates[:dimensions] = np.arange(dimensions)
    lengths = np.sqrt(np.bincount(coordinates))
    signs = 1.0 - 2.0 * (drawn & 1)
    return torch.from_numpy(coordinates), torch.from_numpy(signs / lengths[coordinates])


def create_tuning(name: str, backbone: Backbone, generator: torch.Generator, settings: Mapping[str, Any]) -> Tuning:
    """A fresh tuning by its name; of it only ``settings["subspace"]`` coordinates move, where that is there and not 0."""
    tuning = tunings.get(name).of(backbone, generator, settings)
    dimensions = settings.get("subspace", 0)
    if not dimensions:
        return tuning
    return Subspace(tuning, dimensions, int(torch.randint(2**63 - 1, (), generator=generator)))
