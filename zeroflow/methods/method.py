"""The base class of class-incremental methods, and their registry.

For each task of a stream: ``begin_task``, then (if ``trainable()`` is not empty) optimizer steps on ``losses``, then ``freeze``
and ``end_task`` with the task's training images under the test transform. After that, ``features`` and ``scores`` classify
images among all classes seen so far.

A step calls ``replay`` (samples of earlier tasks for the mini-batch), ``prepare`` (once) and ``losses`` (at each evaluation).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zeroflow import options as options_of
from zeroflow.classifiers import Classifier, classifiers
from zeroflow.data.scenario import Batch
from zeroflow.models.backbone import Backbone
from zeroflow.models.criteria import Criterion, criteria
from zeroflow.models.heads import CosineHead
from zeroflow.models.tuning import tunings
from zeroflow.optim import OptimizerInfo
from zeroflow.registry import Registry


class MiniBatch(NamedTuple):
    """The samples of one step.

    Attributes:
        images: ``[N, C, H, W]``.
        labels: new labels ``[N]``.
        replayed: samples of ``Method.replay``, with images instead of positions, ``[N, ...]``; None: nothing is replayed.
        replayed_labels: their new labels ``[N]``.
    """

    images: Tensor
    labels: Tensor
    replayed: Tensor | None = None
    replayed_labels: Tensor | None = None


class Method(nn.Module, ABC):
    """Base of all methods.

    Args:
        backbone: the frozen feature extractor.
        options: an instance of the class's own ``Options``; default: all at their defaults.
    """

    @dataclass(frozen=True)
    class Options:
        """Settings of the method; each class has its own."""

        def __post_init__(self) -> None:
            """Raise ``ValueError`` for an invalid value."""

    trains: ClassVar[bool] = True
    """Whether any task is trained at all; if not, optimizer and epochs have no effect."""

    all_tasks: ClassVar[bool] = False
    """Whether a task is trained on the samples of all tasks so far."""

    first_task_only: ClassVar[bool] = False
    """Whether no task after the first is trained."""

    any_loss: ClassVar[bool] = False
    """Whether ``losses`` uses ``criterion``; if not, the method has its own loss, and none can be chosen."""

    needs_head: ClassVar[str] = "what it trains ends in a head"
    """Why it cannot be trained with a headless criterion; empty: it can."""

    criterion: Criterion = criteria["cross-entropy"]
    """Classification loss ``criterion(logits, labels)`` ``[N]``, set by a cell's ``loss``; takes features if headless."""

    own_classifier: ClassVar[str | None] = None
    """The default closed-form classifier; None: it classifies in another way."""

    takes_classifiers: ClassVar[tuple[str, ...] | None] = ()
    """The closed-form classifiers that a cell may choose, for the reason in ``why_these``; None: any."""

    why_these: ClassVar[str] = "it classifies in its own way"

    one_head: ClassVar[bool] = False
    """Whether one head covers all classes, so that ``losses`` can be evaluated on old tasks while a new one is learned."""

    takes: str = "images"
    """Input of ``features``: ``images``; the frozen backbone's ``features`` of them, as ``Known``; or ``both``.

    A class that overrides ``features`` takes images, unless it sets this too."""

    images_passed: int = 0
    """Images in forward passes made for training outside the optimizer."""

    images_worked: int = 0
    """The same in units of forward passes: a backward pass counts two more per image."""

    frozen_spaces: int
    """Number of feature spaces that never change again, so that their features may be cached."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "features" in vars(cls):
            cls.takes = vars(cls).get("takes", "images")

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.options: Any = options or self.Options()
        self.frozen_spaces = 0
        if self.own_classifier:
            self.classifier: Classifier = classifiers.get(self.own_classifier).build()

    @abstractmethod
    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        """Prepare for a task with new classes.

        Args:
            classes: the task's new labels.
            generator: source of all initial values and choices.
            batches: the task's training images under the test transform, for methods that are initialised from them; may
                be iterated more than once. None: only shapes are needed, since the values will be restored.
        """

    def new_head(self, classes: int, generator: torch.Generator) -> nn.Module:
        """A cosine head for a task's own classes; the identity where the criterion is headless."""
        if self.criterion.headless:
            return nn.Identity()
        return CosineHead(self.backbone.width, classes, generator=generator)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters to train at this task by name; empty where this task is not trained."""
        return {}

    def replay(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None] | None:
        """Samples of earlier tasks for a mini-batch of ``count`` samples, drawn with ``generator``; None: nothing is replayed.

        It is called some steps ahead, so it must not depend on values that this task trains.

        Returns:
            Either positions ``[count]`` (int64) among all training samples of the stream so far, and None, so that their
            images and labels are looked up; or generated samples ``[count, ...]`` and their labels ``[count]``.
        """
        return None

    def prepare(self, batch: MiniBatch) -> Any:
        """The part of a step that no trained value changes, computed once for all evaluations, without a graph."""
        return self.backbone.prefix(batch.images), batch.labels

    def passes(self) -> tuple[int, int]:
        """Forward passes over a mini-batch in this task: by ``prepare``, and by each evaluation of the loss.

        Frozen layers that ``prepare`` computes for the evaluations count as part of an evaluation.
        """
        return 0, 1

    def losses(self, inputs: Any) -> Tensor:
        """Training losses of a mini-batch's examples ``[N]``, penalties included, from the result of ``prepare``."""
        raise NotImplementedError(f"{type(self).__name__} is not trained")

    def loss(self, inputs: Any) -> Tensor:
        """Training loss of a mini-batch, the mean over its examples."""
        return self.losses(inputs).mean()

    def freeze(self) -> None:
        """Freeze what the task has trained. Called before ``end_task``."""

    @classmethod
    def tunes(cls, options: Any) -> str:
        """The tuning of the backbone, a name in ``tuning.tunings``, which the backbone must support.

        ``none``: only what follows its features is trained. ``full``: anything may be.
        """
        return "full"

    @classmethod
    def refusal(cls, optimizer: OptimizerInfo, options: Any) -> str | None:
        """Why an optimizer cannot train this method with these options; None: it can."""
        return None

    @classmethod
    def stream_refusal(cls, increments: Sequence[int], options: Any) -> str | None:
        """Why this method with these options cannot learn tasks of so many classes; None: it can."""
        return None

    def state(self) -> dict[str, Tensor]:
        """The method's state without the frozen backbone."""
        frozen = {value.data_ptr() for value in self.backbone.state_dict().values()} - {
            0
        }  # others may share its weights
        return {name: value for name, value in self.state_dict().items() if value.data_ptr() not in frozen}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load a ``state()`` saved after as many tasks as this method has begun and frozen."""
        own = self.state_dict(keep_vars=True)
        for name, value in state.items():
            old = own.get(name)
            module, _, buffer = name.rpartition(".")
            if old is None:  # a buffer that the end of a task has registered
                self.get_submodule(module).register_buffer(buffer, value)
            elif old.shape == value.shape:
                old.detach().copy_(value)
            else:  # a buffer that grows with the stream
                setattr(self.get_submodule(module), buffer, value.to(old))

    def set_grad_checkpointing(self, enable: bool) -> None:
        """See ``Backbone.set_grad_checkpointing``."""
        for module in self.modules():
            if isinstance(module, Backbone):
                module.set_grad_checkpointing(enable)

    @abstractmethod
    def end_task(self, batches: Iterable[Batch]) -> None:
        """Compute what classification needs from the task's training images under the test transform."""

    @abstractmethod
    def features(self, images: Tensor, spaces: range) -> Tensor:
        """Features of images in some of the feature spaces: ``[N, len(spaces), d]``."""

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """Scores of all classes seen so far, ``[N, classes]``, from features in all spaces ``[N, spaces, d]``."""


