"""Losses of an old and of a new task as functions of the same values, and how a run learns on them (ZeroFlow, Figures 3, 6).

``TwoParameters`` is a function of the plane with known minima. ``Adapter`` is a real one: the values of one adapter in the
frozen backbone, with the losses of a stream's first two tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeroflow.data import load_dataset
from zeroflow.data.scenario import Batch, View, joined
from zeroflow.errors import ConfigError
from zeroflow.methods import methods
from zeroflow.methods.finetune import FineTuning
from zeroflow.models.factory import create_backbone
from zeroflow.optim import ThreeStepOptimizer, create_optimizer, optimizers
from zeroflow.trial import randomness
from zeroflow.trial.batches import TaskBatches
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.placement import Placement
from zeroflow.trial.probes import some
from zeroflow.trial.result import Probe
from zeroflow.trial.stream import scenario_of
from zeroflow.trial.training import TaskTrainer

_LOOKS = 25  # at an adapter's run in each task
_FLAT = 1e-9  # of a way's length: less is rounding
_SAMPLES = 100  # of each task that an adapter's losses are looked at on
_OF_A_RUN = ("optimizer", "optimizer_options", "lr", "eps", "queries", "seed")
_USUAL = ("access", "loss", "later")


@dataclass(frozen=True)
class Run:
    """An optimizer with its settings, as in ``TrialConfig``; ``queries`` and ``eps`` are None where it has none."""

    optimizer: str
    lr: float
    eps: float | None = None
    queries: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def build(self, parameters: Any, *words: int) -> ThreeStepOptimizer:
        """A fresh optimizer over ``parameters``, its directions keyed by the seed and ``words``."""
        key = randomness.key(self.seed, randomness.OPTIMIZER, *words)
        return create_optimizer(
            self.optimizer, parameters, lr=self.lr, queries=self.queries, eps=self.eps, seed=key, **self.options
        )

    def columns(self) -> dict[str, Any]:
        options = json.dumps(dict(self.options), sort_keys=True)
        return {
            "optimizer": self.optimizer,
            "optimizer_options": options,
            "lr": self.lr,
            "eps": self.eps,
            "queries": self.queries,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Point:
    """A place on a landscape: its coordinates on the plane, its distance from it, and both losses there."""

    x: float
    y: float
    loss_old: float
    loss_new: float
    distance: float = 0.0


Look = Callable[[int], None]


class Landscape(ABC):
    """Two losses of the same d values, and a plane on which a point of R^d is shown.

    Attributes:
        name: of the kind.
        facts: all that determines its losses, plain values.
        parameters: the values, as they are now.
        start: where every run begins ``[d]``.
        marks: named points ``[d]``, among them ``old optimum`` and ``new optimum``.
        every: steps between two looks.
        side: points of a surface's grid along each axis.
    """

    name: str
    facts: Mapping[str, Any]
    parameters: Mapping[str, nn.Parameter]
    start: Tensor
    marks: Mapping[str, Tensor]
    every: int
    side: int

    @abstractmethod
    def losses(self) -> tuple[float, float]:
        """Loss of the old and of the new task at the values as they are now."""

    @abstractmethod
    def learn(self, run: Run, tasks: Sequence[int], first: int, look: Look) -> int:
        """Train the values on some tasks together (0: old, 1: new); of data every sample weighs the same.

        Args:
            run: with what.
            tasks: on what.
            first: number of the first step.
            look: called with a step's number before it.

        Returns:
            The number of the next step.
        """

    def vector(self) -> Tensor:
        """The values as they are now, float64 ``[d]``."""
        return torch.cat([p.detach().double().cpu().reshape(-1) for p in self.parameters.values()])

    @torch.no_grad()
    def put(self, vector: Tensor) -> None:
        """Set the values to ``vector`` ``[d]``."""
        parts = torch.split(vector, [p.numel() for p in self.parameters.values()])
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.copy_(part.view_as(parameter))

    @functools.cached_property
    def plane(self) -> tuple[Tensor, Tensor, Tensor]:
        """Origin and two orthonormal directions, each ``[d]``: towards the old optimum, and square to it towards the new."""
        origin = self.start
        old, new = self.marks["old optimum"] - origin, self.marks["new optimum"] - origin
        along = old / old.norm()
        across = new - (new @ along) * along
        if not across.norm() > _FLAT * new.norm():
            raise ConfigError(
                f"trajectories: the start and both optima lie on a line ({len(origin)} trained value(s)), which makes no plane; train "
                "more values, or longer"
            )
        return origin, along, across / across.norm()

    def point(self) -> Point:
        """Where the values are now."""
        origin, *axes = self.plane
        offset = self.vector() - origin
        x, y = (float(offset @ axis) for axis in axes)
        distance = math.sqrt(max(float(offset @ offset) - x * x - y * y, 0.0))
        return Point(x, y, *self.losses(), distance=distance)

    def at(self, x: float, y: float) -> Point:
        """A point of the plane; the values are there afterwards."""
        origin, along, across = self.plane
        self.put(origin + x * along + y * across)
        return Point(x, y, *self.losses())


class TwoParameters(Landscape):
    """Two bent valleys in the plane that lie on the same arch, v = 1 - x^2 / 4 high, with their floors at x = -2 and x = 2.

    L_k = sqrt(1 + (x - m_k)^2 + 9 (y - 1 + x^2 / 4)^2) - 1 with m_old = -2, m_new = 2: each has its only minimum, 0, at
    (m_k, 0); their mean has its own at (0, 1).
    """

    name = "two-parameters"
    steps = 200
    every = 2
    side = 41

    def __init__(self) -> None:
        self.facts = {"steps": self.steps}
        self.values = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.parameters = {"values": self.values}
        places = {"start": (-0.5, -2.0), "old optimum": (-2.0, 0.0), "new optimum": (2.0, 0.0), "balance": (0.0, 1.0)}
        self.marks = {name: torch.tensor(place, dtype=torch.float64) for name, place in places.items()}
        self.start = self.marks["start"]

    @property
    def plane(self) -> tuple[Tensor, Tensor, Tensor]:
        """The values themselves."""
        identity = torch.eye(2, dtype=torch.float64)
        return torch.zeros(2, dtype=torch.float64), identity[0], identity[1]

    def loss(self, task: int) -> Tensor:
        x, y = self.values
        return torch.sqrt(1 + (x - (-2.0, 2.0)[task]) ** 2 + 9 * (y - 1 + x**2 / 4) ** 2) - 1

    @torch.no_grad()
    def losses(self) -> tuple[float, float]:
        return float(self.loss(0)), float(self.loss(1))

    def learn(self, run: Run, tasks: Sequence[int], first: int, look: Look) -> int:
        optimizer = run.build([self.values], *tasks)
        steps = self.steps * (1 if len(tasks) == 1 else 2)
        for step in range(first, first + steps):
            look(step)
            optimizer.step(lambda: torch.stack([self.loss(task) for task in tasks]).mean())
        return first + steps


@dataclass
class _Watched:
    """Calls ``call`` with the number of each step: a trainer's probe."""

    call: Look
    seen: list[Probe] = field(default_factory=list)

    def look(self, step: int, *, last: bool = False) -> None:
        if not last:
            self.call(step)


