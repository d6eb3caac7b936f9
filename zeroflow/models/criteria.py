"""Training losses: of a classifier's logits, and of features without a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow.models.heads import cosine

Loss = Callable[[Tensor, Tensor], Tensor]
"""Computes losses ``[N]`` from a model's outputs ``[N, ...]`` and labels ``[N]``."""


@dataclass(frozen=True)
class Criterion:
    """A loss with one value per example, called with a model's outputs and labels ``[N]``; returns ``[N]``.

    Attributes:
        losses: computes them from logits ``[N, C]``, or from features ``[N, d]`` if ``headless``.
        headless: no head is trained: the examples of a mini-batch classify each other. Such a mini-batch is therefore
            neither split among processes, nor are its examples perturbed one by one.
    """

    losses: Loss
    headless: bool = False

    def __call__(self, answers: Tensor, labels: Tensor) -> Tensor:
        return self.losses(answers, labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def error_rate(logits: Tensor, labels: Tensor) -> Tensor:
    """The 0-1 error itself: 0 where the label's logit is the largest, 1 where another one is larger, 1/2 for a tie.

    It has a graph like any other loss, with a derivative of zero wherever one exists.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (1 - torch.sign(own - others.amax(1))) / 2


SCALE = 16.0
"""Factor on cosines before the softmax of ``class_means``."""


def class_means(features: Tensor, labels: Tensor, judge: Loss = cross_entropy) -> Tensor:
    """Cross-entropy (or ``judge``) of ``SCALE`` x cosine to the mini-batch's class means, leaving each example out of its own.

    It measures what SimpleCIL does with these features on unseen examples. Ours; prototypical networks (Snell et al. 2017)
    have the same means, but split a mini-batch into a support and a query set instead. An example that is alone in its class
    is left out, see ``mean_of``.
    """
    classes, own = torch.unique(labels, return_inverse=True)
    member = F.one_hot(own, len(classes)).to(features)
    sums = member.T @ features  # a mean's length means nothing to a cosine
    others = (sums[own] - features, features)
    logits = SCALE * torch.where(member.bool(), F.cosine_similarity(*others, dim=1)[:, None], cosine(features, sums))
    return mean_of(judge(logits, own), member.sum(0)[own] > 1)


def class_means_error(features: Tensor, labels: Tensor) -> Tensor:
    """The 0-1 error of the same classifier."""
    return class_means(features, labels, error_rate)


def ridge(features: Tensor, labels: Tensor) -> Tensor:
    """Squared error of a ridge classifier fitted on one half of the mini-batch and evaluated on the other, both ways.

    It regresses one-hot labels, with an intercept; the penalty is the mean squared norm of the centred features, so that their
    scale does not matter. Every class is halved. The squared error is what the fit itself minimises; unlike a softmax of such
    outputs, which lie between 0 and 1, it needs no temperature. Source: R2-D2 (Bertinetto et al.,
    "Meta-Learning with Differentiable Closed-Form Solvers", ICLR 2019), Eq. 4-6, without its learned values.
    An example whose class is not in the other half is left out, see ``mean_of``.
    """
    classes, own = torch.unique(labels, return_inverse=True)
    member = F.one_hot(own, len(classes))
    first = (member.cumsum(0) * member).sum(1) % 2 == 1  # the 1st, 3rd, ... of its class
    targets = member.to(features)
    losses = features.new_zeros(len(features))
    for asked in (first, ~first):
        if asked.all() or not asked.any():
            continue
        outputs = ridge_outputs(features[~asked], targets[~asked], features[asked])
        losses = losses.index_put((asked,), (outputs - targets[asked]).square().sum(1))
    known = torch.stack([member[~first].sum(0)[own], member[first].sum(0)[own]])
    return mean_of(losses + 0 * features.sum(1), known[(~first).long(), torch.arange(len(own))] > 0)


def ridge_outputs(features: Tensor, targets: Tensor, asked: Tensor) -> Tensor:
    """Predictions ``[m, C]`` for ``asked`` ``[m, d]`` of a ridge regression of ``targets`` ``[n, C]`` on ``features`` ``[n, d]``."""
    middle, level = features.mean(0), targets.mean(0)
    centred = features - middle
    products = centred @ centred.T  # n x n, where d x d may be larger
    penalty = products.diagonal().mean().clamp(min=torch.finfo(features.dtype).tiny)
    weights = torch.linalg.solve(products + penalty * torch.eye(len(features)).to(features), targets - level)
    return level + (asked - middle) @ centred.T @ weights


def mean_of(losses: Tensor, kept: Tensor) -> Tensor:
    """Rescale losses ``[N]`` so that their mean is that of the ``kept`` ones ``[N]``; the others become zero.

    If none is kept, all losses and derivatives are zero.
    """
    return torch.where(kept, losses, 0.0) * (len(losses) / kept.sum().clamp(min=1).to(losses))


criteria: Mapping[str, Criterion] = {
    "cross-entropy": Criterion(cross_entropy),
    "error-rate": Criterion(error_rate),
    "class-means": Criterion(class_means, headless=True),
    "class-means-error": Criterion(class_means_error, headless=True),
    "ridge": Criterion(ridge, headless=True),
}
"""Criteria by name, as in a cell's ``loss``; the first one is the default."""
