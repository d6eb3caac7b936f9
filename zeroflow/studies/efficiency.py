"""What training steps cost on this machine, optimizer by optimizer: the setting of ZeroFlow's Table 2, without any data.

EASE's first task on random images with random weights: neither changes the work of a step. The steps are those of a trial
(``TaskTrainer``), so memory, seconds and forward passes are what a cell of the same setting would report.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroflow.data import transforms
from zeroflow.data.scenario import View
from zeroflow.errors import ConfigError
from zeroflow.methods import Method, MiniBatch, methods
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import create_backbone
from zeroflow.optim import create_optimizer, optimizers
from zeroflow.progress import Progress, silent
from zeroflow.trial.batches import TaskBatches
from zeroflow.trial.meters import Stopwatch, peak_memory
from zeroflow.trial.placement import Placement, limited_threads
from zeroflow.trial.result import provenance
from zeroflow.trial.training import TaskTrainer

PAPER = (
    ("fo-sgd", 1), ("fo-sgd-checkpoint", 1), ("zo-sgd", 1), ("zo-sgd", 4), ("zo-sgd-sign", 1), ("zo-sgd-conserve", 1),
    ("forward-grad", 1),
)  # fmt: skip
"""The rows of Table 2, (optimizer, queries), and beside them the first-order baseline that spares memory."""

FIRST_TASK = {"cifar100": 5000, "cub": 943, "imagenet-a": 598, "omnibenchmark": 8970}
"""Training images of one of ten equal tasks: a tenth of 50,000 / 9,430 / 5,981 / 89,697, as PILOT distributes the data."""

ASSUMPTIONS = (
    "an epoch visits a tenth of the data set's training images once; a last mini-batch that is smaller counts as a whole one",
    "the same batch size for every data set",
    "data loading is not part of a step",
    "a forward pass of a snapshot takes as long as a plain one",
    "random weights and random images; a cosine head of ten classes",
    "first-order rules have a momentum of 0.9, the others none",
)

_LR = 1e-6  # does not change what a step costs


@dataclass(frozen=True)
class Setting:
    """What is measured, whatever the optimizer.

    Attributes:
        backbone: name of the architecture.
        image_size: pixels; default: the backbone's own.
        batch_size: images per step.
        bottleneck: inner width of the adapters.
        steps: timed ones of each optimizer.
        device: as in ``Placement``.
        threads: as in ``Placement``.
    """

    backbone: str = "vit_base_patch16_224.augreg_in21k"
    image_size: int | None = None
    batch_size: int = 48
    bottleneck: int = 64
    steps: int = 10
    device: str = "auto"
    threads: int = 1


@dataclass(frozen=True)
class Cost:
    """What a step of one optimizer costs.

    Attributes:
        queries: None where the optimizer has none.
        trainable_parameters: d.
        forward_passes: of a step, counted.
        forward_equivalents: of a step, counted.
        peak_memory_bytes: of a step.
        seconds_per_step: median, without data loading.
        in_forwards: median of the step's time in plain no-grad forward passes of the same mini-batch, from images to
            loss, made right before and after. None where the device has not enough memory for the step.
    """

    optimizer: str
    queries: int | None
    trainable_parameters: int
    forward_passes: float
    forward_equivalents: float
    peak_memory_bytes: int | None = None
    seconds_per_step: float | None = None
    in_forwards: float | None = None

    def row(self, batch_size: int, forward_seconds: float) -> dict[str, Any]:
        """All of it as plain values, with the seconds of an epoch of each data set's first task."""
        step = self.seconds_per_step
        steps = {name: math.ceil(images / batch_size) for name, images in FIRST_TASK.items()}
        epochs = {
            name: None if step is None else count * step + self._snapshots(count) * forward_seconds
            for name, count in steps.items()
        }
        return {**asdict(self), "seconds_per_epoch": epochs}

    def _snapshots(self, steps: int) -> int:
        """Forward passes of the snapshots of an epoch, which lie between the steps that are measured."""
        return optimizers.get(self.optimizer).snapshot_forwards(self.queries or 1, steps, steps, {})


