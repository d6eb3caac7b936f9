"""Training on one task: steps over its mini-batches, with the loss, the seconds and the peak memory of each."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from torch import Tensor, nn

from zeroflow.methods import Method, MiniBatch
from zeroflow.optim import Journal, NonFiniteLoss, Slice, ThreeStepOptimizer
from zeroflow.optim.closure import Closure
from zeroflow.trial.batches import LazyBatch, TaskBatches
from zeroflow.trial.checkpoint import Checkpoints
from zeroflow.trial.history import as_rows
from zeroflow.trial.loading import Loader
from zeroflow.trial.meters import Stopwatch, Tally, peak_memory
from zeroflow.trial.own_state import trained_modules
from zeroflow.trial.probes import Watcher
from zeroflow.trial.result import Probe, Step

KEEP_EVERY = 2.0
"""Seconds of work whose measures an interruption may lose: of its time, not of the work itself."""


class TaskTrainer:
    """Trains a method on one task.

    Args:
        method: after ``begin_task``.
        optimizer: over ``method.trainable()``.
        epochs: how often all samples are visited.
        schedule: ``"cosine"`` (per epoch, to zero) or ``"constant"``.
        device: where mini-batches are put.
        dtype: of their images.
        checkpoints: where an interrupted task is resumed from.
        journal: the log of this task's evaluations, through which the optimizer has them made.
        probe: looks at the method between steps.
        loader_threads: that make mini-batches ahead.
        on_epoch: called with the number of an epoch before it.
        elapsed: seconds of the trial until now, which an interrupted task is resumed with.

    Attributes:
        steps: that were made.
        tally: what was measured of them.
    """

    def __init__(
        self,
        method: Method,
        optimizer: ThreeStepOptimizer,
        epochs: int,
        schedule: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        checkpoints: Checkpoints | None = None,
        journal: Journal | None = None,
        probe: Watcher | None = None,
        loader_threads: int = 0,
        on_epoch: Callable[[int], None] | None = None,
        elapsed: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.method, self.optimizer, self.epochs, self.schedule = method, optimizer, epochs, schedule
        self.device, self.dtype, self.checkpoints, self.journal = device, dtype, checkpoints, journal
        self.probe, self.loader_threads, self.on_epoch = probe, loader_threads, on_epoch
        self.elapsed, self._kept_at = elapsed, elapsed()
        self.steps: list[Step] = []
        self.tally = Tally()
        self._due: dict[bool, tuple[int, int]] = {}
        self._watch = Stopwatch(device)

    @property
    def peak_bytes(self) -> int:
        """The most memory that a step needed; 0: none was made."""
        return max(self.tally.peaks.values(), default=0)

    @property
    def seconds(self) -> float | None:
        """Of all steps; None: too few were timed to know."""
        return self.tally.seconds(self.optimizer.composition.is_exact(number) for number in range(len(self.steps)))

    def train(self, batches: TaskBatches) -> None:
        """Visit all mini-batches in every epoch, or in those that are left of an interrupted task.

        Raises:
            NonFiniteLoss: the last step had no finite loss.
        """
        snapshot = self._snapshot(batches)
        self._due = self._to_measure(len(batches.order(0)), batches.batch_size)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=self.epochs)
        self.method.train()
        loader = Loader(batches.order, self.epochs, batches.batch_size, batches.make_training, self.loader_threads)
        with closing(loader):
            for epoch in range(self._resume(batches.task, cosine), self.epochs):
                self._train_epoch(batches.task, epoch, loader, snapshot)
                if self.schedule == "cosine":
                    cosine.step()
                if self.optimizer.first_order:
                    self._save(batches.task, epoch, cosine)
        self._keep_tally(batches.task)
        if self.probe:
            self.probe.look(len(self.steps), last=True)
        if self.optimizer.skipped:
            raise NonFiniteLoss(
                f"the last {self.optimizer.skipped} step(s) of task {batches.task} had no finite loss; lower lr or eps"
            )

    def _train_epoch(self, task: int, epoch: int, loader: Loader[list[Tensor]], snapshot: Sequence[Closure]) -> None:
        if self.on_epoch:
            self.on_epoch(epoch)
        rate = float(self.optimizer.param_groups[0]["lr"])
        for number, positions in loader.epoch(epoch):
            if self.probe:
                self.probe.look(len(self.steps))
            make = functools.partial(loader.due, epoch, number)
            own, measured = rate * self.optimizer.composition.lr_factor(len(self.steps)), len(self.tally.peaks)
            loss, seconds = self._step(make, len(positions), snapshot)
            self.steps.append(Step(task, epoch, len(self.steps), loss, own, seconds))
            if len(self.tally.peaks) > measured or self.elapsed() > self._kept_at + KEEP_EVERY:
                self._keep_tally(task)

    def _keep_tally(self, task: int) -> None:
        """Save what was measured: a log has losses alone."""
        self._kept_at = self.elapsed()
        if self.checkpoints:
            self.checkpoints.save("tally", {"task": task, **vars(self.tally), "elapsed": self._kept_at})

    def _step(
        self, make: Callable[[], list[Tensor]], samples: int, snapshot: Sequence[Closure]
    ) -> tuple[float, float | None]:
        """Loss and seconds of a step on what ``make`` makes; None where the seconds would mean nothing."""
        batch = LazyBatch(self.method, lambda: self._own_part(make(), samples))
        losses = self.method.losses if self.optimizer.per_example else self.method.loss
        closure = self._slice(lambda: losses(batch.inputs), samples)

        def step() -> float:
            return float(self.optimizer.step(closure, snapshot))

        if self.journal is not None and self.journal.replaying:
            return step(), None  # no images are made, and there is no forward pass

        def prepared_step() -> float:
            if closure.share:
                _ = batch.inputs
            return step()

        return self._measured(prepared_step, batch.tensors, samples)

    def _to_measure(self, samples: int, batch_size: int) -> dict[bool, tuple[int, int]]:
        """Of steps with an exact gradient (True) and of those without: from which one on memory is measured, and its samples.

        The first one of the largest mini-batch; not the task's first, if there are others, as the rule has no moments yet.
        """
        sizes = [min(batch_size, samples - first) for first in range(0, samples, batch_size)] * self.epochs
        kinds = [self.optimizer.composition.is_exact(step) for step in range(len(sizes))]
        found = {}
        for kind in set(kinds):
            largest = max(size for size, own in zip(sizes, kinds, strict=True) if own == kind)
            steps = [i for i, own in enumerate(kinds) if own == kind and sizes[i] == largest]
            found[kind] = next((i for i in steps if i), 0), largest
        return found

    def _measured(self, step: Callable[[], float], batch: MiniBatch, samples: int) -> tuple[float, float | None]:
        """Loss and seconds of a step; no seconds for those whose memory is measured."""
        exact = self.optimizer.composition.is_exact(len(self.steps))
        first, size = self._due.get(exact, (0, samples))
        if exact not in self.tally.peaks and len(self.steps) >= first and samples == size:
            held = [*self.optimizer.held(), *(part for part in batch if part is not None)]
            loss, self.tally.peaks[exact] = peak_memory(step, self.method, self.device, held=held)
            return loss, None
        before = self._watch.seconds
        with self._watch.running():
            loss = step()
        self.tally.add(exact, self._watch.seconds - before)
        return loss, self._watch.seconds - before

    def _snapshot(self, batches: TaskBatches) -> list[Closure]:
        """The loss on each mini-batch of the task, for optimizers that look at all of it at a snapshot."""

        def closure(samples: int, make: Callable[[], list[Tensor]]) -> Closure:
            def loss() -> Tensor:
                return self.method.loss(self.method.prepare(self._own_part(make(), samples)))

            return self._slice(loss, samples)

        return [closure(samples, make) for samples, make in batches.snapshot()]

    def _own_part(self, whole: Sequence[Tensor], samples: int) -> MiniBatch:
        """This process's part of a mini-batch of so many samples, on the device."""
        own = self.optimizer.executor.slice(samples)
        parts = [part[own].to(self.device, self.dtype if part.is_floating_point() else part.dtype) for part in whole]
        return MiniBatch(*parts)

    def _slice(self, closure: Closure, samples: int) -> Slice:
        """A closure over this process's part of a mini-batch of so many samples."""
        own = self.optimizer.executor.slice(samples)
        return Slice(closure, own.start, own.stop, samples)

    def _moving(self) -> nn.ModuleList:
        """The modules whose buffers move with the parameters: batch norm's statistics."""
        return trained_modules(self.method, self.method.trainable())

    def _resume(self, task: int, cosine: torch.optim.lr_scheduler.LRScheduler) -> int:
        """Take over the last saved epoch of this task; the number of the epoch to begin with."""
        if known := self.checkpoints.tally(task) if self.checkpoints else None:
            self.tally = Tally(known["peaks"], known["timed"])
        saved = self.checkpoints.load("epoch") if self.checkpoints else None
        if saved is None or saved["task"] != task:
            return 0
        with torch.no_grad():
            for name, parameter in self.method.trainable().items():
                parameter.copy_(saved["parameters"][name])
        moving = self._moving()
        for name, value in saved["buffers"].items():
            path, _, own = name.rpartition(".")
            moving.get_submodule(path)._buffers[own] = value.to(self.device)  # it may have grown
        self.optimizer.load_state_dict(saved["optimizer"])
        cosine.load_state_dict(saved["schedule"])
        self.steps = [Step(*row) for row in saved["steps"]]
        if self.probe:
            self.probe.seen = [Probe(*row) for row in saved["probes"]]
        return int(saved["epoch"]) + 1

    def _save(self, task: int, epoch: int, cosine: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Save this epoch: steps with an exact gradient cannot be made again from a log."""
        if self.checkpoints:
            parameters = {name: parameter.detach() for name, parameter in self.method.trainable().items()}
            state = {
                "task": task,
                "epoch": epoch,
                "parameters": parameters,
                "buffers": dict(self._moving().named_buffers()),
                "optimizer": self.optimizer.state_dict(),
                "schedule": cosine.state_dict(),
                "steps": as_rows(self.steps),
                "probes": as_rows(self.probe.seen) if self.probe else [],
            }
            self.checkpoints.save("epoch", state)
