"""The three steps in one ``torch.optim.Optimizer``: estimate, direction, update (ZeroFlow, Algorithm 1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.optim import noise
from zeroflow.optim.directions import Direction, Step
from zeroflow.optim.estimators import Backpropagation, Estimator
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.objective import Closure, Executor, LocalExecutor, NonFiniteLoss, Objective
from zeroflow.optim.precision import PrecisionWatch, check_eps
from zeroflow.optim.updates import Plain, Rule, Update

Parameters = nn.Module | Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]] | Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Composition:
    """A method: how it estimates, which direction it takes, and how it updates.

    Attributes:
        estimator: step 1. directions: step 2, one after the other.
        inner: ``inner(param_groups) -> torch.optim.Optimizer``, the rule of step 3. update: how the rule is applied.
        sparsity: share of the components that a seed-made mask holds still (ZeroFlow, Section 6): they are zero in the
            perturbation and in the update alike. The same ones in every step.
        first_order_steps: how many steps at the beginning take the exact gradient instead (ZeroFlow, Section 6, "hybrid").
        first_order_lr: multiple of the learning rate during those; moments start anew after them.
        max_skipped: how many steps in a row may be without any finite loss; one more raises ``NonFiniteLoss``.
    """

    estimator: Estimator
    directions: Sequence[Direction]
    inner: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    update: Update = field(default_factory=Plain)
    sparsity: float = 0.0
    first_order_steps: int = 0
    first_order_lr: float = 1.0
    max_skipped: int = 10


class ThreeStepOptimizer(torch.optim.Optimizer):
    """A ``torch.optim`` optimizer whose ``step(closure)`` asks for function values (or slopes, or the gradient).

    Parameter groups may have their own ``lr``, ``eps_zo`` and whatever the inner rule knows; LR schedulers, ``state_dict``,
    hooks and ``add_param_group`` work as with any other. float32 and float64 parameters become views of one flat vector;
    half-precision ones are rounded from a float32 master copy.

    Args:
        params: a module (its parameters that require gradients), parameters, named parameters, or groups of them. Given a
            module, buffers in training mode (batch norm) see each mini-batch once a step instead of once an evaluation.
        composition: the three steps.
        queries: directions per step, q.
        eps: default perturbation size of a group; the key in a group is ``"eps_zo"`` since Adam's own is ``"eps"``.
        seed: key of all directions and of dropout during evaluations.
        executor: where evaluations run; one process by default.

    Raises:
        ValueError, TypeError: parameters that cannot be trained. ConfigError: an eps too small for half-precision ones.
    """

    forwards: int
    """Forward passes made so far, over all processes."""

    def __init__(
        self,
        params: Parameters,
        composition: Composition,
        *,
        queries: int = 1,
        eps: float = 1e-3,
        seed: int = 0,
        executor: Executor | None = None,
    ) -> None:
        groups = _groups(params)
        self.composition, self.queries, self.seed = composition, queries, seed
        self.executor: Executor = executor or LocalExecutor()
        self.steps = self.forwards = self.skipped = 0
        self._module = params if isinstance(params, nn.Module) else None
        self._memory: dict[str, Any] = {}  # of the direction: part of the state
        self._transient: dict[str, Any] = {}  # of the estimator: saves work, never changes a result
        self._unwatched = composition.estimator.uses_eps
        # The inner rule tells which hyper-parameters groups have; its own parameters are the master copies.
        probe = composition.inner([{**group, "params": list(group["params"])} for group in groups])
        super().__init__(probe.param_groups, {**probe.defaults, "eps_zo": eps})
        self._lay_out()
        if self.flat.half is not None and composition.estimator.uses_eps:
            check_eps(min(float(group["eps_zo"]) for group in self.param_groups), self.flat.half)
        if self.checkpoint:
            _checkpoint(self._module)

    @property
    def checkpoint(self) -> bool:
        """Whether the model should recompute activations on the way back instead of storing them."""
        return isinstance(self.composition.estimator, Backpropagation) and self.composition.estimator.checkpoint

    @property
    def per_example(self) -> bool:
        """Whether ``closure`` may return one loss for each example, and should."""
        return self.composition.estimator.per_example

    def step(self, closure: Closure, full: Sequence[Closure] = ()) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: returns the loss at the current parameters, a tensor or a number, and never calls backward. It is
                evaluated several times and must look at the same mini-batch each time. Where ``per_example`` is true it
                should return one loss for each example, ``[N]``.
            full: closures of mini-batches that together are the whole training data; only ``zo-svrg`` asks them, when it
                takes a snapshot.

        Returns:
            The loss (mean over the finite evaluations near theta), float64, 0-dimensional; NaN where none was finite, and
            then nothing has moved.

        Raises:
            NonFiniteLoss: more than ``max_skipped`` steps in a row without a finite loss.
            TypeError: the loss is not a scalar, or carries a graph it should not carry.
            ConfigError: the loss is computed in half precision and eps is too small for that.
        """
        if not callable(closure):
            raise TypeError(
                "step: expected a closure that returns the loss, as in optimizer.step(lambda: loss(model(x), y))"
            )
        self.flat.refresh()
        method, first_order = self.composition, self.steps < self.composition.first_order_steps
        if self.steps == method.first_order_steps > 0:
            self._forget()
        estimator: Estimator = Backpropagation() if first_order else method.estimator
        objective = self._objective(closure)
        estimate = estimator.estimate(objective, self.queries)
        if estimate.usable:
            self.skipped = 0
            with torch.no_grad():
                self._hand_over(method.first_order_lr if first_order else 1.0)
                vector = estimate.vector()
                if objective.directions.mask is not None:
                    vector.mul_(objective.directions.mask)
                step = Step(objective, estimator, self.queries, estimate, self._memory, full)
                for direction in () if first_order else method.directions:
                    vector = direction(vector, step)
                update = Plain() if first_order else method.update
                update(Rule(self.inner, self.flat, objective.directions.mask), vector, step)
                self.flat.show()
                self._take_back()
        else:
            self.skipped += 1
        if not first_order and not isinstance(estimator, Backpropagation):
            objective.settle()
        self.steps += 1
        self.forwards += objective.forwards
        if self.skipped > method.max_skipped:
            raise NonFiniteLoss(
                f"no finite loss in {self.skipped} steps in a row (the last: {estimate.loss}); parameters are those of the "
                "last good step. Lower lr or eps, or check the data"
            )
        return torch.tensor(estimate.loss, dtype=torch.float64)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; moments of the parameters so far stay."""
        known = hasattr(self, "flat")
        super().add_param_group(_groups([param_group])[0] if known else param_group)
        if known:
            self._lay_out()

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the counters that key the randomness and what directions remember: resumes bit for bit."""
        own = {
            "steps": self.steps, "forwards": self.forwards, "skipped": self.skipped, "seed": self.seed,
            "memory": self._memory, "master": None if self.flat.half is None else self.flat.vector,
        }  # fmt: skip
        return {**super().state_dict(), "zeroflow": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch. For half-precision parameters the float32 master copy is part of it."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        own, device = state_dict["zeroflow"], self.flat.vector.device
        self.steps, self.forwards, self.seed = own["steps"], own["forwards"], own["seed"]
        self.skipped = own["skipped"]
        memory = copy.deepcopy(own["memory"])
        self._memory = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in memory.items()}
        if self.flat.half is not None:
            # torch has rounded the moments to the parameters' dtype.
            flat = [p for group in self.param_groups for p in group["params"]]
            for number, state in state_dict["state"].items():
                self.state[flat[number]] = copy.deepcopy(state)
            self.flat.vector.copy_(own["master"])
            self.flat.show()
        self._restore_moments()

    def _lay_out(self) -> None:
        # Named parameters are laid out by name, so that the order they were registered in does not change the noise.
        named: list[tuple[str, nn.Parameter]] = []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"\0{number:04d}.{i:06d}" for i in range(len(group["params"]))]
            named += zip(names, group["params"], strict=True)
        before: dict[nn.Parameter, nn.Parameter] = getattr(self, "_master", {})
        self.flat = FlatParameters([parameter for _, parameter in sorted(named, key=lambda pair: pair[0])])
        self._master = dict(zip(self.flat.parameters, self.flat.masters, strict=True))
        for parameter, master in before.items():  # more precise than a half-precision parameter
            self._master[parameter].data.copy_(master)
        self.inner = self.composition.inner(
            [{**group, "params": [self._master[p] for p in group["params"]]} for group in self._hyper()]
        )
        self._restore_moments()
        size, sparsity = self.flat.size, self.composition.sparsity
        self._mask = noise.mask(self.flat.vector, self.seed, sparsity) if sparsity else None
        if self._mask is not None and not self._mask.any():
            raise ValueError(f"sparsity={sparsity}: of {size} components none would be trained")

    def _hyper(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k != "param_names"} for group in self.param_groups]

    def _hand_over(self, lr_factor: float) -> None:
        """Give the inner rule the groups' hyper-parameters, as a user or a scheduler may have changed them."""
        for inner, group in zip(self.inner.param_groups, self._hyper(), strict=True):
            inner.update({k: v for k, v in group.items() if k != "params"})
            inner["lr"] = group["lr"] * lr_factor

    def _take_back(self) -> None:
        """Show here what the inner rule remembers: moments by parameter, and numbers that it keeps in its groups."""
        moments = self.inner.state
        self.state.clear()
        self.state.update({p: moments[master] for p, master in self._master.items() if master in moments})
        for inner, group in zip(self.inner.param_groups, self.param_groups, strict=True):
            group.update({k: v for k, v in inner.items() if k not in ("params", "lr")})

    def _restore_moments(self) -> None:
        self.inner.state.clear()
        self.inner.state.update({master: self.state[p] for p, master in self._master.items() if p in self.state})

    def _forget(self) -> None:
        self.inner.state.clear()
        self.state.clear()

    def _objective(self, closure: Closure) -> Objective:
        method = self.composition
        directions = noise.Directions(method.estimator.distribution, self.seed, self._mask, self.queries)
        watching: Callable[[], AbstractContextManager[object]] = self._first_look if self._unwatched else nullcontext
        return Objective(
            self.flat,
            closure,
            self._eps(),
            directions,
            self.steps,
            self.executor,
            self._buffers(),
            watching,
            self._transient,
        )

    @contextmanager
    def _first_look(self) -> Iterator[None]:
        """Around the first evaluation here: find out whether they are made in a precision that eps is too small for."""
        if not self._unwatched:
            yield
            return
        watch = PrecisionWatch()
        with watch:
            yield
        if watch.half is not None:
            check_eps(min(float(group["eps_zo"]) for group in self.param_groups), watch.half)
        self._unwatched = False

    def _buffers(self) -> list[Tensor]:
        if self._module is None:
            return []
        return [b for m in self._module.modules() if m.training for b in m.buffers(recurse=False)]

    def _eps(self) -> float | Tensor:
        sizes = {float(group["eps_zo"]) for group in self.param_groups}
        if len(sizes) == 1:
            return sizes.pop()
        of = {parameter: float(group["eps_zo"]) for group in self.param_groups for parameter in group["params"]}
        eps = torch.empty_like(self.flat.vector)
        for parameter, place in self.flat.slices():
            eps[place] = of[parameter]
        return eps


