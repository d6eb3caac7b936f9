"""What a method or classifier of one's own remembers: what an interrupted cell would lose is refused."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from zeroflow import TrialConfig, run_trial
from zeroflow.classifiers import classifiers, register_classifier
from zeroflow.classifiers.class_means import ClassMeans
from zeroflow.errors import ConfigError
from zeroflow.methods import Method, MiniBatch, methods, register_method
from zeroflow.methods.finetune import FineTuning
from zeroflow.models.heads import CosineHead
from zeroflow.optim import LocalExecutor
from zeroflow.trial import own_state
from zeroflow.trial.placement import Placement
from zeroflow.trial.trial import Trial


class Solved(ClassMeans):
    """What the end of a task has solved."""

    def end_task(self) -> None:
        super().end_task()
        self.kept = self.means.sum(0)


class Contained(ClassMeans):
    def end_task(self) -> None:
        self.kept = {"of tasks": [self.means.sum(0)]}


class Grown(ClassMeans):
    """One entry for each class: the tensor is another one in every task."""

    def begin_task(self, classes: range, *others: Any) -> None:
        super().begin_task(classes, *others)
        old = self.kept if classes.start else torch.zeros(0)
        self.kept = torch.cat([old, torch.zeros(len(classes))])

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        super().add(features, labels)
        self.kept[labels] += 1


class Counted(ClassMeans):
    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.kept = 0

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        super().add(features, labels)
        self.kept += len(labels)


class Lazy(ClassMeans):
    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        super().add(features, labels)
        self.kept = getattr(self, "kept", np.zeros(1)) + len(labels)


class Drawing(ClassMeans):
    """Random numbers go on from task to task."""

    def begin_task(self, classes: range, width: int, generator: torch.Generator) -> None:
        super().begin_task(classes, width, generator)
        if not classes.start:
            self.kept = torch.Generator().manual_seed(0)

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        return super().scores(features) + 1e-3 * torch.rand(1, generator=self.kept)


class Buffered(ClassMeans):
    """And what is made anew for each task: nothing is lost."""

    def begin_task(self, *arguments: Any) -> None:
        super().begin_task(*arguments)
        self.scratch, self.label, self.lazy = torch.zeros(3), "of this task", None
        self.half, self.log, self.itself = torch.zeros((), dtype=torch.bfloat16), logging.getLogger(), Cyclic()

    def end_task(self) -> None:
        super().end_task()
        self.register_buffer("seen", self.means.sum(0))


class Cyclic:
    def __init__(self) -> None:
        self.own = weakref.ref(self)


LOST = (Solved, Contained, Grown, Counted, Lazy, Drawing)


@pytest.fixture
def config(request: pytest.FixtureRequest, some_drawings: str, tiny_vit: dict) -> TrialConfig:
    """A cell of SimpleCIL with a classifier."""
    kind = request.param
    if (name := f"own-{kind.__name__.lower()}") not in classifiers.names():
        register_classifier(name, "made by the tests")(kind)
    cell = {**tiny_vit, "dataset": some_drawings, "tasks": 10, "stop_after": 3}
    return TrialConfig.from_dict({**cell, "method": "simplecil", "classifier": name})


@pytest.mark.parametrize("config", LOST, indirect=True)
def test_what_would_be_lost_is_refused_by_name(config: TrialConfig) -> None:
    expected = r"\w+\.kept would be lost where a cell is interrupted; .*self\.register_buffer\('kept', \.\.\.\)"
    with pytest.raises(ConfigError, match=expected):
        run_trial(config)


@pytest.mark.parametrize("config", [Buffered], indirect=True)
def test_a_buffer_comes_back_after_an_interruption(config: TrialConfig, tmp_path) -> None:

    def stop(stage: int, *_: object) -> None:
        if stage == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(config, folder=tmp_path, on_stage=stop)
    np.testing.assert_array_equal(run_trial(config, folder=tmp_path).accuracy_matrix, run_trial(config).accuracy_matrix)


@pytest.fixture
def everything_is_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """zeroflow's own methods and classifiers are looked at like those of others."""
    for registry in (methods, classifiers):
        for _, info in registry.items():
            monkeypatch.setattr(info.build, "__module__", "mine")
    assert own_state.is_own(methods.get("simplecil").build(torch.nn.Identity()))
    yield


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_zeroflows_own_methods_would_pass(
    name: str, everything_is_own: None, some_drawings: str, tiny_vit: dict[str, Any]
) -> None:
    cell = {**tiny_vit, "dataset": some_drawings, "tasks": 10, "stop_after": 3, "method": name}
    training = {"optimizer": "zo-sgd", "lr": 1e-3, "epochs": 1} if methods.get(name).trains else {}
    own = {} if name != "foro" else {"optimizer": "es-cma", "lr": 1.0, "epochs": 1}
    run_trial(TrialConfig.from_dict({**cell, **training, **own}))