def parse_optimizers(text: str) -> list[tuple[str, int]]:
    """``"fo-sgd, zo-sgd:4"`` -> ``[("fo-sgd", 1), ("zo-sgd", 4)]``: names, with the queries behind a colon.

    Raises:
        ConfigError: unknown names and queries that are no number >= 1, all of them at once.
    """
    found, problems = [], []
    for part in text.split(","):
        name, colon, queries = (piece.strip() for piece in part.partition(":"))
        try:
            default = optimizers.get(name).default_queries
        except ConfigError as error:
            problems.append(str(error))
            continue
        if colon and not (queries.isdecimal() and int(queries) >= 1):
            problems.append(f"{part.strip()!r}: expected NAME or NAME:QUERIES with queries >= 1, such as {name}:4")
        found.append((name, int(queries) if queries.isdecimal() else default))
    if problems:
        raise ConfigError(f"optimizers: {'; '.join(problems)}")
    return found


def measure(
    setting: Setting, candidates: Sequence[tuple[str, int]] = PAPER, on_progress: Progress = silent
) -> dict[str, Any]:
    """Measure memory, one candidate after the other, then time: the candidates take turns, so that a machine's drift is shared.

    Args:
        setting: what is measured.
        candidates: (optimizer, queries).
        on_progress: see ``Progress``; a unit is a step of a candidate.

    Returns:
        Plain values for JSON: the setting, what a plain forward pass costs, a row per candidate, and the provenance.

    Raises:
        ConfigError: no such backbone, device or optimizer; before anything is measured.
    """
    for name, _ in candidates:
        optimizers.get(name)
    device = Placement(device=setting.device).torch_device()
    with limited_threads(setting.threads):
        bench = _Bench(setting, device)
        plain = bench.forward_memory()
        rows = []
        # Two steps of each for its memory, two to warm up, and the timed ones.
        units = len(candidates) * (4 + setting.steps)
        for number, (name, queries) in enumerate(candidates):
            on_progress(f"memory: {name}, q = {queries}", 2 * number, units)
            rows.append(bench.memory(name, queries))
        fits = [number for number, row in enumerate(rows) if row.peak_memory_bytes is not None]
        behind = 2 * len(candidates)

        def on_round(number: int) -> None:
            rest = len(candidates) * (number + 1 if number else 0)
            what = f"time: round {number} of {setting.steps}" if number else "time: warm-up"
            on_progress(what, behind + rest, units)

        forward, timed = bench.times([candidates[number] for number in fits], on_round)
        for number, (seconds, in_forwards) in zip(fits, timed, strict=True):
            rows[number] = dataclasses.replace(rows[number], seconds_per_step=seconds, in_forwards=in_forwards)
    facts = provenance(device, asdict(setting))
    return {
        **asdict(setting),
        **facts,
        "finished_at": facts["finished_at"].isoformat(timespec="seconds"),
        "image_size": bench.backbone.image_size,
        "model_bytes": bench.model_bytes,
        "forward_memory_bytes": plain,
        "forward_seconds": forward,
        "first_task_images": FIRST_TASK,
        "assumptions": list(ASSUMPTIONS),
        "rows": [row.row(setting.batch_size, forward) for row in rows],
    }