class _OnlyTuning(FineTuning):
    """Its head stands still at the class means that it begins with: what is trained is the adapter alone."""

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad and name.startswith("tuning.")}


class Adapter(Landscape):
    """The values of one adapter; the first two tasks of a stream are the old and the new one.

    The head is fixed: the class means of the start, of both tasks. A task's loss is the cross-entropy over the classes of
    both, so what one task wants costs the other. Losses are looked at on fixed training samples without augmentation.

    Args:
        config: of method ``finetune``; every key but those of a ``Run`` counts.
        place: where.
        reference: what finds each task's optimum, in ``patience`` times the epochs.
        runs: what will learn on it; an optimizer that cannot is refused before any training.

    Raises:
        ConfigError: there is no plane through the start and both optima, or an optimizer cannot train so many values.
    """

    name = "adapter"
    patience = 5
    side = 17

    def __init__(self, config: TrialConfig, place: Placement, reference: Run, runs: Sequence[Run] = ()) -> None:
        self.config, self.device = config, place.torch_device()
        self.dtype = getattr(torch, config.dtype)
        backbone = create_backbone(config.backbone, checkpoint=config.checkpoint, image_size=config.image_size)
        dataset = load_dataset(config.dataset, place.data_dir, cache_bytes=place.cache_bytes)
        scenario = scenario_of(config, dataset, backbone.image_size, place.loaders())
        self.tasks = [task.train for task in scenario.tasks[:2]]
        self.batch, self.loaders = place.evaluation_batch, place.loaders()
        info = methods.get(config.method)
        self.method = _OnlyTuning(backbone, info.parse(dict(config.method_options))).to(self.device, self.dtype)
        classes = range(scenario.tasks[1].classes.stop)
        initial = randomness.generator(config.seed, randomness.INITIAL_VALUES, 0)
        self.method.begin_task(classes, initial, self._plain(joined(self.tasks)))
        self.method.to(self.device, self.dtype)
        self.parameters = self.method.trainable()
        for run in (reference, *runs):
            run.build(list(self.parameters.items()))
        self.looked_at = [list(self._plain(some(view, _SAMPLES))) for view in self.tasks]
        shared = {key: value for key, value in dataclasses.asdict(config).items() if key not in _OF_A_RUN + _USUAL}
        steps = (config.epochs or 0) * math.ceil(len(self.tasks[0]) / (config.batch_size or 1))
        self.every = max(1, steps // _LOOKS)
        self.facts = {**shared, "reference": reference.columns(), "patience": self.patience}
        self.start = self.vector()
        self.marks = {"start": self.start}
        self.marks |= {f"{name} optimum": self._optimum(reference, task) for task, name in enumerate(("old", "new"))}
        _ = self.plane  # or it is refused here

    def _plain(self, view: View) -> Iterator[Batch]:
        return ((images.to(self.device, self.dtype), labels) for images, labels in view.plain_batches(self.batch))

    def _optimum(self, reference: Run, task: int) -> Tensor:
        self.put(self.start)
        self._train(reference, [task], self.patience, lambda step: None)
        return self.vector()

    @torch.no_grad()
    def losses(self) -> tuple[float, float]:
        self.method.eval()
        old, new = (self._loss(batches) for batches in self.looked_at)
        self.method.train()
        return old, new

    def _loss(self, batches: Iterable[Batch]) -> float:
        parts = [
            F.cross_entropy(
                self.method.scores(self.method.features(images, range(1))), labels.to(self.device), reduction="none"
            )
            for images, labels in batches
        ]
        return float(torch.cat(parts).double().mean())

    def learn(self, run: Run, tasks: Sequence[int], first: int, look: Look) -> int:
        return first + self._train(run, tasks, 1, lambda step: look(first + step))

    def _train(self, run: Run, tasks: Sequence[int], times: int, look: Look) -> int:
        config, samples = self.config, joined([self.tasks[task] for task in tasks])
        assert config.epochs and config.batch_size and config.schedule
        trainer = TaskTrainer(
            self.method,
            run.build(list(self.parameters.items()), *tasks),
            config.epochs * times,
            config.schedule,
            self.device,
            self.dtype,
            probe=_Watched(look),
            loader_threads=self.loaders,
        )

        def order(epoch: int) -> Any:
            return randomness.batch_order(run.seed, tasks[-1], epoch, len(samples))

        trainer.train(TaskBatches(self.method, samples, order, config.batch_size, tasks[-1], run.seed))
        return len(trainer.steps)


def exact(optimizer: str) -> bool:
    """Whether an optimizer follows the exact gradient."""
    return optimizers.get(optimizer).estimator.exact


def check_cells(cells: Sequence[TrialConfig]) -> None:
    """Refuse cells whose paths cannot be shown on one landscape.

    Raises:
        ConfigError: a method other than ``finetune`` or nothing but a head to train, cells that differ in more than optimizer,
            lr, eps, queries and seed, no first-order one among them, or a stream of a single task.
    """
    first = cells[0]
    for config in cells:
        if config.method != "finetune" or config.method_options.get("tune") == "none":
            raise ConfigError(
                f"trajectories: method={config.method!r} with {dict(config.method_options)}: expected 'finetune', one model "
                "with one head, and something to tune besides it"
            )
        if config.method_options.get("imprint") is False:
            raise ConfigError("trajectories: imprint=False: the head stands still at class means here, leave it out")
        for key in _USUAL:
            if given := getattr(config, key):
                raise ConfigError(
                    f"trajectories: {key}={given!r}: a landscape shows the backbone as it is, leave it out"
                )
        for key, value in dataclasses.asdict(config).items():
            if key not in _OF_A_RUN and value != getattr(first, key):
                raise ConfigError(
                    f"trajectories: {key}={getattr(first, key)!r} in one cell and {value!r} in another; expected cells that "
                    f"differ in {', '.join(_OF_A_RUN)} alone"
                )
    if 1 in (first.stop_after, first.tasks):
        raise ConfigError("trajectories: expected a stream of at least two tasks")
    if not any(exact(str(config.optimizer)) for config in cells):
        raise ConfigError("trajectories: expected a cell with a first-order optimizer, which finds each task's optimum")
