"""What training makes small: losses of a classifier's logits, and losses of features that need no classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow.models.heads import cosine

Loss = Callable[[Tensor, Tensor], Tensor]
"""Losses ``[N]`` from what a model answers ``[N, ...]`` and labels ``[N]``."""


@dataclass(frozen=True)
class Criterion:
    """Losses ``[N]`` of the examples of a mini-batch, called with what a model answers and with labels ``[N]``.

    Attributes:
        losses: from logits ``[N, C]``, or where it is ``headless`` from features ``[N, d]``.
        headless: there is no head among the trained values: the examples of a mini-batch are classified by each other. So they
            must meet: such a mini-batch is neither cut among processes, nor are its examples moved one by one.
    """

    losses: Loss
    headless: bool = False

    def __call__(self, answers: Tensor, labels: Tensor) -> Tensor:
        return self.losses(answers, labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def error_rate(logits: Tensor, labels: Tensor) -> Tensor:
    """The 0-1 error itself: 0 where the label's logit is the largest, 1 where another one is larger, 1/2 for a tie.

    It has a graph like any other loss, and a derivative that is zero wherever there is one.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (1 - torch.sign(own - others.amax(1))) / 2


SCALE = 16.0
"""Of cosines, before the softmax of ``class_means``."""


def class_means(features: Tensor, labels: Tensor, judge: Loss = cross_entropy) -> Tensor:
    """Cross-entropy (or what else is to ``judge``) on ``SCALE`` x cosine to the mini-batch's own class means, the example left out of its own class's.

    It is what SimpleCIL will do with these features, asked of examples that it has not seen. Ours; the means are those of
    prototypical networks (Snell et al. 2017), which part a mini-batch into examples to average and examples to ask instead.
    An example whose class has no other is left out, see ``mean_of``.
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
    """Squared error of a ridge classifier that is fitted on one half of the mini-batch and asked of the other, both ways.

    Its outputs are regressed on one-hot labels, with an intercept; the penalty is the mean squared length of the centred
    features, so that their scale does not matter. Every class is halved. The squared error is what the fit itself makes small:
    it needs no temperature, as a softmax of such outputs would, which lie between 0 and 1. Source: R2-D2 (Bertinetto et al.,
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
    """What a ridge regression of ``targets`` ``[n, C]`` on ``features`` ``[n, d]`` gives for ``asked`` ``[m, d]``: ``[m, C]``."""
    middle, level = features.mean(0), targets.mean(0)
    centred = features - middle
    products = centred @ centred.T  # n x n, where d x d may be larger
    penalty = products.diagonal().mean().clamp(min=torch.finfo(features.dtype).tiny)
    weights = torch.linalg.solve(products + penalty * torch.eye(len(features)).to(features), targets - level)
    return level + (asked - middle) @ centred.T @ weights


def mean_of(losses: Tensor, kept: Tensor) -> Tensor:
    """Losses ``[N]`` whose mean is that over the ``kept`` ones ``[N]``; those left out count zero.

    Where none is kept, all are zero and so is any derivative: the mini-batch teaches nothing.
    """
    return torch.where(kept, losses, 0.0) * (len(losses) / kept.sum().clamp(min=1).to(losses))


criteria: Mapping[str, Criterion] = {
    "cross-entropy": Criterion(cross_entropy),
    "error-rate": Criterion(error_rate),
    "class-means": Criterion(class_means, headless=True),
    "class-means-error": Criterion(class_means_error, headless=True),
    "ridge": Criterion(ridge, headless=True),
}
"""By the name that the key ``loss`` of a cell has; the first one is the default."""
