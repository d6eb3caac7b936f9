"""EWC: penalise changes of each value in proportion to its importance for old tasks.

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, Eq. 3; one sum of Fisher
information and one anchor for all old tasks, as in Schwarz et al., "Progress & Compress", ICML 2018, Section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.data.scenario import Batch
from zeroflow.methods.method import MiniBatch, one_of, positive, register_method
from zeroflow.methods.penalty import Penalised
from zeroflow.models.backbone import Backbone
from zeroflow.models.criteria import cross_entropy
from zeroflow.optim import OptimizerInfo


@register_method(
    "ewc", "as finetune, each value held by its Fisher information on old tasks, from forward passes or exact"
)
class EWC(Penalised):
    """``L_reg = 1/2 sum_j F_j (theta_j - anchor_j)^2`` with F the diagonal Fisher information, summed over old tasks.

    F is the empirical Fisher information: F_j = mean over examples of (d log p / d theta_j)^2 at the true labels, measured at
    the end of a task. log p is that of the head's softmax, whatever loss is trained.
    """

    needs_head = "its Fisher information is of single examples"

    @dataclass(frozen=True)
    class Options(Penalised.Options):
        """Options of the penalty and of its Fisher information.

        Attributes:
            alpha: weight of the penalty.
            fisher: ``forward``: one number per tensor, the mean of its F_j, estimated from loss differences along random
                directions of that tensor, which the gradient ban allows. ``backpropagation``: every F_j exactly.
            fisher_per_class: training samples of each class that F is measured on.
        """

        alpha: float = 100.0
        fisher: str = "forward"
        fisher_per_class: int = 5

        def __post_init__(self) -> None:
            super().__post_init__()
            positive(fisher_per_class=self.fisher_per_class)
            one_of(fisher=(self.fisher, ("forward", "backpropagation")))

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        self.fisher = nn.Module()  # a buffer for each trained tensor

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        super().begin_task(classes, generator, batches)
        if len(self.tasks) == 1:
            for name, value in self.trainable().items():
                self.fisher.register_buffer(_buffer(name), torch.zeros_like(value, requires_grad=False))
        self.choices = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))

    def penalty(self) -> Tensor:
        parts = [(self.fisher.get_buffer(_buffer(name)) * change.square()).sum() for name, change in self.moved()]
        return 0.5 * torch.stack(parts).sum()

    @classmethod
    def refusal(cls, optimizer: OptimizerInfo, options: Any) -> str | None:
        if options.fisher == "backpropagation" and not optimizer.estimator.exact:
            return "its Fisher information is to be exact (fisher=backpropagation), which takes gradients; fisher=forward takes none"
        return super().refusal(optimizer, options)

    def end_task(self, batches: Iterable[Batch]) -> None:
        measure = self._exact if self.options.fisher == "backpropagation" else self._from_losses
        found = {name: torch.zeros_like(value, requires_grad=False) for name, value in self.trainable().items()}
        examples = 0
        for images, labels in _first_of_classes(batches, self.options.fisher_per_class):
            batch = MiniBatch(images, labels.to(images.device))
            for name, squares in measure(batch):
                found[name] += squares
            examples += len(labels)
        for name, squares in found.items():
            old = self.fisher.get_buffer(_buffer(name))
            total = squares / examples
            total[: len(old)] += old
            setattr(self.fisher, _buffer(name), total)

    def _surprise(self, inputs: Any) -> Tensor:
        """-log p of each example's label, ``[N]``."""
        prefix, labels = inputs
        return cross_entropy(self.head(self.tuning(self.backbone, prefix)), labels)

    def _exact(self, batch: MiniBatch) -> Iterator[tuple[str, Tensor]]:
        """Sums over examples of squared derivatives, by backpropagation."""
        values = self.trainable()
        for image, label in zip(batch.images, batch.labels, strict=True):
            loss = self._surprise(self.prepare(MiniBatch(image[None], label[None])))[0]
            yield from zip(values, (g.square() for g in torch.autograd.grad(loss, list(values.values()))), strict=True)
        self.images_passed += len(batch.images)
        self.images_worked += 3 * len(batch.images)

    @torch.no_grad()
    def _from_losses(self, batch: MiniBatch) -> Iterator[tuple[str, Tensor]]:
        """The same from forward passes, with each tensor's mean in place of its components.

        With z standard normal in one tensor's components, E (z . g)^2 = |g|^2: a squared directional derivative, divided
        by the tensor's size, is an unbiased estimate of the mean squared derivative.
        """
        inputs = self.prepare(batch)
        for name, value in self.trainable().items():
            z = torch.randn(value.shape, generator=self.choices).to(value)
            slopes = _slopes(value, z, lambda: self._surprise(inputs))
            self.images_passed += 2 * len(batch.images)
            self.images_worked += 2 * len(batch.images)
            yield name, torch.full_like(value, float(slopes.square().sum()) / value.numel(), requires_grad=False)


EPS = 1e-3
"""Length of a step along a direction, in standard deviations of its components."""


def _slopes(value: nn.Parameter, z: Tensor, losses: Callable[[], Tensor]) -> Tensor:
    """Two-sided derivatives along ``z`` of each example's loss ``[N]``."""
    here = value.detach().clone()
    try:
        value.copy_(here + EPS * z)
        above = losses()
        value.copy_(here - EPS * z)
        return (above - losses()) / (2 * EPS)
    finally:
        value.copy_(here)


def _first_of_classes(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """The first ``count`` samples of every class."""
    seen: dict[int, int] = {}
    for images, labels in batches:
        chosen = []
        for number, label in enumerate(labels.tolist()):
            seen[label] = seen.get(label, 0) + 1
            if seen[label] <= count:
                chosen.append(number)
        if chosen:
            own = torch.tensor(chosen)
            yield images[own.to(images.device)], labels[own.to(labels.device)]


def _buffer(name: str) -> str:
    return name.replace(".", "-")
