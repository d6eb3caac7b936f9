"""What a class-incremental method is, and the registry of methods.

A method lives through a stream: for each task ``begin_task``, then (if ``trainable()`` is not empty) steps of an
optimizer on ``losses``, then ``freeze`` and ``end_task`` with the task's training images under the test transform. At any
time after that ``features`` and ``scores`` classify images among all classes seen so far.

A step goes ``replay`` (what of earlier tasks joins the mini-batch) -> ``prepare`` (once) -> ``losses`` (at each evaluation).
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
    """What a step learns from.

    Attributes:
        images: ``[N, C, H, W]``.
        labels: new labels ``[N]``.
        replayed: what ``Method.replay`` gave for each of them, with images in the place of positions; None: nothing.
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
            """Raise ``ValueError`` for a value that cannot be."""

    trains: ClassVar[bool] = True
    """Whether any task is trained at all; if not, optimizer and epochs mean nothing."""

    all_tasks: ClassVar[bool] = False
    """Whether a task is trained on the samples of all tasks so far."""

    first_task_only: ClassVar[bool] = False
    """Whether no task after the first is trained."""

    any_loss: ClassVar[bool] = False
    """Whether ``losses`` is made of ``criterion``; if not, it has a loss of its own, and none can be chosen."""

    needs_head: ClassVar[str] = "what it trains ends in a head"
    """Why it cannot be trained by a headless criterion; empty: it can."""

    criterion: Criterion = criteria["cross-entropy"]
    """The classification loss ``criterion(logits, labels)`` ``[N]``, as a cell's ``loss`` says; of features if headless."""

    own_classifier: ClassVar[str | None] = None
    """The closed-form classifier it takes where a cell names none; None: it classifies in another way."""

    takes_classifiers: ClassVar[tuple[str, ...] | None] = ()
    """The closed-form classifiers that a cell may choose, and ``why_these``; None: any."""

    why_these: ClassVar[str] = "it classifies in its own way"

    one_head: ClassVar[bool] = False
    """Whether ``losses`` can tell what old tasks lose while a new one is learned."""

    takes: str = "images"
    """What ``features`` is given: ``images``; the frozen backbone's ``features`` of them, as ``Known``; or ``both``.

    A class with ``features`` of its own takes images, unless it says otherwise."""

    images_passed: int = 0
    """Images of the forward passes made beside the optimizer's, to learn something from them."""

    images_worked: int = 0
    """The same as work in forward passes: an image of a backward pass counts twice more."""

    frozen_spaces: int
    """How many feature spaces there are whose features never change again: they may be cached."""

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
        """Get ready for a task that brings ``classes`` (new labels).

        Args:
            classes: the new labels.
            generator: makes all initial values and choices.
            batches: the task's training images, plainly transformed, for those who start from them; None where the
                values after this task are known already and only their shapes are needed. They can be gone through
                again.
        """

    def new_head(self, classes: int, generator: torch.Generator) -> nn.Module:
        """A cosine head for a task's own classes; where the criterion is headless, one that hands features on."""
        if self.criterion.headless:
            return nn.Identity()
        return CosineHead(self.backbone.width, classes, generator=generator)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters to train at this task by name; empty where this task is not trained."""
        return {}

    def replay(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None] | None:
        """What of earlier tasks joins a mini-batch of ``count`` samples, drawn with ``generator``; None: nothing does.

        It is asked for some steps ahead, so nothing that the steps of this task change may enter it.

        Returns:
            Either positions ``[count]`` (int64) among all training samples of the stream so far, and None: their images
            and labels are looked up; or made-up samples ``[count, ...]`` and their labels ``[count]``.
        """
        return None

    def prepare(self, batch: MiniBatch) -> Any:
        """The part of a step that no trained value changes, made once for all evaluations, without a graph."""
        return self.backbone.prefix(batch.images), batch.labels

    def passes(self) -> tuple[int, int]:
        """Forward passes over a mini-batch's samples in this task: of ``prepare``, and of each evaluation of the loss.

        What an evaluation takes up from ``prepare`` (the frozen layers) counts as part of the evaluation.
        """
        return 0, 1

    def losses(self, inputs: Any) -> Tensor:
        """Training losses of a mini-batch's examples ``[N]`` from ``prepare``'s answer; every penalty is inside."""
        raise NotImplementedError(f"{type(self).__name__} is not trained")

    def loss(self, inputs: Any) -> Tensor:
        """Training loss of a mini-batch, the mean over its examples."""
        return self.losses(inputs).mean()

    def freeze(self) -> None:
        """Training of the task is over: nothing learned in it changes any more. Comes before ``end_task``."""

    @classmethod
    def tunes(cls, options: Any) -> str:
        """What is trained beside or inside the backbone, as ``tuning.tunings`` names it: what the backbone must allow.

        ``none``: nothing but what stands behind its features. ``full``: whatever there is.
        """
        return "full"

    @classmethod
    def refusal(cls, optimizer: OptimizerInfo, options: Any) -> str | None:
        """Why an optimizer cannot train this method with these options; None: it can."""
        return None

    def state(self) -> dict[str, Tensor]:
        """All that the stream has left in the method, apart from the frozen backbone."""
        frozen = {value.data_ptr() for value in self.backbone.state_dict().values()} - {
            0
        }  # others may share its weights
        return {name: value for name, value in self.state_dict().items() if value.data_ptr() not in frozen}

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

    def set_grad_checkpointing(self, enable: bool) -> None:
        """See ``Backbone.set_grad_checkpointing``."""
        for module in self.modules():
            if isinstance(module, Backbone):
                module.set_grad_checkpointing(enable)

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
    """Raise ``ValueError`` for the first value that is none of its choices."""
    for name, (value, choices) in values.items():
        if value not in choices:
            raise ValueError(f"{name}={value!r}: expected {' or '.join(choices)}")


def whole_example(optimizer: OptimizerInfo, tuned_by: str, subspace: int = 0) -> str | None:
    """Why an optimizer cannot train a tuning of this name, or so many coordinates of it; None: it can."""
    if subspace and optimizer.estimator.per_example:
        return f"it moves every example of a mini-batch on its own, which coordinates that it shares (subspace={subspace}) cannot"
    if subspace and getattr(optimizer.estimator, "checkpoint", False):
        return (
            f"it computes layers again on the way back, when their values in a subspace (subspace={subspace}) are gone"
        )
    if optimizer.estimator.per_example and not tunings.get(tuned_by).per_example:
        return f"it moves every example of a mini-batch on its own, which values of {tuned_by!r} cannot"
    return None
