"""EASE: an adapter and a subspace for every task, and old prototypes completed in new subspaces.

Source: Zhou et al., "Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental Learning", CVPR 2024.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from zeroflow.classifiers import LDA
from zeroflow.data.scenario import Batch
from zeroflow.methods.method import Method, register_method
from zeroflow.methods.options import AdapterOptions
from zeroflow.methods.prototypes import class_means
from zeroflow.models.adapters import AdapterStack
from zeroflow.models.backbone import Backbone, Prefix
from zeroflow.models.heads import cosine


@register_method("ease", "a fresh adapter per task; prototypes in every subspace, old ones completed by similarity")
class EASE(Method):
    """Task t trains adapter t with a throw-away cosine head on the task's own classes, then freezes it.

    With the classifier ``lda``, a linear discriminant replaces the cosine to a prototype; each space has its own covariance,
    of the classes seen in it (ours).

    Spaces are numbered by task; with ``frozen_space``, the bare backbone comes first. ``prototypes[k, c]`` is class c's mean
    feature in space k, completed (Eq. 8) where c is older than the task of space k.
    """

    any_loss = True
    own_classifier = "class-means"
    takes_classifiers = ("class-means", "lda")
    why_these = "of an old class there are no images in a newer task's space, only a mean that is completed"
    needs_head = ""
    prototypes: Tensor

    @dataclass(frozen=True)
    class Options(AdapterOptions):
        """Options of adapters and of the ensemble.

        Attributes:
            alpha: weight of the spaces of other tasks, divided by their number (Eq. 10).
            recalculate_similarity: complete every old task in every newer space again at each stage, with the classes of
                all later tasks as references; otherwise only in the newest space, once. With ``diagonal_only``, only
                discriminants use what is completed.
            reweight: the sum of Eq. 9-10 with alpha; otherwise one cosine over the concatenated features of all spaces, the
                bare backbone included, without ``alpha`` and ``beta``, as in the authors' code. Discriminants are summed
                either way, without it all with weight 1.
            diagonal_only: score a class in its own task's space only, and in the bare backbone's.
            frozen_space: add the bare backbone as one more space, with weight ``beta``.
            beta: weight of the bare backbone's space.

        An option that the others leave without effect is refused.
        """

        alpha: float = 0.1
        recalculate_similarity: bool = True
        reweight: bool = True
        diagonal_only: bool = False
        frozen_space: bool = False
        beta: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("alpha", "beta"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name}={getattr(self, name)!r}: expected a number >= 0")
            if self.beta and not (self.frozen_space and self.reweight):
                raise ValueError(f"beta={self.beta!r}: expected together with frozen_space and reweight")
            if self.frozen_space and self.reweight and not self.beta:
                raise ValueError("frozen_space=True: a space without weight; expected beta > 0, or reweight=False")
            usual = type(self).alpha
            if self.alpha != usual and (self.diagonal_only or not self.reweight):
                why = "diagonal_only=True" if self.diagonal_only else "reweight=False"
                raise ValueError(
                    f"alpha={self.alpha!r}: expected {usual!r}, its default, since nothing has it with {why}"
                )

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        self.adapters = nn.ModuleList()
        self.head: nn.Module | None = None
        self.tasks: list[range] = []
        self.first = int(self.options.frozen_space)  # number of the first task's space
        self.spaces = nn.ModuleList()  # a discriminant for each, where the classifier is not class means
        self.register_buffer("prototypes", torch.empty(0, 0, backbone.width))

    @classmethod
    def tunes(cls, options: Any) -> str:
        return "adapter"

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        opt, backbone = self.options, self.backbone
        self.tasks.append(classes)
        self.adapters.append(
            AdapterStack(
                backbone.widths,
                opt.bottleneck,
                scale=opt.scale,
                dropout=opt.dropout,
                generator=generator,
            )
        )
        self.head = self.new_head(len(classes), generator)
        if isinstance(self.classifier, LDA):
            fresh = 1 if self.spaces else 1 + self.first
            self.spaces.extend(copy.deepcopy(self.classifier) for _ in range(fresh))
            for discriminant in self.discriminants:
                seen = range(classes.stop) if not len(discriminant.count) else classes
                discriminant.begin_task(seen, backbone.width, generator)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def losses(self, inputs: tuple[Prefix, Tensor]) -> Tensor:
        assert self.head is not None, "no task has begun"
        prefix, labels = inputs
        logits = self.head(self.backbone(prefix, self.adapters[-1]))
        return self.criterion(logits, labels - self.tasks[-1].start)

    def freeze(self) -> None:
        self.head = None
        self.requires_grad_(False).eval()
        self.frozen_spaces = self.first + len(self.tasks)

    def end_task(self, batches: Iterable[Batch]) -> None:
        means = class_means(lambda features: features, self._taken_up(batches), self.tasks[-1])
        self._add(means.transpose(0, 1))
        self._complete()
        for space, discriminant in enumerate(self.discriminants):
            discriminant.fit(self.prototypes[space].double())

    def _taken_up(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Features ``[N, spaces, d]`` in the place of images, once the discriminants have seen them."""
        for images, labels in batches:
            features = self.features(images, range(self.frozen_spaces))
            for space, discriminant in enumerate(self.discriminants):
                discriminant.add(features[:, space], labels)
            yield features, labels

    @torch.no_grad()
    def features(self, images: Tensor, spaces: range) -> Tensor:
        prefix = self.backbone.prefix(images)  # shared by all spaces
        stacks = [None] * self.first + [*self.adapters]
        return torch.stack([self.backbone(prefix, stacks[space]) for space in spaces], dim=1)

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Eq. 9-10: sum over spaces k of w[i, k] * cos(f_k(x), P[k, c]) for class c of task i; see ``reweight``."""
        if not self.options.reweight and not self.discriminants:
            return cosine(features.flatten(1), self._side_by_side().flatten(1))
        kind = torch.float64 if self.discriminants else features.dtype
        total = features.new_zeros(len(features), self.tasks[-1].stop, dtype=kind)
        if self.options.frozen_space:
            weight = self.options.beta if self.options.reweight else 1.0
            total += weight * self._similar(features[:, 0], 0)
        for number in range(len(self.tasks)):
            similar = self._similar(features[:, self.first + number], self.first + number)
            for task, classes in enumerate(self.tasks):
                own = slice(classes.start, classes.stop)
                total[:, own] += self._weight(task, number) * similar[:, own]
        return total

    def _side_by_side(self) -> Tensor:
        """Every class's prototypes in all spaces, ``[classes, spaces, d]``; zero in spaces that are not used."""
        kept = self.prototypes.transpose(0, 1).clone()
        if self.options.diagonal_only:
            for task, classes in enumerate(self.tasks):
                others = [self.first + other for other in range(len(self.tasks)) if other != task]
                kept[classes.start : classes.stop, others] = 0
        return kept

    @property
    def discriminants(self) -> list[LDA]:
        """One discriminant per space; none where the classifier is class means."""
        return cast(list[LDA], [*self.spaces])

    def _similar(self, features: Tensor, space: int) -> Tensor:
        """Similarity of features ``[N, d]`` in a space to each class, ``[N, classes]``."""
        if self.discriminants:
            # Discriminants compare classes within one space only; posteriors are comparable across spaces.
            return self.discriminants[space].log_posteriors(features)
        return cosine(features, self.prototypes[space])

    def _weight(self, task: int, space: int) -> float:
        if task == space:
            return 1.0
        if self.options.diagonal_only:
            return 0.0
        return self.options.alpha / (len(self.tasks) - 1) if self.options.reweight else 1.0

    def _add(self, means: Tensor) -> None:
        """Append the new classes' prototypes ``means`` ``[spaces, new classes, d]``, with room for the newest space."""
        old = self.prototypes.to(means)
        grown = means.new_zeros(len(means), old.shape[1] + means.shape[1], means.shape[2])
        grown[: old.shape[0], : old.shape[1]] = old
        grown[:, old.shape[1] :] = means
        self.prototypes = grown

    def _complete(self) -> None:
        """Eq. 8: an old class in a newer space is a mixture of later classes, weighted by similarity in its own space."""
        newest = len(self.tasks) - 1
        known = (
            self.prototypes.clone()
        )  # references are measured prototypes only: those of tasks k..t in spaces s and k
        for old in range(newest):
            spaces = range(old + 1, newest + 1) if self.options.recalculate_similarity else range(newest, newest + 1)
            own = slice(self.tasks[old].start, self.tasks[old].stop)
            for space in spaces:
                since = slice(self.tasks[space].start, self.tasks[newest].stop)
                similar = cosine(known[self.first + old, own], known[self.first + old, since])
                self.prototypes[self.first + space, own] = (
                    torch.softmax(similar, dim=1) @ known[self.first + space, since]
                )
