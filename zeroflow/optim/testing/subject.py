"""The description of an optimizer for conformance checks, and the error of one that deviates."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zeroflow.optim.composition import Composition
from zeroflow.optim.factory import create_optimizer, optimizers

Function = Callable[[np.ndarray], float]
Reference = Callable[[Function, Callable[[np.ndarray], np.ndarray], np.ndarray, int, int], np.ndarray]


class ConformanceError(AssertionError):
    """An optimizer does not do what it claims. The message gives the measured and the expected value."""


class Stepper(Protocol):
    """The interface of an optimizer: ``step(closure)`` evaluates the loss any number of times, then moves parameters.

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
        lr: learning rate of ``build(model, seed)``.
        eps: perturbation size of ``build(model, seed)``.
        queries: directions of a step of ``build(model, seed)``.
        unbiased: the mean first step is ``-lr`` times the gradient: a plain SGD rule on an unbiased estimate.
        along: the first step is a combination of the perturbations: an SGD rule, without weight decay.
        forward_only: no step takes a gradient by backpropagation.
        per_example: the closure should return one loss for each example.
        sparsity: share of the components that a random mask freezes.
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
    """An optimizer of ``list_optimizers()`` as a subject; its claims follow from its three steps.

    Args:
        name: as ``create_optimizer`` knows it.
        lr: as in ``create_optimizer``.
        queries: as in ``create_optimizer``.
        eps: as in ``create_optimizer``.
        per_example: see ``Subject``.
        reference: see ``Subject``.
        **options: as in ``create_optimizer``.
    """
    info = optimizers.get(name)
    queries = info.default_queries if queries is None else queries
    eps = info.default_eps if eps is None else eps
    pieces = info.compose(lr, options)
    estimator, directions, update = pieces.estimator, pieces.directions, pieces.update
    moments, plain = _asked(pieces)
    forward_only = not (estimator.exact or pieces.first_order_steps)
    kept = 1 + moments + sum(direction.kept for direction in directions) + bool(pieces.sparsity)
    return Subject(
        _builder(name, lr, queries, eps, options, follows_lr=update.follows_lr),
        name=" ".join([name, *(f"{key}={value}" for key, value in options.items()), *["[N]"] * per_example]),
        lr=lr,
        eps=eps,
        queries=queries if estimator.uses_queries else 1,
        unbiased=plain
        and estimator.unbiased
        and all(direction.keeps_mean for direction in directions)
        and not (update.keeps_best or pieces.sparsity),
        along=plain and forward_only and not per_example and all(direction.keeps_span for direction in directions),
        forward_only=forward_only,
        per_example=per_example,
        sparsity=pieces.sparsity,
        keeps_best=update.keeps_best and not pieces.first_order_steps,
        snapshot=plain and forward_only and not moments and [d.snapshot_every > 2 for d in directions] == [True],
        span=estimator.combine == "span",
        resumes=True,
        kept=None if estimator.kept is None else kept + estimator.kept,
        population=estimator.population,
        reference=reference,
    )


def _builder(
    name: str, usual_lr: float, usual_queries: int, eps: float, options: dict[str, Any], *, follows_lr: bool
) -> Callable[..., Any]:
    """``Subject.build`` of a named optimizer; without a parameter ``lr`` where steps do not depend on it."""

    def build(
        model: Any, seed: int, *, lr: float = usual_lr, queries: int = usual_queries, executor: Any = None
    ) -> Any:
        return create_optimizer(name, model, lr=lr, queries=queries, eps=eps, seed=seed, executor=executor, **options)

    def build_searching(model: Any, seed: int, *, queries: int = usual_queries, executor: Any = None) -> Any:
        return build(model, seed, queries=queries, executor=executor)  # moves to candidates, whatever lr is

    return build if follows_lr else build_searching


def _asked(pieces: Composition) -> tuple[int, bool]:
    """Probe a rule's first step: how many vectors it keeps, and whether it is -lr times the gradient."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
    rule = pieces.inner([{"params": [parameter]}])
    before, parameter.grad = parameter.detach().clone(), torch.tensor([3.0, -2.0, 1.0])
    rule.step()
    kept = [value for value in rule.state[parameter].values() if torch.is_tensor(value) and value.shape == before.shape]
    plain = torch.allclose(parameter.detach(), before - rule.param_groups[0]["lr"] * parameter.grad, rtol=1e-6)
    return len(kept), plain
