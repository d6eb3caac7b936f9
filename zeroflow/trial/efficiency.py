"""What training steps cost on this machine, optimizer by optimizer: the setting of ZeroFlow's Table 2, without any data.

EASE's first task on random images with random weights: neither changes the work of a step. The steps are those of a trial
(``TaskTrainer``), so memory, seconds and forward passes are what a cell of the same setting would report.
"""

from __future__ import annotations

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

from zeroflow.data import class_incremental, transforms
from zeroflow.data.dataset import ImageDataset
from zeroflow.data.scenario import View
from zeroflow.errors import ConfigError
from zeroflow.methods import Method, methods
from zeroflow.models.backbone import Backbone, create_backbone
from zeroflow.optim import create_optimizer, optimizers
from zeroflow.optim.estimators import Backpropagation
from zeroflow.trial.loop import Placement, TaskTrainer
from zeroflow.trial.meters import Stopwatch, peak_memory
from zeroflow.trial.result import provenance

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
    "random weights and random images; a cosine head of ten classes",
    "first-order rules have a momentum of 0.9, the others none",
)

WARM_UP = 3
"""Steps before the timed ones: the first allocates, in the second memory is measured, the third is the first after that."""

_LR = 1e-6  # does not change what a step costs


@dataclass(frozen=True)
class Setting:
    """What is measured, whatever the optimizer.

    Attributes:
        backbone: name of the architecture. image_size: pixels; default: the backbone's own.
        batch_size: images per step. bottleneck: inner width of the adapters. steps: timed steps.
        device, threads: as in ``Placement``.
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
        queries: None where the optimizer has none. trainable_parameters: d.
        forward_passes, forward_equivalents: of a step, counted.
        peak_memory_bytes: of a step; None, as are the seconds: the device has not enough.
        seconds_per_step: median, without data loading. forward_seconds: median of plain no-grad forward passes of the same
            mini-batch, from images to loss, made right before and after.
    """

    optimizer: str
    queries: int | None
    trainable_parameters: int
    forward_passes: float
    forward_equivalents: float
    peak_memory_bytes: int | None = None
    seconds_per_step: float | None = None
    forward_seconds: float | None = None

    @property
    def in_forwards(self) -> float | None:
        """Time of a step in plain forward passes."""
        if self.seconds_per_step is None or self.forward_seconds is None:
            return None
        return self.seconds_per_step / self.forward_seconds

    def seconds_per_epoch(self, images: int, batch_size: int) -> float | None:
        """Seconds to visit so many images once."""
        return None if self.seconds_per_step is None else math.ceil(images / batch_size) * self.seconds_per_step

    def row(self, batch_size: int) -> dict[str, Any]:
        """All of it as plain values."""
        epochs = {name: self.seconds_per_epoch(images, batch_size) for name, images in FIRST_TASK.items()}
        return {**asdict(self), "in_forwards": self.in_forwards, "seconds_per_epoch": epochs}


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
    setting: Setting, candidates: Sequence[tuple[str, int]] = PAPER, tell: Callable[[Cost], None] = lambda cost: None
) -> dict[str, Any]:
    """Measure the candidates one after the other.

    Args:
        setting: what is measured. candidates: (optimizer, queries). tell: called with each one's cost as soon as it is known.

    Returns:
        Plain values for JSON: the setting, what a plain forward pass costs, a row per candidate, and the provenance.

    Raises:
        ConfigError: no such backbone, device or optimizer; before anything is measured.
    """
    for name, _ in candidates:
        optimizers.get(name)
    device = Placement(device=setting.device).torch_device()
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        bench = _Bench(setting, device)
        forward = bench.forward_memory()
        costs = []
        for name, queries in candidates:
            costs.append(bench.cost(name, queries))
            tell(costs[-1])
    finally:
        torch.set_num_threads(threads)
    facts = provenance(device, asdict(setting))
    return {
        **asdict(setting), **facts, "finished_at": facts["finished_at"].isoformat(timespec="seconds"),
        "image_size": bench.backbone.image_size, "model_bytes": bench.model_bytes, "forward_memory_bytes": forward,
        "first_task_images": FIRST_TASK, "assumptions": list(ASSUMPTIONS),
        "rows": [cost.row(setting.batch_size) for cost in costs],
    }  # fmt: skip


