"""A trial: the stream task by task, each trained, frozen and evaluated on everything seen so far."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from zeroflow.data import datasets, load_dataset
from zeroflow.data.dataset import ImageDataset
from zeroflow.data.scenario import Batch, Task, joined
from zeroflow.imports import refuse_while_importing
from zeroflow.methods import Method
from zeroflow.models.access import accesses, open_backbone
from zeroflow.models.backbone import Backbone
from zeroflow.models.endpoint import BlackBox
from zeroflow.optim import (
    Executor,
    Journal,
    LocalExecutor,
    ThreeStepOptimizer,
    create_optimizer,
    gradient_ban,
)
from zeroflow.progress import Progress, silent
from zeroflow.trial import own_state, randomness
from zeroflow.trial.batches import TaskBatches
from zeroflow.trial.checkpoint import Checkpoints, DataFacts, KeptTasks
from zeroflow.trial.checks import check_shards, check_tunable, forward_only, trains_forward_only
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.costs import Asked, Costs
from zeroflow.trial.evaluation import DeviceBatches, Evaluation, Inputs
from zeroflow.trial.features import FrozenFeatures
from zeroflow.trial.history import History
from zeroflow.trial.loading import Positions
from zeroflow.trial.making import method_of
from zeroflow.trial.meters import peak_memory
from zeroflow.trial.metrics import SETTINGS, Matrix
from zeroflow.trial.own_code import feature_code
from zeroflow.trial.placement import Placement, limited_threads
from zeroflow.trial.probes import FunctionValues
from zeroflow.trial.result import TrialResult, provenance
from zeroflow.trial.stream import scenario_of
from zeroflow.trial.training import TaskTrainer

OnStage = Callable[[int, Matrix, npt.NDArray[np.int64]], None]
"""Called with the number of a finished stage, the accuracies so far ``[T, T]`` and the test samples per task ``[T]``."""


def run_trial(
    config: TrialConfig,
    placement: Placement | None = None,
    *,
    executor: Executor | None = None,
    on_stage: OnStage | None = None,
    folder: str | Path | None = None,
    tasks_folder: str | Path | None = None,
    on_progress: Progress = silent,
) -> TrialResult:
    """Run one cell in this process.

    Args:
        config: what to compute.
        placement: where (default: one thread, a GPU if there is one).
        executor: where the optimizer's evaluations run (default: here).
        on_stage: called after each stage.
        folder: for unfinished work. A trial that is interrupted and run again with the same folder resumes where it was,
            and its result has the same bits as an uninterrupted one's; the caller deletes the folder when the result is safe.
        tasks_folder: of finished tasks. A cell with ``later`` begins at the task it branches from, if a cell with the same
            settings up to there has kept it there, and keeps it otherwise; with ``Placement.keep_tasks`` all are kept.
        on_progress: see ``Progress``; a unit is an epoch of a task.

    Returns:
        The result: accuracy matrix, summary, steps, provenance.

    Raises:
        ConfigError: bad configuration, missing data, unreadable checkpoint, a mini-batch cut into more slices than it has
            samples; before any training.
        NonFiniteLoss: training diverged.
        GradientBanned: a method took a gradient under a forward-only optimizer.
    """
    refuse_while_importing()
    placement, executor = placement or Placement(), executor or LocalExecutor()
    config = TrialConfig.from_dict(dataclasses.asdict(config))
    check_shards(config, executor.shards)
    checkpoints = None if folder is None else Checkpoints(folder, executor)
    kept = None if tasks_folder is None else KeptTasks(tasks_folder, executor)
    ban = gradient_ban() if forward_only(config) else nullcontext()
    with limited_threads(placement.threads), ban, checkpoints.locked() if checkpoints else nullcontext():
        try:
            return Trial(config, placement, executor, checkpoints, kept, on_stage, on_progress).run()
        finally:
            executor.together = None  # it may run other cells after this one


class Trial:
    """One cell in this process. ``run`` is all of it, step by step.

    Args:
        config: what to compute, in normal form.
        placement: where.
        executor: where the optimizer's evaluations run.
        checkpoints: of unfinished work; None: nothing is saved.
        kept: finished tasks that other cells may begin at; None: there are none, and none are kept.
        on_stage: called after each stage.
        on_progress: see ``Progress``; a unit is an epoch of a task.
    """

    def __init__(
        self,
        config: TrialConfig,
        placement: Placement,
        executor: Executor,
        checkpoints: Checkpoints | None = None,
        kept: KeptTasks | None = None,
        on_stage: OnStage | None = None,
        on_progress: Progress = silent,
    ) -> None:
        self.config, self.placement, self.executor = config, placement, executor
        self.checkpoints, self.kept, self.on_stage, self.on_progress = checkpoints, kept, on_stage, on_progress
        self.device = accesses[config.access or "white-box"].device(placement.torch_device())
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        # Bound to no trial: a trial that holds itself would keep its model on the device after its end.
        self.images = functools.partial(DeviceBatches, self.device, self.dtype, placement.evaluation_batch)
        self._began = time.perf_counter()

    def run(self) -> TrialResult:
        """Learn all tasks, or those that are left, one after the other."""
        self.open()
        self.resume()
        self.backbone.calibrate(images for images, _ in self.images(self.scenario.tasks[0].train))
        for task in self.scenario.tasks[self.history.stages :]:
            self.train_task(task)
            self.finish_task(task)
            self.evaluate(task)
            self.save(task)
        return self.result()

    def open(self) -> None:
        """Open the backbone and the data set, cut the stream into tasks, and make the method."""
        config, placement = self.config, self.placement
        self.backbone: Backbone = open_backbone(
            config.access,
            config.backbone,
            placement.endpoint,
            placement.endpoint_timeout,
            checkpoint=config.checkpoint,
            image_size=config.image_size,
        )
        check_tunable(config, self.backbone)
        self.black_box = self.backbone if isinstance(self.backbone, BlackBox) else None
        if self.black_box:
            self.executor.together = self.black_box.together
        dataset = load_dataset(config.dataset, placement.data_dir, cache_bytes=placement.cache_bytes)
        self.data = DataFacts.of(dataset, config)
        self.scenario = scenario_of(config, dataset, self.backbone.image_size, placement.loaders())
        self.method = method_of(config, self.backbone).to(self.device, self.dtype)
        self.frozen = self._frozen_features(dataset)
        self.inputs = Inputs(self.method, self.images, self.frozen)
        self.evaluation = Evaluation(self.method, self.inputs)
        stages = len(self.scenario.tasks)
        self.test_samples = np.array([len(task.test) for task in self.scenario.tasks])
        self.task_classes = np.array([len(task.classes) for task in self.scenario.tasks])
        # Being right without the task has a meaning only where all tasks have as many classes.
        self.width = int(self.task_classes[0]) if len(set(self.task_classes.tolist())) == 1 else None
        self.history, self.costs = History(np.full((len(SETTINGS), stages, stages), np.nan)), Costs()

    def resume(self) -> None:
        """Take over the tasks that were finished before an interruption, or before the settings changed."""
        if self.checkpoints:
            self.checkpoints.begin_with(self.data)
        saved = self.checkpoints.load("tasks") if self.checkpoints else None
        if saved is None and self.kept and self.config.later:
            stages, equal = len(self.scenario.tasks), self.width is not None
            saved = self.kept.load(self.config, self.data, stages=stages, equal=equal)
        if saved:
            self.history, self.costs = History.of(saved["history"]), Costs.of(saved["costs"])
            self._take_up(self.method, self.history.stages, saved["method"])
        tally = self.checkpoints.tally(self.history.stages) if self.checkpoints else None
        self._seconds_before = tally["elapsed"] if tally else self.costs.seconds
        self._asked_before = self.costs.asked
        self._report("", self.history.stages)

    def begin_task(self, task: Task) -> Mapping[str, nn.Parameter]:
        """Prepare the method for a task; the parameters that it trains, none if it does not train this one."""
        twin = self._twin(task)
        self._begin(self.method, task)
        if twin:
            own_state.check_resumable(self.method, twin, lambda: self._begin(twin, task))
        self.method.to(self.device, self.dtype)
        trainable = self.method.trainable()
        own_state.check_frozen(self.method, trainable)
        return trainable

    def _begin(self, method: Method, task: Task) -> None:
        method.begin_task(task.classes, self._initial_values(task), self.images(task.train))

    def _twin(self, task: Task) -> Method | None:
        """For code of somebody's own: the method as it would come to this task after an interruption."""
        if task.index not in own_state.TASKS or self.black_box or not own_state.is_own(self.method):
            return None
        twin = method_of(self.config, copy.deepcopy(self.backbone)).to(self.device, self.dtype)
        with own_state.undisturbed_randomness():
            self._take_up(twin, task.index, {name: value.clone() for name, value in self.method.state().items()})
        return twin

    def _take_up(self, method: Method, stages: int, state: Mapping[str, torch.Tensor]) -> None:
        """Bring a new method to where another one was after so many tasks."""
        for task in self.scenario.tasks[:stages]:
            method.begin_task(task.classes, self._initial_values(task))
            method.freeze()
        method.restore(state)

    def train_task(self, task: Task) -> None:
        """Begin a task and train it, if the method trains this one."""
        trainable = self.begin_task(task)
        if not trainable:
            return
        batches = self.batches(task)
        journal = self.checkpoints.journal(task.index) if self.checkpoints else None
        optimizer = self._optimizer(trainable, batches, journal or self.executor)
        self.method.set_grad_checkpointing(optimizer.checkpoint)
        trainer = self._trainer(task, optimizer, journal)
        with gradient_ban() if trains_forward_only(self.config.at(task.index)) else nullcontext():
            trainer.train(batches)
        if journal:
            journal.close()
        self.costs.add_training(self.method, trainer)
        self.history.add(trainer.steps, trainer.probe.seen if trainer.probe else [])

    def finish_task(self, task: Task) -> None:
        """Freeze what was learned, and let the method take what it needs from the task's training samples."""
        self.method.eval()
        self.method.freeze()
        with self.costs.passes_beside_training(self.method, self.config.at(task.index).batch_size):
            self.method.end_task(self.inputs(task.train))
        if not self.costs.peak_bytes:
            self.costs.add_peak(self._peak_of_forward_pass(task), self.method)

    def evaluate(self, task: Task) -> None:
        """Measure the accuracy on this task and on all before it."""
        pairs = []
        for seen in self.scenario.tasks[: task.index + 1]:
            accuracies, predicted = self.evaluation.accuracies(seen, task.classes.stop, self.width)
            self.history.accuracy[:, task.index, seen.index] = accuracies
            pairs.append(torch.stack([seen.test.labels, predicted]))
        self.history.predictions.append(torch.cat(pairs, dim=1).to(torch.int32))

    def save(self, task: Task) -> None:
        """Count the task as finished, save all of it, and say so."""
        if self.black_box:
            self.costs.asked = self._asked_before + Asked.by_all(self.black_box, self.frozen.reused, self.executor)
        self.history.stages = task.index + 1
        self.costs.seconds = self.elapsed()
        last = self.config.later.get("task") == task.index + 2
        kept = self.kept if last or self.placement.keep_tasks else None
        if self.checkpoints or kept:
            # Without the features kept for evaluation, which are many times larger: a resumed trial computes them again.
            state = {"history": self.history.state(), "costs": self.costs.state(), "method": self.method.state()}
            if self.checkpoints:
                self.checkpoints.save("tasks", state)
            if kept and task.index + 1 < self.config.later.get("task", math.inf):
                kept.save(self.config, task.index + 1, state, self.data)
        if self.on_stage:
            self.on_stage(task.index, self.history.accuracy[0], self.test_samples)
        self._report(f"task {task.index + 1} of {len(self.scenario.tasks)}", task.index + 1)

    def elapsed(self) -> float:
        """Seconds of the trial until now, time between interruption and resumption left out."""
        return self._seconds_before + time.perf_counter() - self._began

    def result(self) -> TrialResult:
        """What came out, what it cost, and where it came from."""
        class_incremental, task_incremental, domain_incremental = self.history.accuracy
        steps, price = self.history.steps, self.placement.price_per_1000_images
        return TrialResult(
            config=self.config,
            accuracy_matrix=class_incremental,
            task_incremental=task_incremental,
            domain_incremental=None if self.width is None else domain_incremental,
            test_samples=self.test_samples,
            task_classes=self.task_classes,
            class_order=self.scenario.order,
            class_names=self.scenario.class_names,
            steps=steps,
            probes=self.history.probes,
            costs=self.costs.summary(self.method, self.black_box, price),
            provenance=provenance(self.device, {"threads": self.placement.threads}),
            confusion=self.history.confusion(np.cumsum(self.task_classes).tolist()),
            named=self.data.named,
        )

    def _frozen_features(self, dataset: ImageDataset) -> FrozenFeatures:
        config, placement = self.config, self.placement
        code = feature_code(config, dataset, self.backbone)
        names = {
            "transform": config.transform or datasets.get(config.dataset).transform,
            # A program in a file is what it computes, wherever it lies.
            "backbone": self.data.named.get(config.backbone, config.backbone),
            "preprocessing": config.preprocessing,
            **({"code": code} if code else {}),
        }
        return FrozenFeatures(
            self.backbone,
            dataset,
            self.device,
            self.dtype,
            placement.evaluation_batch,
            cache_bytes=0 if code is None else placement.cache_bytes,
            results=placement.results,
            names=names,
        )

    def _initial_values(self, task: Task) -> torch.Generator:
        return randomness.generator(self.config.seed, randomness.INITIAL_VALUES, task.index)

    def batches(self, task: Task) -> TaskBatches:
        """The mini-batches of a task that has begun."""
        config = self.config.at(task.index)
        assert config.batch_size
        stream = joined([seen.train for seen in self.scenario.tasks[: task.index + 1]])
        samples = stream if self.method.all_tasks else task.train

        def order(epoch: int) -> Positions:
            if self.method.criterion.headless:
                return randomness.balanced_order(config.seed, task.index, epoch, samples.labels.numpy())
            return randomness.batch_order(config.seed, task.index, epoch, len(samples))

        return TaskBatches(self.method, samples, order, config.batch_size, task.index, config.seed, stream)

    def _optimizer(
        self, trainable: Mapping[str, nn.Parameter], batches: TaskBatches, executor: Executor
    ) -> ThreeStepOptimizer:
        config = self.config.at(batches.task)
        options = dict(config.optimizer_options)
        assert config.optimizer and config.lr
        if config.hybrid_epochs:  # in the optimizer's own unit, steps
            options["hybrid"] = config.hybrid_epochs * math.ceil(len(batches.samples) / batches.batch_size)
        seed = randomness.key(config.seed, randomness.OPTIMIZER, batches.task)
        return create_optimizer(
            config.optimizer,
            list(trainable.items()),
            lr=config.lr,
            queries=config.queries,
            eps=config.eps,
            seed=seed,
            executor=executor,
            module=own_state.trained_modules(self.method, trainable),
            **options,
        )

    def _trainer(self, task: Task, optimizer: ThreeStepOptimizer, journal: Journal | None) -> TaskTrainer:
        config, tasks = self.config.at(task.index), self.scenario.tasks
        assert config.epochs and config.schedule

        def report(epoch: int) -> None:
            self._report(f"task {task.index + 1} of {len(tasks)}, epoch {epoch + 1}", task.index, epoch)

        return TaskTrainer(
            self.method,
            optimizer,
            config.epochs,
            config.schedule,
            self.device,
            self.dtype,
            checkpoints=self.checkpoints,
            journal=journal,
            loader_threads=self.placement.loaders(),
            on_epoch=report,
            elapsed=self.elapsed,
            probe=FunctionValues.of(config, self.method, tasks[: task.index + 1], self.images),
        )

    def _peak_of_forward_pass(self, task: Task) -> int:
        """The peak of memory where nothing is trained: of a forward pass over as many images as a mini-batch may have."""
        size = min(self.config.at(task.index).batch_size or 48, self.placement.evaluation_batch)
        batches: Iterable[Batch] = DeviceBatches(self.device, self.dtype, size, task.train)
        if self.black_box and self.method.takes != "images":
            batches = self.inputs(task.train)  # it is not asked once more for what is known
        inputs, _ = next(iter(batches))
        forward = functools.partial(self.method.features, inputs, range(1))
        with torch.no_grad():
            return peak_memory(forward, self.method, self.device)[1]

    def _report(self, what: str, stages: int, epoch: int = 0) -> None:
        epochs = [self.config.at(task.index).epochs or 1 for task in self.scenario.tasks]
        self.on_progress(what, sum(epochs[:stages]) + epoch, sum(epochs))