@pytest.fixture
def two_tasks(some_drawings: str, tiny_vit: dict[str, Any]) -> Callable[..., TrialConfig]:
    """A cell of two tasks of a method of one's own, which trains a head."""

    def made(kind: type[Method], **training: Any) -> TrialConfig:
        if (name := kind.__name__.lower()) not in methods.names():
            register_method(name, "made by the tests")(kind)
        cell = {**tiny_vit, "dataset": some_drawings, "tasks": 10, "stop_after": 2, "method": name}
        usual = {"method_options": {"tune": "none"}, "optimizer": "zo-sgd", "lr": 1e-3, "epochs": 1}
        return TrialConfig.from_dict({**cell, **(training or usual)})

    return made


class InPlace(FineTuning):
    """It trains the backbone that it was given."""

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {**super().trainable(), **{f"own.{name}": value for name, value in self.backbone.named_parameters()}}


def test_the_backbone_itself_is_not_trained(two_tasks: Callable[..., TrialConfig]) -> None:
    """Its weights are saved with no task, and what is kept of its features would be of other weights."""
    expected = r"InPlace trains own\.\S+ and \d+ more of the backbone itself, which counts as frozen; train a copy"
    with pytest.raises(ConfigError, match=expected):
        run_trial(two_tasks(InPlace))


class Passing(FineTuning):
    """A method whose own losses need what an earlier task has left behind."""

    def begin_task(self, classes: range, generator: torch.Generator, batches: Any = None) -> None:
        super().begin_task(classes, generator, batches)
        if classes.start and batches is not None:
            assert self.kept is not None

    def end_task(self, batches: Any) -> None:
        super().end_task(batches)
        self.kept = torch.ones(1)


def test_a_method_that_could_not_go_on_is_refused(two_tasks: Callable[..., TrialConfig]) -> None:
    expected = r"Passing: after an interruption it could not begin a task: AttributeError: .*register_buffer\('kept', "
    with pytest.raises(ConfigError, match=expected):
        run_trial(two_tasks(Passing))


class Normed(Method):
    """Frozen features, a trained batch norm and a head that grows."""

    def begin_task(self, classes: range, generator: torch.Generator, batches: Any = None) -> None:
        if not classes.start:
            self.norm = torch.nn.BatchNorm1d(self.backbone.width)
            self.head = CosineHead(self.backbone.width, 0, sigma=10.0)
        self.head.grow(len(classes), generator)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def prepare(self, batch: MiniBatch) -> Any:
        return self.backbone(batch.images), batch.labels

    def losses(self, inputs: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.head(self.norm(inputs[0])), inputs[1], reduction="none")

    def end_task(self, batches: Any) -> None: ...

    def features(self, images: torch.Tensor, spaces: range) -> torch.Tensor:
        return self.backbone(images)[:, None]

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(features[:, 0]))


@pytest.mark.parametrize(("optimizer", "queries"), [("fo-sgd", None), ("zo-sgd", 1), ("zo-sgd", 4)])
def test_a_methods_statistics_see_each_mini_batch_once_and_come_back_after_an_interruption(
    two_tasks: Callable[..., TrialConfig], tmp_path, optimizer: str, queries: int | None
) -> None:
    config = two_tasks(Normed, optimizer=optimizer, queries=queries, epochs=4, batch_size=12, lr=0.05)
    trial = Trial(config, Placement(), LocalExecutor())
    whole = trial.run()
    assert int(trial.method.norm.num_batches_tracked) == len(whole.steps) == 2 * 4 * 2  # 2 tasks of 24 drawings

    epochs = iter(range(3))

    def stop(*_: Any) -> None:
        if next(epochs, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(config, folder=tmp_path, on_progress=stop)
    again = run_trial(config, folder=tmp_path)
    assert [step.loss for step in again.steps] == [step.loss for step in whole.steps]
    np.testing.assert_array_equal(again.accuracy_matrix, whole.accuracy_matrix)
    assert again.costs["forward_passes"] == whole.costs["forward_passes"]