def _checkpoint(module: nn.Module | None) -> None:
    """Ask a model to recompute activations, by the name its library has for that."""
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
        if callable(method := getattr(module, name, None)):
            method()
            return


def _groups(params: Parameters) -> list[dict[str, Any]]:
    """Bring every accepted form of ``params`` into torch's groups, named where names are known."""
    if isinstance(params, nn.Module):
        params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
    if isinstance(params, Tensor):
        raise TypeError("params: expected a module, parameters or groups, got a single tensor; give [parameter]")
    items: list[Any] = list(params)
    if not items:
        raise ValueError("params: expected at least one parameter that requires a gradient, found none")
    groups = [dict(group) for group in (items if isinstance(items[0], dict) else [{"params": items}])]
    for group in groups:
        members = group["params"]
        group["params"] = [members] if isinstance(members, Tensor) else list(members)
        for item in group["params"]:
            name, parameter = item if isinstance(item, tuple) else ("", item)
            if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
                raise TypeError(f"params: expected floating-point parameters, found {name or type(parameter).__name__}")
            if not parameter.requires_grad:
                raise ValueError(f"params: {name or 'a parameter'} is frozen (requires_grad=False); leave it out")
        for key in ("lr", "eps_zo"):
            value = group.get(key)
            if value is not None and not (math.isfinite(value) and (value > 0 or (key == "lr" and value == 0))):
                raise ValueError(
                    f"params: {key}={value!r} of a group: expected a number {'>=' if key == 'lr' else '>'} 0"
                )
    return groups