@dataclass(frozen=True)
class MethodInfo:
    """A registered method: its class, built as ``build(backbone, options)``, and one line for listings."""

    name: str
    build: type[Method]
    description: str

    @property
    def options(self) -> type:
        return self.build.Options

    @property
    def trains(self) -> bool:
        return self.build.trains

    def parse(self, options: dict[str, Any], *, where: str = "method_options") -> Any:
        """Options from a mapping; unknown keys and wrong types are ``ConfigError``s."""
        return options_of.parse(self.options, options, owner=f"method {self.name!r}", where=where)


methods: Registry[MethodInfo] = Registry("method")


def register_method(name: str, description: str) -> Callable[[type[Method]], type[Method]]:
    """Register a ``Method`` subclass; it is built as ``cls(backbone, options)``."""

    def decorate(cls: type[Method]) -> type[Method]:
        methods.register(name, MethodInfo(name, cls, description))
        options_of.check_class(cls, owner=f"method {name!r}")
        return cls

    return decorate


def positive(**values: float) -> None:
    """Raise ``ValueError`` for the first value that is not above zero."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name}={value!r}: expected a number > 0")


def odd(**values: int) -> None:
    """Raise ``ValueError`` for the first value that is not an odd number above zero."""
    for name, value in values.items():
        if value < 1 or value % 2 == 0:
            raise ValueError(f"{name}={value!r}: expected an odd number >= 1")


def one_of(**values: tuple[str, Sequence[str]]) -> None:
    """Raise ``ValueError`` for the first value that is not among its choices."""
    for name, (value, choices) in values.items():
        if value not in choices:
            raise ValueError(f"{name}={value!r}: expected {' or '.join(choices)}")


def whole_example(optimizer: OptimizerInfo, tuned_by: str, subspace: int = 0) -> str | None:
    """Why an optimizer cannot train a tuning of this name, or ``subspace`` coordinates of it; None: it can."""
    if subspace and optimizer.estimator.per_example:
        return f"it moves every example of a mini-batch on its own, which coordinates that it shares (subspace={subspace}) cannot"
    if subspace and getattr(optimizer.estimator, "checkpoint", False):
        return (
            f"it computes layers again on the way back, when their values in a subspace (subspace={subspace}) are gone"
        )
    if optimizer.estimator.per_example and not tunings.get(tuned_by).per_example:
        return f"it moves every example of a mini-batch on its own, which values of {tuned_by!r} cannot"
    return None
