"""Named optimizers: each a composition of the three steps, found by name, added by one registration."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from zeroflow.errors import ConfigError
from zeroflow.optim.directions import Direction, identity, sign
from zeroflow.optim.estimators import SPSA, Backpropagation, Estimator, ForwardGradient
from zeroflow.optim.objective import Executor
from zeroflow.optim.optimizer import Composition, Parameters, ThreeStepOptimizer
from zeroflow.optim.updates import Conserve, Plain, Update
from zeroflow.registry import Registry


@dataclass(frozen=True)
class OptimizerInfo:
    """A named optimizer.

    Attributes:
        name: as users write it. description: one line.
        estimator, direction, update: the three steps. rule: the ``torch.optim`` class of step 3.
        options: option names that users may give, with their defaults.
        default_lr: learning rate where a trial names none: tuned for the embedded benchmark, a start for others.
    """

    name: str
    description: str
    estimator: Estimator
    rule: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any]
    default_lr: float
    direction: Direction = identity
    update: Update = field(default_factory=Plain)

    def forwards(self, queries: int) -> int:
        """Forward passes per step as a function of q."""
        return self.estimator.forwards(queries) + self.update.forwards()

    def compose(self, lr: float, options: Mapping[str, Any]) -> Composition:
        settings = {**self.options, **options}
        rule = self.rule

        def inner(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return rule(groups, lr=lr, **settings)

        return Composition(self.estimator, self.direction, inner, self.update)


optimizers: Registry[OptimizerInfo] = Registry("optimizer")

SGD_OPTIONS: Mapping[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
ADAM_OPTIONS: Mapping[str, Any] = {"betas": (0.9, 0.999), "eps_adam": 1e-8, "weight_decay": 0.0}


class _Adam(torch.optim.Adam):
    """Adam whose own epsilon is called ``eps_adam`` in options: ``eps`` is the perturbation size everywhere here."""

    def __init__(self, params: Any, *, eps_adam: float = 1e-8, **options: Any) -> None:
        super().__init__(params, eps=eps_adam, **options)


def register_optimizer(info: OptimizerInfo) -> OptimizerInfo:
    """Make an optimizer known by its name; outside packages call this from a ``zeroflow.optimizers`` entry point."""
    return optimizers.register(info.name, info)


def list_optimizers(pattern: str = "*") -> list[str]:
    """Names that match a shell-style pattern, e.g. ``"zo-*"``."""
    return optimizers.names(pattern)


def create_optimizer(
    name: str,
    params: Parameters,
    *,
    lr: float,
    queries: int = 1,
    eps: float = 1e-3,
    seed: int = 0,
    executor: Executor | None = None,
    **options: Any,
) -> ThreeStepOptimizer:
    """Build a named optimizer.

    Args:
        name: one of ``list_optimizers()``.
        params: a module, parameters, named parameters, or parameter groups.
        lr: learning rate. queries: directions per step, q >= 1. eps: perturbation size, > 0.
        seed: key of all directions, >= 0. executor: where evaluations run (default: here).
        **options: of the named optimizer, e.g. ``momentum`` or ``weight_decay``.

    Returns:
        An optimizer with ``loss = optimizer.step(closure)``.

    Raises:
        ConfigError: unknown name or option, or a number out of range; it names the argument and the nearest right one.
    """
    info = optimizers.get(name)
    check_settings(info, lr=lr, queries=queries, eps=eps, seed=seed, options=options)
    return ThreeStepOptimizer(params, info.compose(lr, options), queries=queries, eps=eps, seed=seed, executor=executor)


def check_settings(
    info: OptimizerInfo, *, lr: float, queries: int, eps: float, seed: int, options: Mapping[str, Any]
) -> None:
    """Refuse settings that cannot work, before any work is done."""
    for key, value, right in (
        ("lr", lr, isinstance(lr, int | float) and lr >= 0),
        ("eps", eps, isinstance(eps, int | float) and eps > 0),
        ("queries", queries, isinstance(queries, int) and queries >= 1),
        ("seed", seed, isinstance(seed, int) and 0 <= seed < 2**64),
    ):
        if not right or isinstance(value, bool):
            expected = {"lr": "a number >= 0", "eps": "a number > 0", "queries": "an integer >= 1"}.get(
                key, "an integer from 0 to 2^64 - 1"
            )
            raise ConfigError(f"{key}={value!r} for optimizer {info.name!r}: expected {expected}")
    for key in options:
        if key not in info.options:
            nearest = difflib.get_close_matches(key, info.options, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(sorted(info.options))}"
            raise ConfigError(f"unknown option {key!r} for optimizer {info.name!r}; {hint}")
    try:
        info.compose(lr, options).inner([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"options {dict(options)} for optimizer {info.name!r}: {error}") from None


_SPSA, _SPSA_LABEL = SPSA(), "the two-sided SPSA estimate"
_GRADIENT_LABEL = "the gradient by backpropagation (the first-order reference)"

for _info in (
    OptimizerInfo("fo-sgd", f"SGD on {_GRADIENT_LABEL}", Backpropagation(), torch.optim.SGD, SGD_OPTIONS, 0.1),
    OptimizerInfo("fo-adam", f"Adam on {_GRADIENT_LABEL}", Backpropagation(), _Adam, ADAM_OPTIONS, 1e-4),
    OptimizerInfo("zo-sgd", f"SGD on {_SPSA_LABEL}", _SPSA, torch.optim.SGD, SGD_OPTIONS, 3e-3),
    OptimizerInfo(
        "zo-sgd-sign", f"SGD on the elementwise sign of {_SPSA_LABEL}", _SPSA, torch.optim.SGD, SGD_OPTIONS, 1e-4,
        direction=sign,
    ),
    OptimizerInfo(
        "zo-sgd-conserve", f"SGD on {_SPSA_LABEL}, keeping the best of theta and theta -+ step", _SPSA, torch.optim.SGD,
        SGD_OPTIONS, 1e-3, update=Conserve(),
    ),
    OptimizerInfo("zo-adam", f"Adam on {_SPSA_LABEL}", _SPSA, _Adam, ADAM_OPTIONS, 1e-3),
    OptimizerInfo(
        "zo-adam-sign", f"Adam on the elementwise sign of {_SPSA_LABEL}", _SPSA, _Adam, ADAM_OPTIONS, 1e-4,
        direction=sign,
    ),
    OptimizerInfo(
        "zo-adam-conserve", f"Adam on {_SPSA_LABEL}, keeping the best of theta and theta -+ step", _SPSA, _Adam,
        ADAM_OPTIONS, 1e-4, update=Conserve(),
    ),
    OptimizerInfo(
        "forward-grad", "SGD on forward-mode directional derivatives, no eps", ForwardGradient(), torch.optim.SGD,
        SGD_OPTIONS, 1e-3,
    ),
):  # fmt: skip
    register_optimizer(_info)
