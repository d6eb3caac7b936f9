"""A cell's configuration: what is computed, and nothing about where or how fast.

The cell's id is the hash of the canonical form, which leaves out keys and options at their defaults: one added later, with
a default that means "as before", changes no id. Where a cell runs (device, threads, data folder, workers) is ``Placement``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zeroflow import options
from zeroflow.errors import ConfigError, unknown

if TYPE_CHECKING:
    from zeroflow.methods import MethodInfo

SCHEDULES = ("cosine", "constant")
DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class TrialConfig:
    """One cell of the grid. Build it with ``from_dict``, which checks it and fills what depends on other keys.

    Attributes:
        dataset: registered name. transform: registered name; default: the data set's own. image_size: pixels; default:
            the backbone's own.
        preprocessing: for transforms that take it: ``mean std interpolation crop_pct crop_mode``, see
            ``zeroflow.data.Preprocessing``; what is not given is what the backbone's weights were trained with.
        tasks: how many, all of them equal; or beside ``base_classes``, the classes of the first task, the others equal; or
            ``increments`` alone, the classes of every task.
        class_order_seed: of the class order; or ``fixed_class_order``, the data set's own labels in the order in which
            they are learned, or ``"sorted"``, which is 0, 1, 2...
        stop_after: only the first so many tasks are run; default: all. validation: share of every class's training
            samples that takes the place of the test samples (0: evaluate on test data).
        backbone: ``quickdraw_vit`` or a timm tag. checkpoint: file, ``"hub"`` or ``"none"``; default: the backbone's own.
        access: how the backbone is reached, see ``zeroflow.models.access``; default: as it is, ``white-box``.
        method, method_options: registered name and its options.
        classifier, classifier_options: registered name of a closed-form classifier and its options, for methods that take
            one; default: the method's own.
        optimizer, optimizer_options: registered name and its options; None where the method does not train.
        lr: learning rate. eps: perturbation size. queries: directions per step. None where they mean nothing.
        schedule: ``cosine`` (per epoch, to zero) or ``constant``. epochs, batch_size: per task. hybrid_epochs: how many of
            the epochs, from the first, take the exact gradient (ZeroFlow's hybrid enhancement); their learning rate is
            ``optimizer_options.hybrid_lr``.
        loss: ``error-rate``: what is trained is the 0-1 error itself; ``class-means``, ``class-means-error`` or ``ridge``: there is no head, a
            mini-batch's examples are classified by each other (see ``zeroflow.models.criteria``), and each mini-batch has
            nearly as many of every class; default: ``cross-entropy``.
        seed: of initial values, batch order, augmentation and directions. probe_every: steps between two looks at the loss
            of old and of new tasks, for methods with one head. dtype: of all computation.
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
            return cls(**{k: _plain(v) for k, v in values.items()})._normal()
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}" if where else str(error)) from None

    def _normal(self) -> TrialConfig:
        from zeroflow.data import datasets
        from zeroflow.methods import methods
        from zeroflow.models.access import accesses
        from zeroflow.models.criteria import criteria
        from zeroflow.models.factory import check_backbone, default_image_size
        from zeroflow.models.own import EXPORTED
        from zeroflow.optim import optimizers
        from zeroflow.optim.factory import check_settings

        for name in ("dataset", "transform", "backbone", "checkpoint", "method", "optimizer", "schedule", "dtype"):
            value, optional = getattr(self, name), name in ("transform", "checkpoint", "optimizer", "schedule")
            _require(name, value, isinstance(value, str) or (optional and value is None), "a string")
        dataset, method = datasets.get(self.dataset), methods.get(self.method)
        _require("seed", self.seed, _natural(self.seed) and self.seed < 2**63, "an integer >= 0")
        stream = {**self._tasks(dataset.classes), **self._class_order(dataset.classes)}
        _require(
            "validation", self.validation, _number(self.validation) and 0 <= self.validation < 1, "a share in [0, 1)"
        )
        stop, tasks = self.stop_after, stream["tasks"]
        _require("stop_after", stop, stop is None or (_whole(stop) and stop <= tasks), f"1..{tasks} tasks")
        _require("image_size", self.image_size, self.image_size is None or _whole(self.image_size), "an integer >= 1")
        _require("dtype", self.dtype, self.dtype in DTYPES, " or ".join(DTYPES))
        every = self.probe_every
        _require("probe_every", every, every is None or _whole(every), "an integer >= 1")
        if every and not method.build.one_head:
            able = [name for name, info in methods.items() if info.build.one_head]
            raise ConfigError(
                f"probe_every={every}: method {self.method!r} has no loss of old tasks while it trains; expected one of "
                + ", ".join(able)
            )
        access = self._one_of("access", accesses)
        loss = self._one_of("loss", criteria)
        for name in NESTED:
            _require(name, getattr(self, name), isinstance(getattr(self, name), Mapping), "a mapping")
        if self.optimizer is not None:
            optimizers.get(self.optimizer)
        if not accesses[access or "white-box"].remote:
            check_backbone(self.backbone, self.checkpoint)
        elif self.image_size is None:
            check_backbone(self.backbone, None)  # with an image size it may be anything that an endpoint calls its own
        method_options = method.parse(dict(self.method_options))
        classified, draws = self._classified(method)
        changes: dict[str, Any] = {
            **stream,
            **classified,
            "access": access,
            "loss": loss,
            "method_options": _changed(self.method_options, _method_defaults(self.method)),
            "validation": float(self.validation),
            "stop_after": None if stop == tasks else stop,
            "transform": None if self.transform == dataset.transform else self.transform,
            "preprocessing": self._preprocessing(self.transform or dataset.transform),
            "image_size": None if self.image_size == default_image_size(self.backbone) else self.image_size,
        }
        if self.checkpoint not in (None, "hub", "none"):
            # Cells run in folders of their own.
            changes["checkpoint"] = str(Path(str(self.checkpoint)).expanduser().absolute())
        if self.backbone.endswith(EXPORTED):
            changes["backbone"] = str(Path(self.backbone).expanduser().absolute())
        if not method.trains:
            changes |= dict.fromkeys(("optimizer", "lr", "eps", "queries", "schedule", "epochs", "batch_size", "loss"))
            changes |= {"optimizer_options": {}, "seed": self.seed if draws else 0, "hybrid_epochs": 0}
            self._check_access(method, method_options, None, False)
            return dataclasses.replace(self, **changes)

        _require("optimizer", self.optimizer, self.optimizer is not None, f"a name: method {self.method!r} trains")
        info = optimizers.get(str(self.optimizer))
        if (reason := method.build.refusal(info, method_options)) is not None:
            raise ConfigError(f"method {self.method!r} cannot be trained with optimizer {info.name!r}: {reason}")
        if loss and not method.build.any_loss:
            raise ConfigError(f"loss={loss!r}: method {self.method!r} has a loss of its own; leave loss out")
        if loss and criteria[loss].headless:
            self._check_headless(method, method_options, info.estimator.per_example)
        differentiates = f"optimizer {info.name!r}" if info.estimator.differentiates else None
        if self.hybrid_epochs or self.optimizer_options.get("hybrid"):
            differentiates = differentiates or "a hybrid run, in its first steps,"
        self._check_access(method, method_options, differentiates, info.estimator.per_example)
        _require("epochs", self.epochs, _whole(self.epochs), "an integer >= 1")
        _require("batch_size", self.batch_size, _whole(self.batch_size), "an integer >= 1")
        _require("schedule", self.schedule, self.schedule in SCHEDULES, " or ".join(SCHEDULES))
        lr = info.default_lr if self.lr is None else self.lr
        _require("lr", lr, _number(lr) and lr > 0, "a number > 0")
        eps = info.default_eps if self.eps is None else self.eps
        queries = info.default_queries if self.queries is None else self.queries
        steps = {"hybrid": self.hybrid_epochs} if self.hybrid_epochs else {}  # how many is known with the data
        given = {**self.optimizer_options, **steps}
        check_settings(info, lr=lr, queries=queries, eps=eps, seed=self.seed, options=given)
        _require(
            "hybrid_epochs", self.hybrid_epochs,
            _natural(self.hybrid_epochs) and self.hybrid_epochs <= int(self.epochs or 0),
            f"an integer from 0 to epochs={self.epochs}",
        )  # fmt: skip
        if info.estimator.exact:
            changes["hybrid_epochs"] = 0
        if dataset.classes is not None:
            from zeroflow.data import even_increments

            self.check_batches(stream["increments"] or even_increments(dataset.classes, tasks, stream["base_classes"]))
        changes["lr"] = float(lr)
        changes["queries"] = queries if info.estimator.uses_queries else None
        changes["eps"] = float(eps) if info.estimator.uses_eps else None
        changes["optimizer_options"] = _changed(self.optimizer_options, _optimizer_defaults(info.name))
        return dataclasses.replace(self, **changes)

    def _preprocessing(self, transform: str) -> dict[str, Any]:
        """All of it where the transform takes it: what is given, else what the backbone's weights ask for."""
        from zeroflow.data import Preprocessing, transform_of, transforms
        from zeroflow.models.factory import preprocessing_of

        transform_of(transform, self.preprocessing)
        if transforms.get(transform).with_preprocessing is None:
            return {}
        try:
            return Preprocessing.of({**preprocessing_of(self.backbone), **self.preprocessing}).values()
        except ConfigError as error:
            raise ConfigError(f"backbone {self.backbone!r}: its weights ask for {error}; give another value") from None

    def _classified(self, method: MethodInfo) -> tuple[dict[str, Any], bool]:
        """The keys of the closed-form classifier, and whether it draws random numbers.

        Where a method is ``simplecil`` with the chosen classifier, the cell goes by that method's name.
        """
        from zeroflow.classifiers import classifiers
        from zeroflow.methods import methods
        from zeroflow.methods.closed_form import NAMED

        build, chosen = method.build, self.classifier
        _require("classifier", chosen, chosen is None or isinstance(chosen, str), "a string")
        if chosen is not None:
            classifiers.get(chosen)
            if build.takes_classifiers is not None and chosen not in build.takes_classifiers:
                able = [name for name, info in methods.items() if info.build.takes_classifiers is None]
                takes = f"it takes {', '.join(build.takes_classifiers)}; " if build.takes_classifiers else ""
                raise ConfigError(
                    f"classifier={chosen!r} with method {self.method!r}: {build.why_these}; {takes}any is taken by {', '.join(able)}"
                )
        name = chosen or build.own_classifier
        if name is None:
            _require(
                "classifier_options",
                self.classifier_options,
                not self.classifier_options,
                "no options: there is no classifier",
            )
            return {}, False
        info = classifiers.get(name)
        options.parse(info.options, self.classifier_options, owner=f"classifier {name!r}", where="classifier_options")
        named = NAMED.get(name) if self.method == NAMED["class-means"] else None
        return {
            "method": named or self.method,
            "classifier": None if named or name == build.own_classifier else name,
            "classifier_options": _changed(self.classifier_options, options.defaults(info.options)),
        }, info.draws  # fmt: skip

    def _one_of(self, key: str, known: Mapping[str, Any]) -> str | None:
        """The value of a key that is one of a few names; None for the first of them, which is the default."""
        value = getattr(self, key)
        _require(key, value, isinstance(value, str | None), "a string")
        if value is not None and value not in known:
            raise unknown(key, value, known)
        return None if value == next(iter(known)) else value

    def _check_headless(self, method: MethodInfo, chosen: Any, per_example: bool) -> None:
        """Refuse what needs a head, or examples that do not meet."""
        build, where = method.build, f"loss={self.loss!r} with method {self.method!r}"
        if build.needs_head:
            raise ConfigError(f"{where}: the loss needs no head, but {build.needs_head}; leave loss out")
        if self.probe_every:
            raise ConfigError(
                f"probe_every={self.probe_every}: it looks at a head's loss, and loss={self.loss!r} trains none"
            )
        if build.tunes(chosen) == "none":
            raise ConfigError(f"{where}: the loss needs no head, and there is nothing else to train")
        if per_example:
            raise ConfigError(
                f"{where}: optimizer {self.optimizer!r} moves every example of a mini-batch on its own, and the loss compares "
                "them with each other"
            )

    def check_batches(self, counts: Sequence[int]) -> None:
        """Refuse mini-batches in which a loss without a head finds classes with a single example.

        Args:
            counts: classes of every task.
        """
        from zeroflow.methods import methods
        from zeroflow.models.criteria import criteria

        if self.loss is None or not criteria[self.loss].headless:
            return
        trained = counts[:1] if methods.get(self.method).build.first_task_only else counts[: self.stop_after]
        least = 2 * max(trained)
        if (self.batch_size or 0) < least:
            raise ConfigError(
                f"batch_size={self.batch_size!r}: loss={self.loss!r} classifies the examples of a mini-batch by each other; expected "
                f"at least {least}, two of each of {max(trained)} classes"
            )
        if min(trained) < 2:
            raise ConfigError(f"loss={self.loss!r}: expected tasks of at least two classes, to tell one from the other")

    def uncut(self, shards: int) -> str | None:
        """Why a mini-batch cannot be cut into so many slices; None: it can."""
        from zeroflow.models.criteria import criteria

        if shards == 1 or self.loss is None or not criteria[self.loss].headless:
            return None
        return (
            f"data_shards={shards}: loss={self.loss!r} compares the examples of a mini-batch, which therefore cannot be cut; "
            "expected 1 (workers may still share the queries)"
        )

    def _check_access(self, method: MethodInfo, chosen: Any, differentiates: str | None, per_example: bool) -> None:
        """Refuse what the way to the backbone does not allow."""
        from zeroflow.models.access import accesses

        if self.access in (None, "white-box"):
            return
        why = accesses[str(self.access)].refusal(
            tuning=method.build.tunes(chosen), differentiates=differentiates, per_example=per_example, dtype=self.dtype,
            options=vars(chosen),
        )  # fmt: skip
        if why:
            raise ConfigError(f"access={self.access!r} with method {self.method!r}: {why}")

    def _tasks(self, classes: int | None) -> dict[str, Any]:
        """The keys that cut the stream into tasks: the fewest that say the same, where the number of classes is known."""
        from zeroflow.data.scenario import check_increments, even_increments

        tasks, base, increments = self.tasks, self.base_classes, self.increments
        _require("tasks", tasks, _whole(tasks), "an integer >= 1")
        _require("base_classes", base, base is None or _whole(base), "an integer >= 1, the classes of the first task")
        _require(
            "increments", increments,
            increments is None or (_integers(increments) and bool(increments)),
            "a list of the classes of every task; where a list is an axis of a grid: [[50, 25, 25]]",
        )  # fmt: skip
        if increments is not None:
            _require("base_classes", base, base is None, "no value beside increments, which says the same")
            tasks = len(increments)
        if classes is not None:
            counts = even_increments(classes, tasks, base) if increments is None else increments
            check_increments(counts, classes)
            base = counts[0] if len(set(counts)) > 1 and len(set(counts[1:])) == 1 else None
            increments = counts if len(set(counts[1:])) > 1 else None
        return {"tasks": tasks, "base_classes": base, "increments": increments}

    def _class_order(self, classes: int | None) -> dict[str, Any]:
        """The keys of the class order; an order that has a name goes by it, where the number of classes is known."""
        from zeroflow.data.scenario import check_order, class_order

        seed, fixed = self.class_order_seed, self.fixed_class_order
        _require("class_order_seed", seed, _natural(seed) and seed < 2**32, "an integer in 0..2^32-1")
        if fixed is None:
            return {}
        _require(
            "fixed_class_order", fixed, fixed == "sorted" or (_integers(fixed) and bool(fixed)),
            "'sorted' or a list of the data set's labels; where a list is an axis of a grid: [[2, 0, 1]]",
        )  # fmt: skip
        if not isinstance(fixed, str):
            check_order(fixed, classes or len(fixed))
        if classes is not None:
            own = list(range(classes))
            labels = own if isinstance(fixed, str) else fixed
            usual = labels == class_order(classes, TrialConfig.class_order_seed).tolist()
            fixed = None if usual else "sorted" if labels == own else labels
        return {"fixed_class_order": fixed, "class_order_seed": TrialConfig.class_order_seed}

    def canonical(self) -> dict[str, Any]:
        """The keys that differ from their defaults, sorted, as plain JSON values."""
        return json.loads(self._canonical_text())

    @functools.cached_property
    def cell_id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the canonical form."""
        return hashlib.sha256(self._canonical_text().encode()).hexdigest()[:16]

    def _canonical_text(self) -> str:
        changed = {key: value for key, default in _DEFAULTS.items() if (value := getattr(self, key)) != default}
        return json.dumps(changed, sort_keys=True, separators=(",", ":"))

    def label(self) -> str:
        """A short name for progress lines, which mostly tells the cells of a grid apart."""
        values = {
            "classifier": self.classifier, **self.classifier_options, "q": self.queries, "lr": self.lr and f"{self.lr:.3g}", "epochs": self.epochs, "exact": self.hybrid_epochs,
            **self.optimizer_options, "access": self.access, "loss": self.loss, **self._unusual_preprocessing(), "seed": str(self.seed),
        }  # fmt: skip
        named = [self.dataset, self.method, *([self.optimizer] if self.optimizer else [])]
        return " ".join([*named, *(f"{key}={value}" for key, value in values.items() if value)])

    def _unusual_preprocessing(self) -> dict[str, Any]:
        """What differs from the preprocessing that the backbone's weights ask for."""
        if not self.preprocessing:
            return {}
        from zeroflow.data import Preprocessing
        from zeroflow.models.factory import preprocessing_of

        usual = {**Preprocessing().values(), **_plain(preprocessing_of(self.backbone))}
        return {key: value for key, value in self.preprocessing.items() if value != usual.get(key)}


