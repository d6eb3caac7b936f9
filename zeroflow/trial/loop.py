"""A trial: the stream task by task, each trained, frozen and evaluated on everything seen so far."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroflow.classifiers import classifiers
from zeroflow.data import Scenario, class_incremental, class_order, datasets, even_increments, load_dataset
from zeroflow.data.dataset import ImageDataset
from zeroflow.data.decoded import CACHE_BYTES
from zeroflow.data.scenario import Batch, Task, View, joined
from zeroflow.data.transforms import transform_of
from zeroflow.errors import ConfigError
from zeroflow.methods import Method, MiniBatch, methods
from zeroflow.models.access import accesses, open_backbone
from zeroflow.models.criteria import criteria
from zeroflow.models.endpoint import BlackBox
from zeroflow.optim import (
    Executor,
    Journal,
    LocalExecutor,
    NonFiniteLoss,
    Slice,
    ThreeStepOptimizer,
    create_optimizer,
    gradient_ban,
    optimizers,
)
from zeroflow.optim.objective import Closure
from zeroflow.telling import Tell, silent
from zeroflow.trial import randomness
from zeroflow.trial.checkpoint import Checkpoints
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.features import FrozenFeatures
from zeroflow.trial.loading import Loader, Order, Positions
from zeroflow.trial.meters import Stopwatch, peak_memory
from zeroflow.trial.metrics import SETTINGS, Matrix
from zeroflow.trial.placement import Placement
from zeroflow.trial.probes import FunctionValues, Watcher
from zeroflow.trial.result import Probe, Step, TrialResult, provenance

Given = Callable[[View], Iterable[Batch]]
OnStage = Callable[[int, Matrix, npt.NDArray[np.int64]], None]

@dataclass
class TaskTrainer:
    """Trains a method on one task and keeps the account: losses, seconds, forward passes.

    Args:
        method: after ``begin_task``. optimizer: over ``method.trainable()``. epochs: how often all samples are visited.
        schedule: ``"cosine"`` (per epoch, to zero) or ``"constant"``.
        checkpoints: where an interrupted task goes on from. journal: the executor's log of this task.
        probe: looks at the method between steps. loader_threads: that make mini-batches ahead.
    """

    method: Method
    optimizer: ThreeStepOptimizer
    epochs: int
    batch_size: int
    schedule: str
    device: torch.device
    dtype: torch.dtype
    checkpoints: Checkpoints | None = None
    journal: Journal | None = None
    steps: list[Step] = field(default_factory=list)
    probe: Watcher | None = None
    peak_bytes: int = 0
    stream: View | None = None
    loader_threads: int = 0

    def train(
        self, samples: View, task: int, seed: int, order: Order, watch: Stopwatch, stream: View | None = None
    ) -> None:
        """Visit ``samples`` in ``order(epoch)`` in mini-batches, the last one smaller where they do not divide.

        Args:
            samples: to train on. task: its number. seed: of all randomness. order: of the samples in an epoch.
            watch: adds up the seconds of steps.
            stream: all training samples so far, for methods that replay some of them by their position.
        """
        self.stream = stream
        full = self._whole_task(samples, task, seed, order)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=self.epochs)
        self.method.train()

        def maker(epoch: int, number: int, positions: Positions) -> Callable[[], list[Tensor]]:
            return self._maker(samples, positions, seed, randomness.AUGMENTATION, task, epoch, number)

        with closing(Loader(order, self.epochs, self.batch_size, maker, self.loader_threads)) as loader:
            for epoch in range(self._go_on(task, cosine), self.epochs):
                rate = float(self.optimizer.param_groups[0]["lr"])
                for number, positions in loader.epoch(epoch):
                    if self.probe:
                        self.probe.look(len(self.steps))
                    made = functools.partial(loader.due, epoch, number)
                    loss, seconds = self._step(made, len(positions), full, watch)
                    self.steps.append(Step(task, epoch, len(self.steps), loss, rate, seconds))
                if self.schedule == "cosine":
                    cosine.step()
                if self.optimizer.first_order:
                    self._save(task, epoch, cosine)
        if self.probe:
            self.probe.look(len(self.steps), last=True)
        if self.optimizer.skipped:
            raise NonFiniteLoss(
                f"the last {self.optimizer.skipped} step(s) of task {task} had no finite loss; lower lr or eps"
            )

    def _whole_task(self, samples: View, task: int, seed: int, order: Order) -> list[Closure]:
        """The loss on each mini-batch of the task, for optimizers that look at all of it at a snapshot.

        In the samples' own order, class by class; where they are compared with each other, in that of the first epoch.
        """
        everything = order(0) if self.method.criterion.headless else np.arange(len(samples))

        def closure(first: int) -> Closure:
            positions = everything[first : first + self.batch_size]

            def loss() -> Tensor:
                made = self._maker(samples, positions, seed, randomness.SNAPSHOT, task, first)()
                return self.method.loss(self.method.prepare(self._placed(made, len(positions))))

            return self._slice(loss, len(positions))

        return [closure(first) for first in range(0, len(samples), self.batch_size)]

    def _maker(self, samples: View, positions: Positions, seed: int, *words: int) -> Callable[[], list[Tensor]]:
        """What makes a whole mini-batch, on the CPU and in any thread; ``seed`` and ``words`` key its random draws.

        All of it, so that an image does not depend on how many processes share the mini-batch. What is replayed is drawn at
        once: a method is never asked in another thread.
        """
        generator = randomness.generator(seed, randomness.REPLAY, *words)
        replayed = self.method.replay(len(positions), generator)
        drawn = [part.cpu() for part in replayed or () if part is not None]

        def make() -> list[Tensor]:
            parts = [*samples.training_batch(positions, randomness.generator(seed, *words))]
            if len(drawn) == 1:  # positions
                assert self.stream is not None, "a method replays positions in a stream that was not given"
                return [*parts, *self.stream.training_batch(drawn[0].numpy(), generator)]
            return parts + drawn

        return make

    def _placed(self, made: Sequence[Tensor], samples: int) -> MiniBatch:
        """This process's part of a mini-batch of so many samples, on the device."""
        own = self.optimizer.executor.slice(samples)
        placed = [part[own].to(self.device, self.dtype if part.is_floating_point() else part.dtype) for part in made]
        return MiniBatch(*placed)

    def _slice(self, closure: Closure, samples: int) -> Slice:
        """A closure over this process's part of a mini-batch of so many samples."""
        own = self.optimizer.executor.slice(samples)
        return Slice(closure, own.start, own.stop, samples)

    def _go_on(self, task: int, cosine: torch.optim.lr_scheduler.LRScheduler) -> int:
        """The epoch to begin with: after the last saved one of this task."""
        saved = self.checkpoints.load("epoch") if self.checkpoints else None
        if saved is None or saved["task"] != task:
            return 0
        with torch.no_grad():
            for name, parameter in self.method.trainable().items():
                parameter.copy_(saved["parameters"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        cosine.load_state_dict(saved["schedule"])
        self.steps, self.peak_bytes = _steps(saved["steps"]), saved["peak_bytes"]
        if self.probe:
            self.probe.seen = _probes(saved["probes"])
        return int(saved["epoch"]) + 1

    def _save(self, task: int, epoch: int, cosine: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Save this epoch: steps with an exact gradient cannot be made again from a log."""
        if self.checkpoints:
            parameters = {name: parameter.detach() for name, parameter in self.method.trainable().items()}
            state = {
                "task": task, "epoch": epoch, "parameters": parameters, "optimizer": self.optimizer.state_dict(),
                "schedule": cosine.state_dict(), "steps": _rows(self.steps),
                "peak_bytes": self.peak_bytes, "probes": _rows(self.probe.seen) if self.probe else [],
            }  # fmt: skip
            self.checkpoints.save("epoch", state)

    def _step(
        self, made: Callable[[], Sequence[Tensor]], samples: int, full: Sequence[Closure], watch: Stopwatch
    ) -> tuple[float, float | None]:
        """Loss and seconds of one step; no seconds for the one step whose memory is measured, and for replayed ones."""
        loss_of = self.method.losses if self.optimizer.per_example else self.method.loss
        replaying = self.journal is not None and self.journal.replaying

        @functools.cache
        def batch() -> MiniBatch:
            return self._placed(made(), samples)

        @functools.cache
        def inputs() -> Any:
            return self.method.prepare(batch())

        closure = self._slice(lambda: loss_of(inputs()), samples)

        def step() -> float:
            if not replaying and closure.share:
                inputs()
            return float(self.optimizer.step(closure, full))

        if replaying:  # asks for nothing: no images are made, no forward pass
            return step(), None
        batch()
        # The second step of a task (or the first after a replay): from then on the rule's moments are part of what is held.
        if len(self.steps) > 0 and not self.peak_bytes:
            held = [*self.optimizer.held(), *(part for part in batch() if part is not None)]
            loss, self.peak_bytes = peak_memory(step, self.method, self.device, held=held)
            return loss, None
        before = watch.seconds
        with watch.running():
            loss = step()
        return loss, watch.seconds - before


def _rows(rows: Sequence[Step | Probe]) -> list[list[Any]]:
    return [list(asdict(row).values()) for row in rows]


def _steps(rows: Sequence[Sequence[Any]]) -> list[Step]:
    return [Step(*row) for row in rows]


def _probes(rows: Sequence[Sequence[Any]]) -> list[Probe]:
    return [Probe(*row) for row in rows]


@dataclass(frozen=True)
class Placed:
    """A view's samples under the test transform, with images on the device: as often as they are asked for."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    view: View

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.view.plain_batches(self.batch_size):
            yield images.to(self.device, self.dtype), labels


class Evaluation:
    """Accuracy on all tasks seen so far; features of frozen spaces are computed once per test image and kept.

    Args:
        given: what ``method.features`` takes of a view's samples, and their labels; default: images.
    """

    def __init__(
        self, method: Method, device: torch.device, dtype: torch.dtype, batch_size: int, given: Given | None = None
    ) -> None:
        self.method, self.given = method, given or functools.partial(Placed, device, dtype, batch_size)
        self.kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def scores(self, test: View, task: int) -> Tensor:
        """Scores of a task's test samples among all classes seen so far, ``[N, classes]``."""
        self.method.eval()
        kept = self.kept.get(task)
        known = 0 if kept is None else kept.shape[1]
        spaces = range(known, max(self.method.frozen_spaces, 1))
        if len(spaces) or kept is None:
            fresh = torch.cat([self.method.features(images, spaces) for images, _ in self.given(test)])
            kept = fresh if kept is None else torch.cat([kept, fresh], dim=1)
            self.kept[task] = kept[:, : self.method.frozen_spaces]
        return self.method.scores(kept)

    def accuracy(self, test: View, task: int) -> float:
        """Top-1 accuracy on a task's test samples, percent."""
        return _percent(self.scores(test, task).argmax(dim=1).cpu() == test.labels)

    def accuracies(self, seen: Task, width: int | None) -> tuple[float, float, float]:
        """Accuracy on a task's test samples in the three ``SETTINGS``, percent.

        Args:
            seen: the task. width: classes of every task of the stream; None where they differ, and where being right
                without the task therefore has no meaning (then NaN).
        """
        scores, labels, first = self.scores(seen.test, seen.index), seen.test.labels, seen.classes.start
        anywhere = scores.argmax(dim=1).cpu()
        within = scores[:, first : seen.classes.stop].argmax(dim=1).cpu() + first
        domain = math.nan if width is None else _percent(anywhere % width == labels % width)
        return _percent(anywhere == labels), _percent(within == labels), domain


def _percent(right: Tensor) -> float:
    return 100.0 * float(right.double().mean())


def scenario_of(config: TrialConfig, dataset: ImageDataset, size: int, threads: int = 0) -> Scenario:
    """The stream that a cell runs; ``size``: of the images, pixels; ``threads``: that prepare mini-batches ahead."""
    info, classes, order = datasets.get(config.dataset), len(dataset.class_names), config.fixed_class_order
    if order is None:
        chosen = class_order(classes, config.class_order_seed)
    else:
        chosen = np.arange(classes) if order == "sorted" else np.array(order)
    increments = config.increments or even_increments(classes, config.tasks, config.base_classes)
    config.check_batches(increments)
    whole = class_incremental(
        dataset,
        increments,
        transform_of(config.transform or info.transform, config.preprocessing),
        size,
        order=chosen,
        validation=config.validation,
        threads=threads,
    )
    return dataclasses.replace(whole, tasks=whole.tasks[: config.stop_after])


def training_batches(config: TrialConfig, data_dir: str | None, cache_bytes: int = CACHE_BYTES) -> list[int]:
    """Mini-batches of an epoch of each task that a cell runs. Opens the data set.

    Raises:
        ConfigError: the data is not there.
    """
    tasks = scenario_of(config, load_dataset(config.dataset, data_dir, cache_bytes=cache_bytes), 1).tasks
    return [math.ceil(len(task.train) / (config.batch_size or 1)) for task in tasks]


def run_trial(
    config: TrialConfig,
    placement: Placement | None = None,
    *,
    executor: Executor | None = None,
    on_stage: OnStage | None = None,
    folder: str | Path | None = None,
    tell: Tell = silent,
) -> TrialResult:
    """Run one cell in this process.

    Args:
        config: what to compute. placement: where (default: one thread, a GPU if there is one).
        executor: where the optimizer's evaluations run (default: here).
        on_stage: called after each stage with its number, the accuracies so far ``[T, T]`` and the test samples per task.
        folder: for unfinished work. A trial that is interrupted and run again with the same folder goes on where it was, and
            its result has the same bits as an uninterrupted one's; the caller deletes the folder when the result is safe.
        tell: see ``Tell``; a unit is an epoch of a task.

    Returns:
        The result: accuracy matrix, summary, steps, provenance.

    Raises:
        ConfigError: bad configuration, missing data, unreadable checkpoint, a mini-batch cut into more slices than it has
            samples; before any training.
        NonFiniteLoss: training diverged. GradientBanned: a method took a gradient under a forward-only optimizer.
    """
    place = placement or Placement()
    config = TrialConfig.from_dict(dataclasses.asdict(config))
    if executor and config.batch_size and executor.shards > config.batch_size:
        raise ConfigError(
            f"data shards larger than the batch: {executor.shards} shards, batch_size={config.batch_size}"
        )
    if executor and (reason := config.uncut(executor.shards)):
        raise ConfigError(reason)
    checkpoints = None if folder is None else Checkpoints(folder, executor)
    executor = executor or LocalExecutor()
    ban = gradient_ban() if forward_only(config) else nullcontext()
    with _threads(place.threads), ban, checkpoints.held() if checkpoints else nullcontext():
        try:
            return _run(config, place, executor, on_stage or (lambda stage, accuracy, samples: None), checkpoints, tell)
        finally:
            executor.together = None  # it may run other cells after this one


def forward_only(config: TrialConfig) -> bool:
    """Whether nothing in a cell needs a gradient of reverse mode: it runs under ``gradient_ban`` then."""
    if config.optimizer is None:
        return True
    exact = optimizers.get(config.optimizer).estimator.exact
    return not (exact or config.hybrid_epochs or config.optimizer_options.get("hybrid"))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Account:
    """What a trial has so far, apart from its method: part of a checkpoint. ``accuracy``: setting x stage x task."""

    accuracy: npt.NDArray[np.float64]
    steps: list[Step] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    stage: int = 0
    forwards: int = 0
    equivalents: int = 0
    epochs: int = 0
    peak: int = 0
    statistics: int = 0  # bytes of the classifier when the peak was measured: it grows with the stream
    parameters: int = 0
    seconds: float = 0.0
    requests: int = 0
    images: int = 0
    reused: int = 0

    def state(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **plain,
            "accuracy": torch.from_numpy(self.accuracy),
            "steps": _rows(self.steps),
            "probes": _rows(self.probes),
        }

    def asked(self, price: float | None) -> dict[str, Any]:
        """What a black box was asked; ``price``: for a thousand images."""
        return {
            "requests": self.requests, "queried_images": self.images, "reused_images": self.reused,
            "price": None if price is None else self.images * price / 1000,
        }  # fmt: skip

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Account:
        return cls(
            **{
                **state,
                "accuracy": state["accuracy"].numpy(),
                "steps": _steps(state["steps"]),
                "probes": _probes(state["probes"]),
            }
        )


def _run(
    config: TrialConfig, place: Placement, executor: Executor, on_stage: OnStage, checkpoints: Checkpoints | None,
    tell: Tell,
) -> TrialResult:  # fmt: skip
    started = time.perf_counter()
    device, dtype = accesses[config.access or "white-box"].device(place.torch_device()), getattr(torch, config.dtype)
    backbone = open_backbone(
        config.access, config.backbone, place.endpoint, place.endpoint_timeout, checkpoint=config.checkpoint,
        image_size=config.image_size,
    )  # fmt: skip
    if isinstance(backbone, BlackBox):
        executor.together = backbone.together
    dataset = load_dataset(config.dataset, place.data_dir, cache_bytes=place.cache_bytes)
    scenario = scenario_of(config, dataset, backbone.image_size, place.loaders())
    info = methods.get(config.method)
    method = info.build(backbone, info.parse(dict(config.method_options))).to(device, dtype)
    if config.classifier or config.classifier_options:
        classifier = classifiers.get(config.classifier or str(method.own_classifier))
        method.classifier = classifier.build(classifier.options(**config.classifier_options))
    if config.loss:
        method.criterion = criteria[config.loss]
    frozen = FrozenFeatures(
        backbone, dataset, device, dtype, place.evaluation_batch, cache_bytes=place.cache_bytes, results=place.results,
        names={
            "transform": config.transform or datasets.get(config.dataset).transform, "backbone": config.backbone,
            "preprocessing": config.preprocessing,
        },
    )  # fmt: skip
    plain = functools.partial(Placed, device, dtype, place.evaluation_batch)

    def given(view: View) -> Iterable[Batch]:
        if method.takes == "images":
            return plain(view)
        return frozen.batches(view, plain(view) if method.takes == "both" else None)

    evaluation = Evaluation(method, device, dtype, place.evaluation_batch, given)

    stages = len(scenario.tasks)
    account = _Account(np.full((len(SETTINGS), stages, stages), np.nan))
    test_samples = np.array([len(task.test) for task in scenario.tasks])
    task_classes = np.array([len(task.classes) for task in scenario.tasks])
    width = int(task_classes[0]) if len(set(task_classes.tolist())) == 1 else None
    watch = Stopwatch(device)
    if checkpoints and (saved := checkpoints.load("tasks")):
        account = _Account.of(saved["account"])
        for task in scenario.tasks[: account.stage]:
            method.begin_task(task.classes, randomness.generator(config.seed, randomness.INITIAL_VALUES, task.index))
            method.freeze()
        method.restore(saved["method"])
    before, epochs = account.seconds, config.epochs or 1
    earlier = account.requests, account.images, account.reused
    tell("", account.stage * epochs, stages * epochs)

    backbone.calibrate(images for images, _ in plain(scenario.tasks[0].train))
    for task in scenario.tasks[account.stage :]:
        initial = randomness.generator(config.seed, randomness.INITIAL_VALUES, task.index)
        method.begin_task(task.classes, initial, plain(task.train))
        method.to(device, dtype)
        stream = joined([seen.train for seen in scenario.tasks[: task.index + 1]])
        samples = stream if method.all_tasks else task.train
        trainable = method.trainable()
        if trainable:
            assert config.optimizer and config.lr and config.epochs and config.batch_size and config.schedule
            journal = checkpoints.journal(task.index) if checkpoints else None
            optimizer = create_optimizer(
                config.optimizer, list(trainable.items()), lr=config.lr, queries=config.queries,
                eps=config.eps, seed=randomness.key(config.seed, randomness.OPTIMIZER, task.index),
                executor=journal or executor, **_optimizer_options(config, len(samples)),
            )  # fmt: skip
            method.set_grad_checkpointing(optimizer.checkpoint)
            trainer = TaskTrainer(
                method,
                optimizer,
                config.epochs,
                config.batch_size,
                config.schedule,
                device,
                dtype,
                checkpoints,
                journal,
                probe=FunctionValues.of(config, method, scenario.tasks[: task.index + 1], plain),
                loader_threads=place.loaders(),
            )

            def order(epoch: int, task: int = task.index, samples: View = samples) -> Positions:
                tell(f"task {task + 1} of {stages}, epoch {epoch + 1}", task * epochs + epoch, stages * epochs)
                if method.criterion.headless:
                    return randomness.balanced_order(config.seed, task, epoch, samples.labels.numpy())
                return randomness.batch_order(config.seed, task, epoch, len(samples))

            trainer.train(samples, task.index, config.seed, order, watch, stream)
            if journal:
                journal.close()
            if trainer.peak_bytes > account.peak:
                account.peak, account.statistics = trainer.peak_bytes, _statistics(method)
            account.parameters = optimizer.flat.size
            first = len(account.steps)
            account.steps += [dataclasses.replace(step, step=first + step.step) for step in trainer.steps]
            if trainer.probe:
                account.probes += [dataclasses.replace(p, step=first + p.step) for p in trainer.probe.seen]
            once, each = method.passes()
            account.forwards += once * len(trainer.steps) + each * optimizer.forwards
            account.equivalents += once * len(trainer.steps) + each * optimizer.equivalents
            account.epochs += config.epochs
        method.eval()
        method.freeze()
        before_end, worked = method.images_passed, method.images_worked
        method.end_task(given(task.train))
        account.forwards += math.ceil((method.images_passed - before_end) / (config.batch_size or 1))
        account.equivalents += math.ceil((method.images_worked - worked) / (config.batch_size or 1))
        if not account.peak:
            size = min(config.batch_size or 48, place.evaluation_batch)
            # A black box is not asked once more for what is known.
            known = isinstance(backbone, BlackBox) and method.takes != "images"
            images, _ = next(iter(given(task.train) if known else Placed(device, dtype, size, task.train)))
            with torch.no_grad():
                _, account.peak = peak_memory(functools.partial(method.features, images, range(1)), method, device)
            account.statistics = _statistics(method)
        for seen in scenario.tasks[: task.index + 1]:
            account.accuracy[:, task.index, seen.index] = evaluation.accuracies(seen, width)
        if isinstance(backbone, BlackBox):
            asked_here = float(backbone.requests), float(backbone.images), float(frozen.reused)
            sent = executor.map(executor.groups, lambda _: asked_here, 3)  # noqa: B023
            account.requests, account.images, account.reused = (
                first + int(sum(own)) for first, own in zip(earlier, zip(*sent, strict=True), strict=True)
            )
        account.stage, account.seconds = task.index + 1, before + time.perf_counter() - started
        if checkpoints:
            # Without the features kept for evaluation, which are many times larger: a resumed trial computes them again.
            checkpoints.save("tasks", {"account": account.state(), "method": method.state()})
        on_stage(task.index, account.accuracy[0], test_samples)
        tell(f"task {task.index + 1} of {stages}", account.stage * epochs, stages * epochs)

    seconds = _training_seconds(account.steps)
    peak = account.peak + _statistics(method) - account.statistics
    asked = account.asked(place.price_per_1000_images) if isinstance(backbone, BlackBox) else {}
    classes, tasks, domains = account.accuracy
    return TrialResult(
        config=config,
        accuracy_matrix=classes,
        task_incremental=tasks,
        domain_incremental=None if width is None else domains,
        test_samples=test_samples,
        task_classes=task_classes,
        class_order=scenario.order,
        class_names=scenario.class_names,
        steps=account.steps,
        probes=account.probes,
        costs={
            "forward_passes": account.forwards,
            "forward_equivalents": account.equivalents,
            "peak_memory_bytes": None if backbone.unseen_bytes is None else peak + backbone.unseen_bytes,
            "trainable_parameters": account.parameters,
            "seconds": account.seconds,
            "training_seconds": seconds,
            "seconds_per_epoch": seconds / account.epochs if account.epochs else None,
            **asked,
        },
        provenance=provenance(device, {"threads": place.threads}),
    )


def _statistics(method: Method) -> int:
    """Bytes that the method's classifier keeps of what it has seen."""
    return sum(value.nbytes for value in method.classifier.buffers()) if method.own_classifier else 0


def _optimizer_options(config: TrialConfig, samples: int) -> dict[str, Any]:
    """The optimizer's options, with epochs of the exact gradient in its own unit, steps."""
    hybrid = config.hybrid_epochs * math.ceil(samples / (config.batch_size or 1))
    return {**config.optimizer_options, **({"hybrid": hybrid} if hybrid else {})}


def _training_seconds(steps: Sequence[Step]) -> float:
    """Seconds of all steps; the few whose memory was measured count as the mean of the others."""
    timed = [step.seconds for step in steps if step.seconds is not None]
    return sum(timed) / len(timed) * len(steps) if timed else 0.0