class _Bench:
    """One frozen backbone, and fresh methods over it on the same images."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        self.backbone: Backbone = create_backbone(setting.backbone, checkpoint="none", image_size=setting.image_size)
        self.backbone.to(device)
        self.view = random_task(setting.batch_size * (WARM_UP + setting.steps), self.backbone.image_size)
        self.model_bytes = sum(parameter.nbytes for parameter in self.method().parameters())
        images, labels = self.view.training_batch(np.arange(setting.batch_size), torch.Generator())
        self.batch = images.to(device), labels.to(device)

    def method(self) -> Method:
        """EASE at its first task."""
        info = methods.get("ease")
        method = info.build(self.backbone, info.parse({"bottleneck": self.setting.bottleneck}))
        method.begin_task(range(10), torch.Generator().manual_seed(0))
        return method.to(self.device).train()

    def forward_memory(self) -> int:
        """Peak bytes of a plain forward pass."""
        method = self.method()
        self._forward(method)
        return peak_memory(lambda: self._forward(method), method, self.device, held=self.batch)[1]

    def cost(self, name: str, queries: int) -> Cost:
        """Train with one optimizer for some steps, between plain forward passes."""
        info, method = optimizers.get(name), self.method()
        options = {"momentum": 0.9} if isinstance(info.estimator, Backpropagation) and "momentum" in info.options else {}
        named = list(method.trainable().items())
        optimizer = create_optimizer(name, named, lr=_LR, queries=queries, **options)
        self.backbone.set_grad_checkpointing(optimizer.checkpoint)
        trainer = TaskTrainer(
            method=method, optimizer=optimizer, epochs=1, batch_size=self.setting.batch_size, schedule="constant",
            device=self.device, dtype=torch.float32,
        )  # fmt: skip
        asked = queries if info.estimator.uses_queries else None
        plain = self._forward_seconds(method)
        try:
            trainer.train(self.view, 0, 0, lambda epoch: np.arange(len(self.view)), Stopwatch(self.device))
        except torch.OutOfMemoryError:
            return Cost(name, asked, optimizer.flat.size, info.forwards(queries), info.equivalents(queries))
        finally:
            self.backbone.set_grad_checkpointing(False)
            gc.collect()  # CUDA's allocator counts what only awaits collection, too
        plain += self._forward_seconds(method)
        steps = len(trainer.steps)
        timed = [step.seconds for step in trainer.steps[WARM_UP:] if step.seconds is not None]
        return Cost(
            name, asked, optimizer.flat.size, optimizer.forwards / steps, optimizer.equivalents / steps,
            trainer.peak_bytes, statistics.median(timed), statistics.median(plain),
        )  # fmt: skip

    def _forward(self, method: Method) -> float:
        with torch.no_grad():
            return float(method.loss(*self.batch))

    def _forward_seconds(self, method: Method) -> list[float]:
        """Seconds of three plain forward passes, after one that is not counted."""
        watch, times = Stopwatch(self.device), [0.0]
        for _ in range(4):
            with watch.running():
                self._forward(method)
            times.append(watch.seconds)
        return [after - before for before, after in zip(times[1:-1], times[2:], strict=True)]


@dataclass(frozen=True, eq=False)
class _Noise:
    """Random images, made when asked for: uint8 ``[n, 3, size, size]``."""

    labels: npt.NDArray[np.int64]
    size: int

    def images(self, indices: npt.NDArray[np.int64]) -> Tensor:
        generator = torch.Generator().manual_seed(int(indices[0]))
        return torch.randint(0, 256, (len(indices), 3, self.size, self.size), generator=generator, dtype=torch.uint8)


def random_task(images: int, size: int) -> View:
    """The training part of a task of ten classes of random images."""
    samples = _Noise(np.arange(max(images, 10)) % 10, size)
    dataset = ImageDataset("random images", tuple(map(str, range(10))), samples, samples)
    return class_incremental(dataset, [10], transforms.get("plain"), size).tasks[0].train
