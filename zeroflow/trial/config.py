"""A cell's configuration: what is computed, and nothing about where or how fast.

The cell's id is the hash of the canonical form, which leaves out keys and options at their defaults: one added later, with
a default that means "as before", changes no id. Where a cell runs (device, threads, data folder, workers) is ``Placement``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zeroflow.errors import ConfigError, unknown
from zeroflow.trial.keys.values import plain, require


@dataclass(frozen=True)
class TrialConfig:
    """One cell of the grid. Build it with ``from_dict``, which checks it and fills what depends on other keys.

    Attributes:
        dataset: registered name.
        transform: registered name; by default the data set's own.
        image_size: pixels; by default the backbone's own.
        preprocessing: for transforms that take it, ``mean std interpolation crop_pct crop_mode``, see
            ``zeroflow.data.Preprocessing``; by default what the backbone's weights were trained with.
        tasks: number of tasks of equal size; with ``base_classes``, the first task has so many classes, the others are equal.
        base_classes: of the first task.
        increments: instead of ``tasks``, the number of classes of every task.
        class_order_seed: of the class order.
        fixed_class_order: instead of a seed, the data set's own labels in the order in which they are learned, or
            ``"sorted"``, which is 0, 1, 2...
        stop_after: number of tasks that are run; by default all.
        validation: share of every class's training samples that takes the place of the test samples (0: evaluate on
            test data).
        backbone: ``quickdraw_vit``, a timm tag, or a backbone of one's own.
        checkpoint: file, ``"hub"`` or ``"none"``; by default the backbone's own.
        access: how the backbone is reached, see ``zeroflow.models.access``; by default as it is, ``white-box``.
        method: registered name.
        method_options: the method's.
        classifier: registered name of a closed-form classifier, for methods that take one; by default the method's own.
        classifier_options: the classifier's.
        optimizer: registered name; None where the method does not train.
        optimizer_options: the optimizer's.
        lr: learning rate.
        eps: perturbation size.
        queries: directions per step. None where they mean nothing.
        schedule: ``cosine`` (per epoch, to zero) or ``constant``.
        epochs: per task.
        batch_size: samples in a mini-batch.
        hybrid_epochs: how many of the epochs, from the first, take the exact gradient (ZeroFlow's hybrid enhancement);
            their learning rate is ``optimizer_options.hybrid_lr``.
        loss: what is trained, by default ``cross-entropy``; ``error-rate`` is the 0-1 error itself. With ``class-means``,
            ``class-means-error`` or ``ridge`` there is no head: the examples of a mini-batch are classified by each other
            (see ``zeroflow.models.criteria``), and each mini-batch has nearly as many of every class.
        seed: of initial values, batch order, augmentation and directions.
        probe_every: steps between two looks at the loss of old and of new tasks, for methods with one head.
        dtype: of all computation.
        later: from a task on, counted from 1, other settings of training: ``{"task": 4, "optimizer": "zo-adam", "lr": 1e-4}``,
            any of ``LATER_KEYS``. What it leaves out stays as before; with another optimizer, that one's own defaults.
    """

    dataset: str = "quickdraw100"
    transform: str | None = None
    image_size: int | None = None
    tasks: int = 10
    base_classes: int | None = None
    increments: list[int] | None = None
    class_order_seed: int = 1993
    fixed_class_order: list[int] | str | None = None
    stop_after: int | None = None
    validation: float = 0.0
    backbone: str = "quickdraw_vit"
    checkpoint: str | None = None
    method: str = "ease"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str | None = "fo-sgd"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    eps: float | None = None
    queries: int | None = None
    schedule: str | None = "cosine"
    epochs: int | None = 10
    hybrid_epochs: int = 0
    batch_size: int | None = 48
    seed: int = 0
    probe_every: int | None = None
    dtype: str = "float32"
    access: str | None = None
    loss: str | None = None
    classifier: str | None = None
    classifier_options: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    later: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "") -> TrialConfig:
        """Check ``values`` and build the configuration in its normal form.

        Keys that mean nothing for the method or the optimizer (the optimizer of a method that does not train, the queries
        of a first-order one) are dropped, so that equal cells get equal ids.

        Args:
            values: keys of this class; missing ones take their defaults.
            where: named in messages, e.g. the grid file.

        Raises:
            ConfigError: an unknown key or name, a value of the wrong kind or out of range; it names the nearest right one.
        """
        for name in values:
            if name not in _DEFAULTS:
                raise unknown("key", name, _DEFAULTS, where=where)
        try:
            config = cls(**{k: plain(v) for k, v in values.items()})._normal()
            config._check_tasks()
            return config
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}" if where else str(error)) from None

    def _normal(self) -> TrialConfig:
        # Late: whoever only names a configuration needs neither torch nor the registries.
        from zeroflow.data import datasets
        from zeroflow.methods import methods
        from zeroflow.trial.keys.branch import later_keys
        from zeroflow.trial.keys.model import model_keys
        from zeroflow.trial.keys.stream import stream_keys
        from zeroflow.trial.keys.training import training_keys

        for name in ("dataset", "transform", "backbone", "checkpoint", "method", "optimizer", "schedule", "dtype"):
            value, optional = getattr(self, name), name in ("transform", "checkpoint", "optimizer", "schedule")
            require(name, value, isinstance(value, str) or (optional and value is None), "a string")
        for name in NESTED:
            require(name, getattr(self, name), isinstance(getattr(self, name), Mapping), "a mapping")
        classes = datasets.get(self.dataset).classes
        methods.get(self.method)
        stream = stream_keys(self, classes)
        keys = {**stream, **model_keys(self), **training_keys(self)}
        normal = dataclasses.replace(self, **keys)
        return dataclasses.replace(normal, later=later_keys(normal))

    def at(self, task: int) -> TrialConfig:
        """The configuration that a task is trained with.

        Args:
            task: from 0.
        """
        return self._branched if self.later and task + 1 >= self.later["task"] else self

    @functools.cached_property
    def _branched(self) -> TrialConfig:
        return TrialConfig(**branched(dataclasses.asdict(self)))._normal()

    def _check_tasks(self) -> None:
        """Refuse tasks that cannot be learned so, where their classes are known."""
        from zeroflow.data import datasets, even_increments
        from zeroflow.trial.keys.training import check_tasks

        if (classes := datasets.get(self.dataset).classes) is not None:
            check_tasks(self, self.increments or even_increments(classes, self.tasks, self.base_classes))

    @functools.cached_property
    def unbranched(self) -> TrialConfig:
        """The cell that goes through all tasks as this one goes through those before ``later.task``."""
        return dataclasses.replace(self, later={}, stop_after=None)

    def uncut(self, shards: int) -> str | None:
        """Why a mini-batch cannot be cut into so many slices; None: it can."""
        from zeroflow.trial.keys.training import why_uncut

        return why_uncut(self, shards)

    def canonical(self) -> dict[str, Any]:
        """The keys that differ from their defaults, sorted, as plain JSON values."""
        return json.loads(_canonical_text(vars(self)))

    @functools.cached_property
    def cell_id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the canonical form."""
        return cell_id_of(vars(self))

    def label(self) -> str:
        """A short name for progress lines, which mostly tells the cells of a grid apart."""
        values = {
            "classifier": self.classifier,
            **self.classifier_options,
            "q": self.queries,
            "lr": self.lr and f"{self.lr:.3g}",
            "epochs": self.epochs,
            "exact": self.hybrid_epochs,
            **self.optimizer_options,
            "access": self.access,
            "loss": self.loss,
            **self._unusual_preprocessing(),
            **{f"later.{key}": value for key, value in self.later.items()},
            "seed": str(self.seed),
        }
        named = [self.dataset, self.method, *([self.optimizer] if self.optimizer else [])]
        return " ".join([*named, *(f"{key}={value}" for key, value in values.items() if value)])

    def _unusual_preprocessing(self) -> dict[str, Any]:
        """What differs from the preprocessing that the backbone's weights ask for."""
        if not self.preprocessing:
            return {}
        from zeroflow.data import Preprocessing
        from zeroflow.models.factory import preprocessing_of

        usual = {**Preprocessing().values(), **plain(preprocessing_of(self.backbone))}
        return {key: value for key, value in self.preprocessing.items() if value != usual.get(key)}


_DEFAULTS = {f.name: getattr(TrialConfig(), f.name) for f in dataclasses.fields(TrialConfig)}


def cell_id_of(keys: Mapping[str, Any]) -> str:
    """The id of a cell by its keys in normal form; one that is missing has its default."""
    return hashlib.sha256(_canonical_text(keys).encode()).hexdigest()[:16]


def _canonical_text(keys: Mapping[str, Any]) -> str:
    changed = {key: keys[key] for key, default in _DEFAULTS.items() if key in keys and keys[key] != default}
    return json.dumps(changed, sort_keys=True, separators=(",", ":"))


NESTED = tuple(key for key, default in _DEFAULTS.items() if isinstance(default, Mapping))
"""The keys that hold a mapping; in a grid file a dotted key reaches into one."""

OF_THE_OPTIMIZER = {key: _DEFAULTS[key] for key in ("optimizer_options", "lr", "eps", "queries", "hybrid_epochs")}
"""The keys that mean something for one optimizer only, with what stands for its own defaults."""

LATER_KEYS = ("optimizer", *OF_THE_OPTIMIZER, "schedule", "epochs", "batch_size")
"""The keys that ``later`` may change."""


def branched(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a cell with those of ``later`` in their place; another optimizer brings its own settings."""
    own = {key: value for key, value in values["later"].items() if key != "task"}
    other = own.get("optimizer", values["optimizer"]) != values["optimizer"]
    reset = OF_THE_OPTIMIZER if other else {}
    return {**values, "later": {}, **reset, **own}
