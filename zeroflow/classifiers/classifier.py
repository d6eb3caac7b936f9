"""The base class of closed-form classifiers (features in, scores out) and their registry.

Statistics are sums over samples in float64. They depend neither on the order of tasks nor on how a task is split into
mini-batches, and those of two processes are merged by addition.

For each task of a stream, call ``begin_task``, then ``add`` with the features of its training images in any number of parts,
then ``end_task``; ``scores`` may be called at any time after that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zeroflow.options import check_class
from zeroflow.registry import Registry


class Classifier(nn.Module, ABC):
    """Base class of closed-form classifiers. Nothing is trained; statistics are buffers.

    Args:
        options: an instance of the class's own ``Options``; default: all at their defaults.
    """

    @dataclass(frozen=True)
    class Options:
        """Settings of the classifier; each class has its own. A value out of range is a ``ValueError``."""

    draws: ClassVar[bool] = False
    """Whether it draws random numbers, so that its results differ by seed."""

    name: ClassVar[str] = ""
    """What it is registered as."""

    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.options: Any = options or self.Options()

    @abstractmethod
    def begin_task(self, classes: range, width: int, generator: torch.Generator) -> None:
        """Make room for ``classes`` (new labels, which follow the earlier ones) with features ``[N, width]``.

        ``generator`` is the source of all randomness; it is used at the first task only.
        """

    @abstractmethod
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add some samples of the task to the statistics: features ``[N, width]``, new labels ``[N]``.

        Raises:
            ValueError: a feature is not finite.
        """

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the statistics of another classifier with the same classes, options and random numbers."""

    @abstractmethod
    def end_task(self) -> None:
        """Finish the task, once all of its samples have been added: prepare for ``scores``."""

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """Scores of features ``[N, width]`` among all classes seen so far: ``[N, classes]``, in the features' dtype."""

    def finite(self, features: Tensor) -> Tensor:
        """The features, detached; ``ValueError`` if any is not finite, since it would spoil the sums for good."""
        if not torch.isfinite(features).all():
            bad = int((~torch.isfinite(features).all(dim=-1)).sum())
            raise ValueError(
                f"classifier {self.name!r}: expected finite features, found nan or inf in {bad} of {len(features)}"
            )
        return features.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a model to its device, but not to its precision: statistics stay as precise as they are."""
        for name, value in self._buffers.items():
            if value is not None:
                device = fn(torch.empty(0, dtype=value.dtype, device=value.device)).device
                self._buffers[name] = value.to(device)
        return self


@dataclass(frozen=True)
class ClassifierInfo:
    """A registered classifier: its class, built as ``build(options)``, and one line for listings."""

    name: str
    build: type[Classifier]
    description: str

    @property
    def options(self) -> type:
        return self.build.Options

    @property
    def draws(self) -> bool:
        return self.build.draws


classifiers: Registry[ClassifierInfo] = Registry("classifier")


def register_classifier(name: str, description: str) -> Callable[[type[Classifier]], type[Classifier]]:
    """Register a ``Classifier`` subclass; outside packages call this from a ``zeroflow.classifiers`` entry point."""

    def decorate(cls: type[Classifier]) -> type[Classifier]:
        classifiers.register(name, ClassifierInfo(name, cls, description))
        check_class(cls, owner=f"classifier {name!r}")
        cls.name = name
        return cls

    return decorate
