"""The keys of training: the optimizer and its settings, the loss, and how often all samples are visited."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from zeroflow.errors import ConfigError
from zeroflow.methods import MethodInfo, methods
from zeroflow.models.criteria import criteria
from zeroflow.optim import OptimizerInfo, optimizers
from zeroflow.optim.factory import check_settings
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.keys.model import check_access, draws_at_random
from zeroflow.trial.keys.values import changed, is_natural, is_number, is_positive, one_of, plain, require

SCHEDULES = ("cosine", "constant")
DTYPES = ("float32", "float64")


def training_keys(config: TrialConfig) -> dict[str, Any]:
    """The keys in normal form; those that mean nothing for the method or the optimizer are dropped.

    Args:
        config: the cell.

    Raises:
        ConfigError: which key, its value and what was expected.
    """
    method = methods.get(config.method)
    require("seed", config.seed, is_natural(config.seed), "an integer >= 0")
    require("dtype", config.dtype, config.dtype in DTYPES, " or ".join(DTYPES))
    _check_probe(config, method)
    loss = one_of("loss", config.loss, criteria)
    if config.optimizer is not None:
        optimizers.get(config.optimizer)
    if not method.trains:
        check_access(config, method, None, False)
        nothing = dict.fromkeys(("optimizer", "lr", "eps", "queries", "schedule", "epochs", "batch_size", "loss"))
        seed = config.seed if draws_at_random(config) else 0
        return {**nothing, "optimizer_options": {}, "seed": seed, "hybrid_epochs": 0}
    require("optimizer", config.optimizer, config.optimizer is not None, f"a name: method {config.method!r} trains")
    info = optimizers.get(str(config.optimizer))
    _check_pair(config, method, info, loss)
    return {"loss": loss, **_optimizer_keys(config, info)}


def check_tasks(config: TrialConfig, counts: Sequence[int]) -> None:
    """Refuse tasks that the method cannot learn, and mini-batches in which a loss without a head finds classes with a single example.

    Args:
        config: the cell, in normal form.
        counts: classes of every task.

    Raises:
        ConfigError: what is in the way, or how large they must be.
    """
    method = methods.get(config.method)
    run = counts[: config.stop_after]
    if (why := method.build.stream_refusal(run, method.parse(dict(config.method_options)))) is not None:
        raise ConfigError(f"method {config.method!r}: {why}")
    if config.loss is None or not criteria[config.loss].headless:
        return
    trained = counts[:1] if method.build.first_task_only else run
    for task in sorted(range(len(trained)), key=lambda task: -trained[task]):
        _check_batch(config.at(task), trained[task])
    if min(trained) < 2:
        raise ConfigError(f"loss={config.loss!r}: expected tasks of at least two classes, to tell one from the other")


def _check_batch(config: TrialConfig, classes: int) -> None:
    if (config.batch_size or 0) < 2 * classes:
        raise ConfigError(
            f"batch_size={config.batch_size!r}: loss={config.loss!r} classifies the examples of a mini-batch by each other; "
            f"expected at least {2 * classes}, two of each of {classes} classes"
        )


def why_uncut(config: TrialConfig, shards: int) -> str | None:
    """Why a mini-batch cannot be cut into so many slices; None: it can."""
    if shards == 1 or config.loss is None or not criteria[config.loss].headless:
        return None
    return (
        f"data_shards={shards}: loss={config.loss!r} compares the examples of a mini-batch, which therefore cannot be cut; "
        "expected 1 (workers may still share the queries)"
    )


def _check_probe(config: TrialConfig, method: MethodInfo) -> None:
    every = config.probe_every
    require("probe_every", every, every is None or is_positive(every), "an integer >= 1")
    if every and not method.build.one_head:
        able = [name for name, info in methods.items() if info.build.one_head]
        raise ConfigError(
            f"probe_every={every}: method {config.method!r} has no loss of old tasks while it trains; expected one of "
            + ", ".join(able)
        )


def _check_pair(config: TrialConfig, method: MethodInfo, info: OptimizerInfo, loss: str | None) -> None:
    """Refuse an optimizer or a loss that does not go with the method or the way to its backbone."""
    method_options = method.parse(dict(config.method_options))
    if (reason := method.build.refusal(info, method_options)) is not None:
        raise ConfigError(f"method {config.method!r} cannot be trained with optimizer {info.name!r}: {reason}")
    if loss and not method.build.any_loss:
        raise ConfigError(f"loss={loss!r}: method {config.method!r} has a loss of its own; leave loss out")
    if loss and criteria[loss].headless:
        _check_headless(config, method, method_options, info.estimator.per_example)
    differentiates = f"optimizer {info.name!r}" if info.estimator.differentiates else None
    if config.hybrid_epochs or config.optimizer_options.get("hybrid"):
        differentiates = differentiates or "a hybrid run, in its first steps,"
    check_access(config, method, differentiates, info.estimator.per_example)


def _check_headless(config: TrialConfig, method: MethodInfo, method_options: Any, per_example: bool) -> None:
    """Refuse what needs a head, or examples that do not meet."""
    build, where = method.build, f"loss={config.loss!r} with method {config.method!r}"
    if build.needs_head:
        raise ConfigError(f"{where}: the loss needs no head, but {build.needs_head}; leave loss out")
    if config.probe_every:
        raise ConfigError(
            f"probe_every={config.probe_every}: it looks at a head's loss, and loss={config.loss!r} trains none"
        )
    if build.tunes(method_options) == "none":
        raise ConfigError(f"{where}: the loss needs no head, and there is nothing else to train")
    if per_example:
        raise ConfigError(
            f"{where}: optimizer {config.optimizer!r} moves every example of a mini-batch on its own, and the loss compares "
            "them with each other"
        )


def _optimizer_keys(config: TrialConfig, info: OptimizerInfo) -> dict[str, Any]:
    """The optimizer's settings, and how long it trains."""
    require("epochs", config.epochs, is_positive(config.epochs), "an integer >= 1")
    require("batch_size", config.batch_size, is_positive(config.batch_size), "an integer >= 1")
    require("schedule", config.schedule, config.schedule in SCHEDULES, " or ".join(SCHEDULES))
    lr = info.default_lr if config.lr is None else config.lr
    require("lr", lr, is_number(lr) and lr > 0, "a number > 0")
    _check_range(config.dtype, "lr", lr)
    eps = info.default_eps if config.eps is None else config.eps
    queries = info.default_queries if config.queries is None else config.queries
    hybrid = config.hybrid_epochs
    if hybrid and config.optimizer_options.get("hybrid"):
        steps = config.optimizer_options["hybrid"]
        raise ConfigError(
            f"hybrid_epochs={hybrid!r}: optimizer_options.hybrid={steps!r} says it in steps; expected one of them"
        )
    settings = {**config.optimizer_options, **({"hybrid": hybrid} if hybrid else {})}  # steps are known with the data
    check_settings(info, lr=lr, queries=queries, eps=eps, seed=config.seed, options=settings)
    _check_range(config.dtype, "eps", eps)
    for key, value in config.optimizer_options.items():
        if is_number(value) and value:
            _check_range(config.dtype, f"optimizer_options.{key}", abs(value))
    require(
        "hybrid_epochs",
        hybrid,
        is_natural(hybrid) and hybrid <= int(config.epochs or 0),
        f"an integer from 0 to epochs={config.epochs}",
    )
    options = changed(config.optimizer_options, _optimizer_defaults(info.name))
    if info.estimator.exact:  # every step is exact: an axis over optimizers may name both
        hybrid, options = 0, {key: value for key, value in options.items() if key not in ("hybrid", "hybrid_lr")}
    return {
        "hybrid_epochs": hybrid,
        "lr": float(lr),
        "queries": queries if info.estimator.uses_queries else None,
        "eps": float(eps) if info.estimator.uses_eps else None,
        "optimizer_options": options,
    }


def _check_range(dtype: str, key: str, value: float) -> None:
    """Refuse a number that is 0 or infinite in the type of all computation."""
    held = torch.finfo(getattr(torch, dtype))
    right = held.tiny <= value <= held.max
    require(key, value, right, f"a number that {dtype} holds, from {held.tiny:.2g} to {held.max:.2g}")


@functools.cache
def _optimizer_defaults(name: str) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], plain(optimizers.get(name).options))
