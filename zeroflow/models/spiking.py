"""A spiking backbone: its activations are hard thresholds, whose derivative is zero almost everywhere.

It is converted from the pretrained backbone without training: every channel of every block's output, and of the features, becomes the
firing rate of an integrate-and-fire neuron. Source: Bu et al., "Optimal ANN-SNN Conversion for High-accuracy and
Ultra-low-latency Spiking Neural Networks", ICLR 2022, Eq. 5 and 11 (rate of a neuron that starts half charged).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zeroflow.models.timm_backbone import TransformerBackbone

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

STEPS = 16
"""Time steps T: a neuron fires 0 to T times."""

SHARE = 0.999
"""Quantile of a channel's calibration values that becomes its highest rate."""

IMAGES = 1024
"""Maximum number of calibration images. Of a larger task at least half as many are used: enough that the quantile ``SHARE`` of
the features, which have one value per image, is not their maximum."""

BATCH = 64
"""Images per forward pass while calibrating; fixed, since it can change the last bits."""


def firing_rate(current: Tensor, highest: Tensor, steps: int = STEPS) -> Tensor:
    """Number of spikes in ``steps`` time steps, times the charge of a spike: multiples of ``highest / steps``.

    An integrate-and-fire neuron starts half charged, takes the same ``current`` at every step, fires when its charge reaches
    ``highest``, and loses that charge; a negative current drives its twin, whose spikes count negative. The closed form is
    exact for a constant current. Both autograd and forward mode differentiate it to zero.

    Args:
        current: ``[..., d]``.
        highest: rate of a neuron that fires at every step, ``[d]``, > 0.
        steps: number of time steps.
    """
    spikes = torch.floor(current.abs() * (steps / highest) + 0.5).clamp(max=steps)
    return torch.sign(current) * spikes * (highest / steps)


class SpikingBackbone(TransformerBackbone):
    """A ``TransformerBackbone`` whose blocks exchange spikes only, and whose features are firing rates.

    The derivative of the features with respect to any value trained inside is therefore zero. Call ``calibrate`` first.
    """

    highest: Tensor

    def __init__(self, vit: VisionTransformer, channels: int = 3) -> None:
        super().__init__(vit, channels=channels)
        # One row per block's output and one for the features; zero: not calibrated.
        self.register_buffer("highest", torch.zeros(self.depth + 1, self.width))
        # While calibrating: the largest values so far of every channel, in falling order, and the images in all.
        self._largest: dict[int, Tensor] | None = None
        self._images = 0

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set every channel's highest rate from images of the first task, without labels.

        Up to ``IMAGES`` images are all used, otherwise every second, fourth, ... one: they arrive class by class, so the first
        ones would not represent all classes. The split into batches does not matter. Memory holds these images and the largest
        share ``1 - SHARE`` of each channel's values.
        """
        images = _spread(batches)
        self._largest, self._images = {}, len(images)
        for first in range(0, len(images), BATCH):
            self(torch.stack(images[first : first + BATCH]))
        for number, largest in self._largest.items():
            self.highest[number] = largest[-1].clamp(min=1e-6)
        self._largest = None

    def emitted(self, number: int, values: Tensor) -> Tensor:
        if self._largest is not None:
            sizes = values.reshape(-1, self.width).abs().float()
            total = self._images * (len(sizes) // len(values))
            needed = total + 1 - max(1, round(SHARE * total))
            if number in self._largest:
                sizes = torch.cat([self._largest[number], sizes])
            self._largest[number] = sizes.topk(min(needed, len(sizes)), dim=0).values
            return values
        if not torch.any(self.highest):
            raise RuntimeError("SpikingBackbone: calibrate it first")
        return firing_rate(values, self.highest[number])


def _spread(batches: Iterable[Tensor]) -> list[Tensor]:
    """At most ``IMAGES`` images, evenly spread over all batches, whose number need not be known in advance."""
    chosen: list[Tensor] = []
    every, seen = 1, 0
    for images in batches:
        for image in images:
            if seen % every == 0:
                if len(chosen) == IMAGES:
                    chosen, every = chosen[::2], 2 * every
                chosen.append(image.clone())  # a view would keep its batch
            seen += 1
    return chosen
