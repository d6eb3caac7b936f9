"""A backbone that answers in spikes: its activations are hard thresholds, whose derivative is zero almost everywhere.

Converted from the pretrained one without training: every channel of every block's output, and of the features, becomes the
firing rate of an integrate-and-fire neuron. Source: Bu et al., "Optimal ANN-SNN Conversion for High-accuracy and
Ultra-low-latency Spiking Neural Networks", ICLR 2022, Eq. 5 and 11 (rate of a neuron that starts half charged).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zeroflow.models.backbone import Backbone

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

STEPS = 16
"""Time steps T: a neuron fires 0 to T times."""

SHARE = 0.999
"""Of what is seen while calibrating, the share that a channel's highest rate reaches."""


def firing_rate(current: Tensor, highest: Tensor, steps: int = STEPS) -> Tensor:
    """Spikes of neurons in ``steps`` time steps, times the charge of a spike: multiples of ``highest / steps``.

    A neuron starts half charged, takes the same ``current`` at every step, fires once where its charge reaches ``highest`` and
    loses as much; a negative current drives its twin, whose spikes count negative. In closed form, which is exact for a
    constant current. Autograd and forward mode differentiate it without complaint, to zero.

    Args:
        current: ``[..., d]``. highest: rate of a neuron that fires at every step ``[d]``, > 0.
    """
    spikes = torch.floor(current.abs() * (steps / highest) + 0.5).clamp(max=steps)
    return torch.sign(current) * spikes * (highest / steps)


class SpikingBackbone(Backbone):
    """A ``Backbone`` between whose blocks only spikes travel, and whose features are firing rates.

    So nothing inside has a slope that could be followed: the derivative of the features with respect to any value trained
    inside is zero. ``calibrate`` comes first.
    """

    highest: Tensor

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__(vit)
        # Of each block's output and of the features; zero: not calibrated.
        self.register_buffer("highest", torch.zeros(self.depth + 1, self.width))
        self._seen: dict[int, list[Tensor]] | None = None

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set every channel's highest rate, from the images of the first task; no label is looked at."""
        self._seen = {number: [] for number in range(self.depth + 1)}
        for images in batches:
            self(images)
        for number, parts in self._seen.items():
            sizes = torch.cat(parts).abs().float()
            rank = max(1, round(SHARE * len(sizes)))
            self.highest[number] = sizes.kthvalue(rank, dim=0).values.clamp(min=1e-6)
        self._seen = None

    def emitted(self, number: int, values: Tensor) -> Tensor:
        if self._seen is not None:
            self._seen[number].append(values.reshape(-1, self.width))
            return values
        if not torch.any(self.highest):
            raise RuntimeError("SpikingBackbone: calibrate it first")
        return firing_rate(values, self.highest[number])
