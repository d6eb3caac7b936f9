"""Named optimizers: each is a composition of the three steps, registered under a name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, overload

import torch
from torch import nn

from zeroflow.errors import ConfigError
from zeroflow.optim.composition import Composition
from zeroflow.optim.cost import Cost
from zeroflow.optim.directions import Direction, DirectionHistory, History, Identity
from zeroflow.optim.estimators import Estimator
from zeroflow.optim.executor import Executor
from zeroflow.optim.groups import Parameters
from zeroflow.optim.optimizer import ThreeStepOptimizer
from zeroflow.optim.updates import Plain, Update
from zeroflow.options import finite
from zeroflow.registry import Registry

Piece = TypeVar("Piece")

ENHANCEMENTS: Mapping[str, Any] = {
    "history": 0.0, "history_of": "estimates", "sparsity": 0.0, "hybrid": 0, "hybrid_lr": None, "max_skipped": 10,
    "check_precision": True,
}  # fmt: skip
"""Options of every optimizer.

history: share a of earlier estimates mixed into each. history_of: what is mixed, the estimates, or only their directions with
the slopes of this step (``"directions"``, as in the authors' package). sparsity: share of the components that a random mask
freezes. hybrid: number of initial steps with the exact gradient; hybrid_lr: their learning rate, where lr is that of the other
steps (groups and schedules keep their ratios; default: the same). max_skipped: number of consecutive steps that may lack a
finite loss. check_precision: refuse an eps below the rounding of half precision, tell of
parameters that swallow it.
"""


@dataclass(frozen=True)
class OptimizerInfo:
    """A named optimizer.

    Attributes:
        name: as users write it.
        description: one line.
        estimator: step 1; its dataclass fields are options too.
        direction: step 2; its dataclass fields are options too.
        update: step 3; its dataclass fields are options too.
        rule: ``rule(groups, lr=..., **options)`` makes the ``torch.optim`` optimizer of step 3: a class of torch's or
            timm's, or any callable.
        rule_options: which of its options users may give, with their defaults.
        default_lr: learning rate where a trial gives none: tuned for the embedded benchmark, a starting point for others.
        default_eps: perturbation size where none is given.
        default_queries: number of queries where none is given and the estimator derives none from the parameters.
    """

    name: str
    description: str
    estimator: Estimator
    rule: Callable[..., torch.optim.Optimizer]
    rule_options: Mapping[str, Any]
    default_lr: float
    direction: Direction = field(default_factory=Identity)
    update: Update = field(default_factory=Plain)
    default_eps: float = 1e-3
    default_queries: int = 1

    @functools.cached_property
    def options(self) -> Mapping[str, Any]:
        """All options with their defaults."""
        pieces = {k: v for piece in (self.estimator, self.direction, self.update) for k, v in _fields(piece).items()}
        return {**self.rule_options, **pieces, **ENHANCEMENTS}

    @property
    def cost(self) -> Cost:
        """Forward passes of a step, as a formula in q."""
        return self.estimator.cost + self.direction.cost + self.update.cost

    def forwards(self, queries: int) -> int:
        """Forward passes per step as a function of q."""
        return self.cost(queries)

    def equivalents(self, queries: int) -> int:
        """Work per step in units of forward passes as a function of q; see ``Estimator.equivalents``."""
        return self.forwards(queries) - self.estimator.cost(queries) + self.estimator.equivalents(queries)

    def snapshot_forwards(self, queries: int, steps: int, batches: int, options: Mapping[str, Any]) -> int:
        """Forward passes besides those of ``forwards``, of all snapshots of so many steps; see ``Direction``."""
        return _with(self.direction, {**self.options, **options}).snapshot_forwards(queries, steps, batches)

    def compose(self, lr: float, options: Mapping[str, Any]) -> Composition:
        """The three steps with these options.

        Raises:
            ValueError: an option out of range.
        """
        chosen = {**self.options, **options}
        for name, default in self.options.items():
            if isinstance(default, tuple):  # torch wants floats, as in betas=(0.0, 0.9)
                chosen[name] = tuple(map(float, chosen[name]))
        for name in ("sparsity", "history"):
            if not 0 <= chosen[name] < 1:
                raise ValueError(f"{name}={chosen[name]!r}: expected a share in [0, 1)")
        for name in ("hybrid", "max_skipped"):
            if chosen[name] < 0:
                raise ValueError(f"{name}={chosen[name]!r}: expected an integer >= 0")
        hybrid_lr = chosen["hybrid_lr"]
        if hybrid_lr is not None and not (chosen["hybrid"] and lr and _is_number(hybrid_lr) and hybrid_lr > 0):
            raise ValueError(f"hybrid_lr={hybrid_lr!r}: expected a number > 0, together with hybrid and lr > 0")
        inner = functools.partial(self.rule, lr=lr, **{name: chosen[name] for name in self.rule_options})
        return Composition(
            _with(self.estimator, chosen),
            self._directions(chosen),
            inner,
            _with(self.update, chosen),
            sparsity=float(chosen["sparsity"]),
            first_order_steps=chosen["hybrid"],
            first_order_lr=1.0 if hybrid_lr is None else hybrid_lr / lr,
            max_skipped=chosen["max_skipped"],
            check_precision=chosen["check_precision"],
        )

    def _directions(self, chosen: Mapping[str, Any]) -> list[Direction]:
        """The optimizer's own direction and the history, in order."""
        direction, share, of = _with(self.direction, chosen), float(chosen["history"]), chosen["history_of"]
        for name, value in (("sign", "scalar"), ("history_of", "directions")):  # both take means of the queries
            if chosen.get(name) == value and chosen.get("combine", "mean") != "mean":
                raise ValueError(f"combine={chosen['combine']!r}: expected 'mean' with {name}={value!r}")
        if of not in ("estimates", "directions"):
            raise ValueError(f"history_of={of!r}: expected 'estimates' or 'directions'")
        if of == "directions":
            if not share:
                raise ValueError("history_of='directions': expected together with history > 0")
            if chosen.get("sign") == "scalar":
                return [DirectionHistory(share, signs=True)]
            if direction.before_history:
                raise ValueError(
                    f"history_of='directions': {self.name} needs the estimate itself, expected 'estimates'"
                )
            return [DirectionHistory(share), direction]
        history = [History(share)] if share else []
        return [direction, *history] if direction.before_history else [*history, direction]


optimizers: Registry[OptimizerInfo] = Registry("optimizer")


def register_optimizer(info: OptimizerInfo) -> OptimizerInfo:
    """Register an optimizer; outside packages call this from a ``zeroflow.optimizers`` entry point.

    Raises:
        ConfigError: its name does not say whether it follows exact gradients, which results tell their readers by it.
    """
    if info.name.startswith("fo-") != info.estimator.exact:
        raise ConfigError(
            f"optimizer {info.name!r}: the name of one with exact gradients begins with 'fo-', that of any other does not; "
            f"{type(info.estimator).__name__} is {'exact' if info.estimator.exact else 'not exact'}"
        )
    return optimizers.register(info.name, info)


@overload
def list_optimizers(pattern: str = "*", *, details: Literal[False] = False) -> list[str]: ...
@overload
def list_optimizers(pattern: str = "*", *, details: Literal[True]) -> list[OptimizerInfo]: ...
def list_optimizers(pattern: str = "*", *, details: bool = False) -> list[str] | list[OptimizerInfo]:
    """Names that match a shell-style pattern, e.g. ``"zo-*"``.

    Args:
        pattern: shell-style.
        details: return ``OptimizerInfo`` (``description``, ``cost``, ``forwards(q)``, ``options``) instead of names.
    """
    names = optimizers.names(pattern)
    return [optimizers.get(name) for name in names] if details else names


def create_optimizer(
    name: str,
    params: Parameters,
    *,
    lr: float | None = None,
    queries: int | None = None,
    eps: float | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    module: nn.Module | None = None,
    **options: Any,
) -> ThreeStepOptimizer:
    """Build a named optimizer.

    Args:
        name: one of ``list_optimizers()``.
        params: a module, parameters, named parameters, or parameter groups. Prefer the module, or give it as ``module``: its
            buffers (batch norm) are then updated once per step instead of once per evaluation.
        lr: learning rate; None: the registered default, with a warning, since it was chosen on another model. ``tune``
            chooses one for a model and a loss.
        queries: directions per step, q >= 1 (default 1; 8 for zo-fzoo, 16 for zo-muon; 4 + floor(3 ln d) for es-cma,
            its population, which is at least 2). Those without queries (fo-*, zo-cars) ignore it.
        eps: perturbation size, > 0 (default 1e-3; .5 for zo-cars, 1e-4 for zo-fzoo, .1 for es-cma, the first step
            size). Those without perturbation (fo-*, forward-grad) ignore it.
        seed: key of all directions, >= 0.
        executor: runs the evaluations; default: this process.
        module: that the parameters belong to, for its buffers, where ``params`` are groups or a part of it.
        **options: of the named optimizer, e.g. ``momentum`` or ``weight_decay``; options of all: see ``ENHANCEMENTS``.

    Returns:
        An optimizer with ``loss = optimizer.step(closure)``.

    Raises:
        ConfigError: a name or option is unknown, or a number is out of range; the message names the argument and the nearest
            valid one. es-cma: there are too many parameters for a full covariance matrix.
        ImportError: es-cma without the package ``cmaes``.
        ValueError: parameters that cannot be trained.
        TypeError: something that is not a floating-point parameter.
    """
    info = optimizers.get(name)
    named = info.default_queries if queries is None else queries
    eps = info.default_eps if eps is None else eps
    if lr is None:
        lr = info.default_lr
        if not info.estimator.scales_itself:
            warnings.warn(
                f"{name}: lr={lr:g}, the default, which was chosen on the embedded benchmark; zeroflow.optim.tune chooses lr and "
                "eps for your model and loss",
                stacklevel=2,
            )
    check_settings(info, lr=lr, queries=named, eps=eps, seed=seed, options=options)
    composition = info.compose(lr, options)
    made = ThreeStepOptimizer(params, composition, queries=named, eps=eps, seed=seed, executor=executor, module=module)
    if queries is None:
        made.queries = info.estimator.usual_queries(made.flat.size) or named
    return made


def check_settings(
    info: OptimizerInfo, *, lr: float, queries: int, eps: float, seed: int, options: Mapping[str, Any]
) -> None:
    """Refuse settings that cannot work, before any work is done."""
    least = info.estimator.least_queries
    for key, value, right, expected in (
        ("lr", lr, _is_number(lr) and lr >= 0, "a number >= 0"),
        ("eps", eps, _is_number(eps) and eps > 0, "a number > 0"),
        (
            "queries",
            queries,
            isinstance(queries, Integral) and least <= queries <= MOST_QUERIES,
            f"an integer from {least} to {MOST_QUERIES:,}",
        ),
        ("seed", seed, isinstance(seed, Integral) and 0 <= seed < 2**64, "an integer from 0 to 2^64 - 1"),
    ):
        if not right or isinstance(value, bool):
            raise ConfigError(f"{key}={value!r} for optimizer {info.name!r}: expected {expected}")
    known = info.options
    for key, value in options.items():
        if key not in known:
            nearest = _MEANT.get(key) or next(iter(difflib.get_close_matches(key, [*known, *_ARGUMENTS], n=1)), None)
            hint = f"did you mean {nearest!r}?" if nearest else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown option {key!r} for optimizer {info.name!r}; {hint}")
        expected = _expected(known[key])
        if expected and not _fits(value, known[key]):
            raise ConfigError(f"{key}={value!r} for optimizer {info.name!r}: expected {expected}")
    try:
        composition = info.compose(lr, options) if options else None
        if composition and options.keys() & info.rule_options.keys():
            _try(composition.inner)
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"options {dict(options)} for optimizer {info.name!r}: {error}") from None


