"""The three steps in one ``torch.optim.Optimizer``: estimate, direction, update (ZeroFlow, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.optim.directions import Direction
from zeroflow.optim.estimators import Estimator
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.objective import Closure, Executor, LocalExecutor, Objective
from zeroflow.optim.updates import Update

Parameters = nn.Module | Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]] | Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Composition:
    """A named method: how it estimates, which direction it takes, and how it updates.

    Attributes:
        estimator: step 1. direction: step 2.
        inner: ``inner(param_groups) -> torch.optim.Optimizer``, the rule of step 3. update: how the rule is applied.
    """

    estimator: Estimator
    direction: Direction
    inner: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    update: Update


class ThreeStepOptimizer(torch.optim.Optimizer):
    """A ``torch.optim`` optimizer whose ``step(closure)`` asks for function values (or slopes, or the gradient).

    Parameter groups may have their own ``lr``, ``eps_zo`` and whatever the inner rule knows; LR schedulers, ``state_dict``
    and ``add_param_group`` work as with any other. Parameters become views of one flat vector.

    Args:
        params: a module (its parameters that require gradients), parameters, named parameters, or groups of them.
        composition: the three steps.
        queries: directions per step, q.
        eps: default perturbation size of a group; the key in a group is ``"eps_zo"`` since Adam's own is ``"eps"``.
        seed: key of all directions and of dropout during evaluations.
        executor: where evaluations run; one process by default.
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
        self.steps = self.forwards = 0
        self.inner = composition.inner(groups)
        super().__init__(self.inner.param_groups, {**self.inner.defaults, "eps_zo": eps})
        self._share()
        self._lay_out()

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: returns the loss at the current parameters, a tensor or a number, and never calls backward. It is
                evaluated several times and must look at the same mini-batch each time.

        Returns:
            The loss (mean over the evaluations at theta +- eps z), float64, 0-dimensional.

        Raises:
            NonFiniteLoss: an evaluation gave NaN or infinity; the parameters are as before.
            TypeError: the loss is not a scalar, or carries a graph it should not carry.
        """
        self.flat.refresh()
        objective = Objective(self.flat, closure, self._eps(), self.seed, self.steps, self.executor)
        loss, estimate = self.composition.estimator.estimate(objective, self.queries)
        with torch.no_grad():
            self.composition.update(self.inner, self.flat, self.composition.direction(estimate), objective)
        self.steps += 1
        self.forwards += objective.forwards
        return torch.tensor(loss, dtype=torch.float64)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "flat"):
            self._lay_out()

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the counters that key the randomness: resuming continues bit for bit."""
        return {**super().state_dict(), "zeroflow": {"steps": self.steps, "forwards": self.forwards, "seed": self.seed}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        counters = state_dict["zeroflow"]
        self.steps, self.forwards, self.seed = counters["steps"], counters["forwards"], counters["seed"]
        self._share()

    def _share(self) -> None:
        # One set of groups and moments: a scheduler that edits ours edits the inner rule's.
        self.inner.param_groups, self.inner.state = self.param_groups, self.state

    def _lay_out(self) -> None:
        # Named parameters are laid out by name, so that the order they were registered in does not change the noise.
        named: list[tuple[str, nn.Parameter]] = []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"\0{number:04d}.{i:06d}" for i in range(len(group["params"]))]
            named += zip(names, group["params"], strict=True)
        self.flat = FlatParameters([parameter for _, parameter in sorted(named, key=lambda pair: pair[0])])

    def _eps(self) -> float | Tensor:
        sizes = {float(group["eps_zo"]) for group in self.param_groups}
        if len(sizes) == 1:
            return sizes.pop()
        of = {parameter: float(group["eps_zo"]) for group in self.param_groups for parameter in group["params"]}
        eps = torch.empty_like(self.flat.live)
        for parameter, place in self.flat.slices():
            eps[place] = of[parameter]
        return eps


def _groups(params: Parameters) -> list[dict[str, Any]]:
    """Bring every accepted form of ``params`` into torch's groups, named where names are known."""
    if isinstance(params, nn.Module):
        params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
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
    return groups
