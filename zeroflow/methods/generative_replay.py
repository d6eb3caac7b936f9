"""Generative replay in feature space: train on generated features of old classes along with the current task's.

Source: ZeroFlow, Eq. 2, after Shin et al., "Continual Learning with Deep Generative Replay", NeurIPS 2017. The generator is a
Gaussian per class over features that no longer change, as in Zhang et al., "SLCA", ICCV 2023, Section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.classifiers.normal_equations import factor
from zeroflow.data.scenario import Batch
from zeroflow.methods.finetune import FineTuning
from zeroflow.methods.method import MiniBatch, one_of, register_method
from zeroflow.models.backbone import Backbone


@register_method(
    "generative-replay", "as finetune, beside made-up features of old classes; features freeze after task 0"
)
class GenerativeReplay(FineTuning):
    """Task 0 trains tuning and head; later tasks freeze the features and train the head only, by Eq. 2.

    A generated feature of class c is ``means[c] + factors[c] @ n`` with standard normal n.
    """

    needs_head = "after the first task its head is all that learns"
    means: Tensor
    factors: Tensor

    @dataclass(frozen=True)
    class Options(FineTuning.Options):
        """Options of fine-tuning and of the generator.

        Attributes:
            covariance: ``full`` (d x d numbers per class) or ``diagonal``.
            shrinkage: weight of the mean variance times I in the covariance, since a class has fewer samples than a full
                covariance has numbers.
        """

        covariance: str = "full"
        shrinkage: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of(covariance=(self.covariance, ("full", "diagonal")))
            if not 0 < self.shrinkage <= 1:
                raise ValueError(f"shrinkage={self.shrinkage!r}: expected a share in (0, 1]")

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        width = backbone.width
        shape = (width, width) if self.options.covariance == "full" else (width,)
        self.register_buffer("means", torch.empty(0, width))
        self.register_buffer("factors", torch.empty(0, *shape))

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        super().begin_task(classes, generator, batches)
        if classes.start:
            self.tuning.requires_grad_(False)

    def train(self, mode: bool = True) -> GenerativeReplay:
        """As in torch, but without dropout in frozen features: generated ones have none either."""
        super().train(mode)
        if len(self.tasks) > 1:
            self.tuning.eval()
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def freeze(self) -> None:
        self.frozen_spaces = 1

    def replay(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """Features of old classes, each class equally likely."""
        old = len(self.means)
        if not old:
            return None
        classes = torch.randint(old, (count,), generator=generator)
        normal = torch.randn(count, self.means.shape[1], generator=generator)
        own = classes.to(self.means.device)
        factors, normal = self.factors[own], normal.to(self.means)
        spread = torch.einsum("nij,nj->ni", factors, normal) if factors.ndim == 3 else factors * normal
        return self.means[own] + spread, classes

    def prepare(self, batch: MiniBatch) -> Any:
        if batch.replayed is None:
            return super().prepare(batch)
        with torch.no_grad():
            features = self.tuning(self.backbone, self.tuning.prefix(self.backbone, batch.images))
        return features, batch.labels, batch.replayed, batch.replayed_labels

    def passes(self) -> tuple[int, int]:
        return (1, 0) if len(self.means) else (0, 1)  # later only the head learns

    def losses(self, inputs: Any) -> Tensor:
        if len(inputs) == 2:
            return super().losses(inputs)
        features, labels, replayed, replayed_labels = inputs
        current = self.criterion(self.head(features), labels)
        old = self.criterion(self.head(replayed), replayed_labels)
        tasks = len(self.tasks)
        return current / tasks + (1 - 1 / tasks) * old

    @torch.no_grad()
    def end_task(self, batches: Iterable[Batch]) -> None:
        parts = [(self.features(images, range(1))[:, 0], labels) for images, labels in batches]
        features, labels = torch.cat([part for part, _ in parts]), torch.cat([label for _, label in parts])
        own = [features[labels.to(features.device) == label] for label in self.tasks[-1]]
        self.means = torch.cat([self.means.to(features), torch.stack([part.mean(0) for part in own])])
        self.factors = torch.cat([self.factors.to(features), torch.stack([self._factor(part) for part in own])])

    def _factor(self, features: Tensor) -> Tensor:
        """Factor of the covariance of a class with ``features`` ``[n, d]``: ``[d, d]``, or ``[d]`` where it is diagonal."""
        centred = features - features.mean(0)
        variance = centred.square().sum(0) / max(len(features) - 1, 1)
        kept, floor = 1 - self.options.shrinkage, self.options.shrinkage * variance.mean().clamp(min=1e-12)
        if self.options.covariance == "diagonal":
            return (kept * variance + floor).sqrt()
        covariance = centred.T @ centred / max(len(features) - 1, 1)
        covariance = kept * covariance + floor * torch.eye(len(covariance)).to(covariance)
        found, failed = torch.linalg.cholesky_ex(covariance)
        return factor(covariance.double()).to(found) if failed else found  # a floor below float32's rounding
