"""Plain fine-tuning: one model with one growing head, trained on each task in turn. The one that forgets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeroflow.data.scenario import Batch
from zeroflow.methods.method import Method, MiniBatch, odd, positive, register_method, whole_example
from zeroflow.methods.options import TuningOptions
from zeroflow.methods.prototypes import class_means
from zeroflow.models.backbone import Backbone
from zeroflow.models.heads import CosineHead
from zeroflow.models.tuning import Tuning, create_tuning, tunings
from zeroflow.optim import OptimizerInfo


@register_method("finetune", "one model and one growing head trained on each task in turn: the row that forgets")
class FineTuning(Method):
    """One tuning and one cosine head over all classes seen so far, trained on the current task's samples alone.

    The base of all methods with one head, which add terms to the loss. With a headless criterion the head is not trained: a
    task's rows are the mean features of its classes, before training (see ``imprint``) and again after it.
    """

    any_loss = True
    needs_head = ""
    one_head = True

    @dataclass(frozen=True)
    class Options(TuningOptions):
        """What is trained besides the head, and how it is initialised. Options of another tuning than ``tune`` mean nothing.

        Attributes:
            tune: ``none``, ``adapter``, ``vpt-shallow``, ``vpt-deep``, ``ssf``, ``norm-affine``, ``block-shift``, ``full``,
                ``input-prompt`` or ``input-filter``.
            bottleneck: inner width of adapters.
            scale: factor on the output of adapters.
            dropout: probability inside adapters while training.
            tokens: learnable tokens at each place, of ``vpt-*``.
            imprint: initialise a new class's weights with its mean feature (Qi et al., "Low-Shot Learning with Imprinted
                Weights", CVPR 2018), so that the untrained model is a class-mean classifier; otherwise at random. A
                headless criterion sets the weights after training in any case.
            sigma: initial scale of the head. Class means need no scale, so with a headless criterion only ``lwf`` uses it.
            border: width of the frame of ``input-prompt``, pixels.
            rank: of the pattern of ``input-prompt``.
            size: side of the filter of ``input-filter``, pixels, odd.
            shared: one filter of ``input-filter`` for all channels, otherwise one for each.
        """

        tune: str = "adapter"
        bottleneck: int = 64
        scale: float = 0.1
        dropout: float = 0.1
        tokens: int = 5
        imprint: bool = True
        sigma: float = 10.0
        border: int = 2
        rank: int = 2
        size: int = 5
        shared: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            tunings.get(self.tune, where="tune")
            if self.subspace and self.tune == "none":
                raise ValueError(f"subspace={self.subspace}: tune='none' has no values; expected 0")
            positive(bottleneck=self.bottleneck, scale=self.scale, tokens=self.tokens, sigma=self.sigma)
            positive(border=self.border, rank=self.rank)
            odd(size=self.size)
            if not 0 <= self.dropout < 1:
                raise ValueError(f"dropout={self.dropout!r}: expected a share in [0, 1)")

    tuning: Tuning
    head: CosineHead

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        self.tasks: list[range] = []

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        self.tasks.append(classes)
        if len(self.tasks) == 1:
            self.tuning = create_tuning(self.options.tune, self.backbone, generator, asdict(self.options))
            self.head = CosineHead(self.backbone.width, len(classes), sigma=self.options.sigma, generator=generator)
        else:
            self.head.grow(len(classes), generator)
        self.to(self.backbone.like)
        self.head.requires_grad_(not self.criterion.headless)
        if self.options.imprint and batches is not None:
            self.eval()
            self._imprint(batches)

    def _imprint(self, batches: Iterable[Batch]) -> None:
        """Set the head's rows of the task's classes to their mean features."""
        means = class_means(lambda images: self.features(images, range(1))[:, 0], batches, self.tasks[-1])
        self.head.weight.detach()[self.tasks[-1].start :] = F.normalize(means, dim=1)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def prepare(self, batch: MiniBatch) -> Any:
        return self.tuning.prefix(self.backbone, batch.images), batch.labels

    def losses(self, inputs: Any) -> Tensor:
        prefix, labels = inputs
        return self.criterion(self.answers(self.tuning(self.backbone, prefix)), labels)

    def answers(self, features: Tensor) -> Tensor:
        """Inputs of the criterion: the head's logits, or the features ``[N, d]`` where it is headless."""
        return features if self.criterion.headless else self.head(features)

    @classmethod
    def tunes(cls, options: Any) -> str:
        return str(options.tune)

    @classmethod
    def refusal(cls, optimizer: OptimizerInfo, options: Any) -> str | None:
        return whole_example(optimizer, options.tune, options.subspace)

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Where the head was not trained, compute its rows from the task's images."""
        if self.criterion.headless:
            self._imprint(batches)

    @torch.no_grad()
    def features(self, images: Tensor, spaces: range) -> Tensor:
        return self.tuning(self.backbone, self.tuning.prefix(self.backbone, images))[:, None]

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        return self.head(features[:, 0])