class _Bench:
    """One frozen backbone, one mini-batch, and fresh methods and optimizers for it."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        self.backbone: Backbone = create_backbone(setting.backbone, checkpoint="none", image_size=setting.image_size)
        self.backbone.to(device)
        self.task = random_task(setting.batch_size, self.backbone.image_size)
        self.model_bytes = sum(parameter.nbytes for parameter in self.method().parameters())
        images, labels = self.task.training_batch(np.arange(setting.batch_size), torch.Generator())
        self.batch = MiniBatch(images.to(device), labels.to(device))

    def method(self) -> Method:
        """EASE at its first task."""
        info = methods.get("ease")
        method = info.build(self.backbone, info.parse({"bottleneck": self.setting.bottleneck}))
        method.begin_task(range(10), torch.Generator().manual_seed(0))
        return method.to(self.device).train()

    def trainer(self, name: str, queries: int) -> TaskTrainer:
        info, method = optimizers.get(name), self.method()
        options: dict[str, Any] = {}
        if info.estimator.exact and "momentum" in info.options:
            options["momentum"] = 0.9
        named = list(method.trainable().items())
        return TaskTrainer(
            method,
            create_optimizer(name, named, lr=_LR, queries=queries, **options),
            epochs=1,
            schedule="constant",
            device=self.device,
            dtype=torch.float32,
        )

    def step(self, trainer: TaskTrainer) -> float | None:
        """One step, and its seconds; the trainer's second one measures memory instead."""
        self.backbone.set_grad_checkpointing(trainer.optimizer.checkpoint)
        size = self.setting.batch_size
        trainer.train(TaskBatches(trainer.method, self.task, lambda epoch: np.arange(size), size, task=0, seed=0))
        self.backbone.set_grad_checkpointing(False)
        return trainer.steps[-1].seconds

    def forward(self, method: Method) -> float:
        """Seconds of a plain forward pass."""
        watch = Stopwatch(self.device)
        with watch.running(), torch.no_grad():
            float(method.loss(method.prepare(self.batch)))
        return watch.seconds

    def forward_memory(self) -> int:
        """Peak bytes of a plain forward pass."""
        method = self.method()
        self.forward(method)
        return peak_memory(
            lambda: self.forward(method), method, self.device, held=[self.batch.images, self.batch.labels]
        )[1]

    def memory(self, name: str, queries: int) -> Cost:
        """Peak bytes, forward passes and equivalents of the second step: from then on moments are held."""
        info, trainer = optimizers.get(name), self.trainer(name, queries)
        optimizer, asked = trainer.optimizer, queries if info.estimator.uses_queries else None
        try:
            self.step(trainer)
            before = optimizer.forwards, optimizer.equivalents
            self.step(trainer)
        except torch.OutOfMemoryError:
            return Cost(name, asked, optimizer.flat.size, info.forwards(queries), info.equivalents(queries))
        finally:
            gc.collect()  # CUDA's allocator counts what only awaits collection, too
        counted = optimizer.forwards - before[0], optimizer.equivalents - before[1]
        return Cost(name, asked, optimizer.flat.size, *counted, peak_memory_bytes=trainer.peak_bytes)

    def times(
        self, candidates: Sequence[tuple[str, int]], on_round: Callable[[int], None]
    ) -> tuple[float, list[tuple[float, float]]]:
        """Median seconds of a plain forward pass, and of each candidate the median seconds of a step and its time in forwards.

        The candidates take turns, each step between two plain forward passes.
        """
        plain, trainers = self.method(), [self.trainer(name, queries) for name, queries in candidates]
        on_round(0)
        for trainer in trainers:
            for _ in range(2):  # warm-up, and the step whose memory is measured
                self.step(trainer)
        self.forward(plain)
        forwards = [self.forward(plain)]
        steps: list[list[tuple[float, float]]] = [[] for _ in trainers]
        for number in range(self.setting.steps):
            on_round(number + 1)
            for trainer, found in zip(trainers, steps, strict=True):
                seconds = self.step(trainer)
                forwards.append(self.forward(plain))
                assert seconds is not None
                found.append((seconds, 2 * seconds / sum(forwards[-2:])))
        medians = [tuple(map(statistics.median, zip(*found, strict=True))) for found in steps]
        return statistics.median(forwards), [(seconds, ratio) for seconds, ratio in medians]


@dataclass(frozen=True, eq=False)
class _Noise:
    """Random images, made when asked for: uint8 ``[n, 3, size, size]``."""

    labels: npt.NDArray[np.int64]
    size: int

    def images(self, indices: npt.NDArray[np.int64]) -> Tensor:
        generator = torch.Generator().manual_seed(int(indices[0]))
        return torch.randint(0, 256, (len(indices), 3, self.size, self.size), generator=generator, dtype=torch.uint8)


def random_task(images: int, size: int) -> View:
    """The training images of a task of ten classes, all random."""
    samples = _Noise(np.arange(images) % 10, size)
    return View(samples, np.arange(images), torch.from_numpy(samples.labels), transforms.get("plain"), size)
