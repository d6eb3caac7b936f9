"""What a conformance check is told about an optimizer, and how one that deviates is reported."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from zeroflow.optim.directions import SVRG, Identity
from zeroflow.optim.estimators import CGE, CMAES, RGE, SCD, SPSA, Backpropagation, ForwardGradient, PerExample
from zeroflow.optim.factory import create_optimizer, optimizers
from zeroflow.optim.names import SGD, Adam
from zeroflow.optim.updates import AdaMM, Conserve, KeepBest, Plain, RAdaZO

Function = Callable[[np.ndarray], float]
Reference = Callable[[Function, Callable[[np.ndarray], np.ndarray], np.ndarray, int, int], np.ndarray]


class ConformanceError(AssertionError):
    """An optimizer does not do what it says. The message tells what was measured and what was expected."""


class Stepper(Protocol):
    """All that an optimizer must be: ``step(closure)`` evaluates the loss as often as it likes, then moves parameters.

    ``closure()`` returns the loss at the module's present parameters, a 0-dimensional tensor (``[N]``, one for each
    example, where ``Subject.per_example`` is true), and never calls backward. It reads the module that ``build`` was
    given, so perturbations must show there. ``state_dict()`` and ``load_state_dict(state)`` are optional.
    """

    def step(self, closure: Callable[[], Tensor], /) -> Any: ...


@dataclass(frozen=True)
class Subject:
    """An optimizer under test: how to build it, and what it claims.

    Attributes:
        build: ``build(model, seed)`` gives a ``Stepper`` that trains the module's parameters. Where its signature has
            parameters of these names, they are used: ``lr`` (0 must hold the parameters still), ``queries``, and
            ``executor`` (see ``zeroflow.optim.Executor``).
        name: for reports.
        lr, eps, queries: of ``build(model, seed)``: learning rate, perturbation size, directions of a step.
        unbiased: the mean first step is ``-lr`` times the gradient: a plain SGD rule on an unbiased estimate.
        along: the first step is a combination of the perturbations: an SGD rule, without weight decay.
        forward_only: no step takes a gradient by backpropagation.
        per_example: the closure should return one loss for each example.
        sparsity: share of the components that a random mask holds still.
        keeps_best: a step never makes the loss on its mini-batch larger.
        snapshot: SVRG on two-sided differences, with a snapshot at the first step and none at the next two.
        span: an estimate is the projection on the span of its directions instead of their mean.
        resumes: it has ``state_dict()`` and ``load_state_dict(state)``.
        kept: vectors as large as all parameters that it may keep from step to step (moments, history,
            snapshot, mask, a master copy); None: it keeps a matrix, and its memory is not that of a forward pass.
        population: a step holds the places of all its queries at once.
        reference: ``reference(loss, gradient, theta, seed, steps)`` gives the parameters after so many steps, in NumPy.
    """

    build: Callable[..., Stepper]
    name: str = "the optimizer"
    lr: float | None = None
    eps: float | None = None
    queries: int = 1
    unbiased: bool = False
    along: bool = False
    forward_only: bool = True
    per_example: bool = False
    sparsity: float = 0.0
    keeps_best: bool = False
    snapshot: bool = False
    span: bool = False
    resumes: bool = False
    kept: int | None = 0
    population: bool = False
    reference: Reference | None = None

    def takes(self, name: str) -> bool:
        """Whether ``build`` has a parameter of that name."""
        return name in inspect.signature(self.build).parameters


def subject(
    name: str,
    *,
    lr: float = 0.05,
    queries: int | None = None,
    eps: float | None = None,
    per_example: bool = False,
    reference: Reference | None = None,
    **options: Any,
) -> Subject:
    """An optimizer of ``list_optimizers()`` as a subject; what it claims follows from its three steps.

    Args:
        name: as ``create_optimizer`` knows it. lr, queries, eps, options: as there.
        per_example, reference: see ``Subject``.
    """
    info = optimizers.get(name)
    chosen = {**info.options, **options}
    usual_lr, usual_queries = lr, info.default_queries if queries is None else queries
    usual_eps = info.default_eps if eps is None else eps

    def build(
        model: Any, seed: int, *, lr: float = usual_lr, queries: int = usual_queries, executor: Any = None
    ) -> Any:
        return create_optimizer(
            name, model, lr=lr, queries=queries, eps=usual_eps, seed=seed, executor=executor, **options
        )

    def build_searching(model: Any, seed: int, *, queries: int = usual_queries, executor: Any = None) -> Any:
        return build(model, seed, queries=queries, executor=executor)  # moves to places it has seen, whatever lr is

    estimator, keeps_best = info.estimator, isinstance(info.update, Conserve | KeepBest)
    snapshot, coordinates = isinstance(info.direction, SVRG), isinstance(estimator, CGE)
    plain_rule = info.rule is SGD and not chosen.get("weight_decay")
    straight = isinstance(info.direction, Identity | SVRG)
    forward_only = not isinstance(estimator, Backpropagation) and not chosen["hybrid"]
    moments_of: dict[Any, int] = {SGD: int(bool(chosen.get("momentum"))), Adam: 2, AdaMM: 3, RAdaZO: 2}
    moments = moments_of.get(info.rule, 0)
    kept: int | None = 1 + moments + snapshot + bool(chosen["history"]) + bool(chosen["sparsity"])
    if isinstance(estimator, CMAES):  # a diagonal and two paths in float64 beside parameters in float32
        kept = kept + 3 * 2 if chosen["separable"] and kept else None
    return Subject(
        build_searching if isinstance(info.update, KeepBest) else build,
        name=" ".join([name, *(f"{key}={value}" for key, value in options.items()), *["[N]"] * per_example]),
        lr=usual_lr,
        eps=usual_eps,
        queries=usual_queries if estimator.uses_queries else 1,
        unbiased=plain_rule
        and straight
        and isinstance(info.update, Plain)
        and isinstance(estimator, SPSA | SCD | RGE | ForwardGradient | PerExample | Backpropagation)
        and (not coordinates or usual_queries >= 1000)
        and not chosen["sparsity"]
        and chosen["history_of"] == "estimates"
        and chosen.get("combine") != "span",
        along=plain_rule and (straight or chosen.get("sign") == "scalar") and forward_only and not per_example,
        forward_only=forward_only,
        per_example=per_example,
        sparsity=chosen["sparsity"],
        keeps_best=keeps_best and not chosen["hybrid"],
        snapshot=snapshot
        and plain_rule
        and not (moments or chosen["history"] or chosen["hybrid"])
        and chosen["snapshot_every"] > 2,
        span=chosen.get("combine") == "span",
        resumes=True,
        kept=kept,
        population=isinstance(estimator, CMAES),
        reference=reference,
    )