_DEFAULTS = {f.name: getattr(TrialConfig(), f.name) for f in dataclasses.fields(TrialConfig)}

NESTED = tuple(key for key, default in _DEFAULTS.items() if isinstance(default, Mapping))
"""The keys that hold a mapping; in a grid file a dotted key reaches into one."""


@functools.cache
def _method_defaults(name: str) -> Mapping[str, Any]:
    from zeroflow.methods import methods

    return options.defaults(methods.get(name).options)


@functools.cache
def _optimizer_defaults(name: str) -> Mapping[str, Any]:
    from zeroflow.optim import optimizers

    return cast(Mapping[str, Any], _plain(optimizers.get(name).options))


def _plain(value: Any) -> Any:
    """Tuples become lists, so that a value from Python and the same from YAML are equal."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _changed(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from their defaults, each number in the one form that its default has."""
    typed = {key: _like(value, defaults[key]) for key, value in given.items()}
    return {key: value for key, value in typed.items() if value != defaults[key]}


def _like(value: Any, default: Any) -> Any:
    if isinstance(default, float):
        return float(value)
    if isinstance(default, list) and isinstance(value, list) and len(value) == len(default):
        return [_like(one, usual) for one, usual in zip(value, default, strict=True)]
    return int(value) if default is None and isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and options.finite(value)


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _whole(value: Any) -> bool:
    return _natural(value) and value >= 1


def _require(key: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise ConfigError(f"{key}={value!r}: expected {expected}")
