"""What a class-incremental method is, and the registry of methods.

A method lives through a stream: for each task ``begin_task``, then (if ``trainable()`` is not empty) steps of an
optimizer on ``losses``, then ``freeze`` and ``end_task`` with the task's training images under the test transform. At any
time after that ``features`` and ``scores`` classify images among all classes seen so far.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zeroflow.data.scenario import Batch
from zeroflow.errors import ConfigError, unknown
from zeroflow.models.backbone import Backbone, Prefix
from zeroflow.registry import Registry


class Method(nn.Module, ABC):
    """Base of all methods.

    Args:
        backbone: the frozen feature extractor.
        options: an instance of the class's own ``Options``.
    """

    @dataclass(frozen=True)
    class Options:
        """Settings of the method; each class has its own."""

    trains: ClassVar[bool] = True
    """Whether any task is trained at all; if not, optimizer and epochs mean nothing."""

    frozen_spaces: int
    """How many feature spaces there are whose features never change again: they may be cached."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.frozen_spaces = 0

    @abstractmethod
    def begin_task(self, classes: range, generator: torch.Generator) -> None:
        """Get ready for a task that brings ``classes`` (new labels); ``generator`` makes all initial values."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters to train at this task by name; empty where this task is not trained."""
        return {}

    def losses(self, images: Tensor | Prefix, labels: Tensor) -> Tensor:
        """Training losses of a mini-batch's examples ``[N]``; every penalty is inside. ``labels`` are new labels ``[N]``."""
        raise NotImplementedError(f"{type(self).__name__} is not trained")

    def loss(self, images: Tensor | Prefix, labels: Tensor) -> Tensor:
        """Training loss of a mini-batch, the mean over its examples."""
        return self.losses(images, labels).mean()

    def freeze(self) -> None:
        """Training of the task is over: nothing learned in it changes any more. Comes before ``end_task``."""

    def state(self) -> dict[str, Tensor]:
        """All that the stream has left in the method, apart from the frozen backbone."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over ``state()`` of as many tasks as this one has begun and frozen."""
        own = self.state_dict(keep_vars=True)
        for name, value in state.items():
            old = own[name]
            if old.shape == value.shape:
                old.detach().copy_(value)
            else:  # a buffer that grows with the stream
                module, _, buffer = name.rpartition(".")
                setattr(self.get_submodule(module), buffer, value.to(old))

    @abstractmethod
    def end_task(self, batches: Iterable[Batch]) -> None:
        """Freeze what was learned and take what is needed from the task's training images, plainly transformed."""

    @abstractmethod
    def features(self, images: Tensor, spaces: range) -> Tensor:
        """Features of images in some of the feature spaces: ``[N, len(spaces), d]``."""

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """From features in all spaces ``[N, spaces, d]`` to one score for every class seen so far ``[N, classes]``."""


@dataclass(frozen=True)
class MethodInfo:
    """A registered method: how to build it, from which options, and one line for listings."""

    name: str
    build: Callable[[Backbone, Any], Method]
    options: type
    trains: bool
    description: str

    def parse(self, options: dict[str, Any], *, where: str = "method_options") -> Any:
        """Options from a mapping; unknown keys and wrong types are ``ConfigError``s."""
        known = {f.name: f for f in fields(self.options)}
        for key, value in options.items():
            if key not in known:
                raise unknown(f"option of method {self.name!r}", key, known, where=where)
            default = known[key].default
            wanted = (int, float) if isinstance(default, float) else type(default)
            if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
                expected = "a number" if isinstance(default, float) else f"a {type(default).__name__}"
                raise ConfigError(f"{where}.{key}={value!r}: expected {expected}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{where}.{key}={value!r}: expected a finite number")
        try:
            return self.options(**options)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None


methods: Registry[MethodInfo] = Registry("method")


def register_method(name: str, description: str) -> Callable[[type[Method]], type[Method]]:
    """Register a ``Method`` subclass; it is built as ``cls(backbone, options)``."""

    def decorate(cls: type[Method]) -> type[Method]:
        methods.register(name, MethodInfo(name, cls, cls.Options, cls.trains, description))
        return cls

    return decorate


def positive(**values: float) -> None:
    """Raise ``ValueError`` for the first value that is not above zero."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name}={value!r}: expected a number > 0")