def _try(inner: Any) -> None:
    """Build a rule on one value, which checks its options.

    The first group that ``torch.optim`` adds has it import torch's compiler, for three seconds of a processor; checks need none.
    """
    rule = inner.func
    if isinstance(rule, type):
        rule = type(rule.__name__, (rule,), {"add_param_group": _append})
    rule([torch.nn.Parameter(torch.zeros(1))], **inner.keywords)


def _append(rule: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    rule.param_groups.append({**rule.defaults, **group})


MOST_QUERIES = 1_000_000
"""More directions a step than any use of them needs; beyond that their losses alone fill the memory."""
_ARGUMENTS = ("lr", "queries", "eps", "seed")
_MEANT = {"q": "queries", "eps_zo": "eps", "mu": "eps", "epsilon": "eps", "learning_rate": "lr"}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and finite(value)


def _expected(default: Any) -> str:
    """The expected kind of value, from the type of the default."""
    if isinstance(default, bool):
        return "True or False"
    if isinstance(default, tuple):
        return f"{len(default)} numbers"
    return {float: "a number", int: "an integer", str: "a string"}.get(type(default), "")


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and len(value) == len(default) and all(map(_is_number, value))
    if isinstance(default, float):
        return _is_number(value)
    return isinstance(value, type(default)) and not isinstance(value, bool)


def _fields(piece: Any) -> dict[str, Any]:
    return (
        {f.name: getattr(piece, f.name) for f in dataclasses.fields(piece)} if dataclasses.is_dataclass(piece) else {}
    )


def _with(piece: Piece, chosen: Mapping[str, Any]) -> Piece:
    """A copy of one step of a composition with its own options."""
    changes = {name: chosen[name] for name in _fields(piece)}
    return dataclasses.replace(piece, **changes) if changes else piece  # type: ignore[type-var]
