"""The three steps in one ``torch.optim.Optimizer``: estimate, direction, update (ZeroFlow, Algorithm 1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.optim import noise
from zeroflow.optim.asking import AskTell, ToldLosses
from zeroflow.optim.buffers import Buffers, Still, places_of
from zeroflow.optim.closure import Closure, several
from zeroflow.optim.composition import Composition
from zeroflow.optim.directions import Step
from zeroflow.optim.estimators import Backpropagation, Estimate, Estimator
from zeroflow.optim.evaluator import Evaluator
from zeroflow.optim.executor import Executor, LocalExecutor
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.groups import (
    BEGINNING,
    Parameters,
    check_processes,
    enable_checkpointing,
    parameter_groups,
    refuse_renormalised,
    trained_components,
    warn_of_untrained,
)
from zeroflow.optim.objective import Memory, NonFiniteLoss, Objective, Perturbation
from zeroflow.optim.precision import AskAgain, check_eps, rounding, watched
from zeroflow.optim.saving import OWN, Saving
from zeroflow.optim.surroundings import Surroundings, undisturbed
from zeroflow.optim.swallowed import Swallowed
from zeroflow.optim.symptoms import Symptoms
from zeroflow.optim.updates import Plain, Rule


class ThreeStepOptimizer(AskTell, Saving):
    """A ``torch.optim`` optimizer whose ``step(closure)`` uses function values (or slopes, or the gradient).

    Parameter groups may have their own ``lr``, ``eps_zo`` and hyper-parameters of the inner rule; LR schedulers, ``state_dict``,
    hooks and ``add_param_group`` work as usual. The master copy of all parameters is one flat vector of float32 (or float64),
    which is written into the model's own parameters.

    Args:
        params: a module (its parameters that require gradients), parameters, named parameters, or groups of them. Given
            a module, its buffers (batch norm's) see each mini-batch once a step instead of once an evaluation.
        composition: the three steps.
        queries: directions per step, q.
        eps: default perturbation size of a group. A group may have its own ``"eps"``; its key is then ``"eps_zo"``, since
            ``"eps"`` is Adam's.
        seed: key of all directions and of dropout during evaluations.
        executor: runs the evaluations; default: this process.
        module: the parameters' own, for its buffers, where ``params`` are not a module.

    Raises:
        ValueError: parameters that cannot be trained.
        TypeError: something that is not a floating-point parameter; ``DistributedDataParallel``.
        ConfigError: eps is too small for half-precision parameters.
    """

    inner: torch.optim.Optimizer
    """The rule of step 3, on the master copies."""
    forwards: int
    """Forward passes made so far, over all processes."""
    equivalents: int
    """Work done so far in forward passes, over all processes; see ``Estimator.equivalents``."""

    around: Surroundings
    """Torch modes of the caller of the current step."""

    @undisturbed
    def __init__(
        self,
        params: Parameters,
        composition: Composition,
        *,
        queries: int = 1,
        eps: float = 1e-3,
        seed: int = 0,
        executor: Executor | None = None,
        module: nn.Module | None = None,
    ) -> None:
        groups = parameter_groups(params)
        self.composition, self.queries, self.seed, self._given = composition, queries, seed, executor
        self.executor: Executor = executor or LocalExecutor()
        self._checked = check_processes(module or params, executor)  # again where processes come later
        self._told_untrained = False  # whether parameters of the module were seen that are not trained
        self._agreed = False  # whether processes that share the work were seen to be alike
        self.steps = self.forwards = self.equivalents = self.skipped = 0
        self._whole = params if isinstance(params, nn.Module) else None
        self._module = module if self._whole is None else self._whole
        refuse_renormalised(self._module)
        self._memory: dict[str, Any] = {}  # of the direction: part of the state
        self._adapted: dict[str, Any] = {}  # of the estimator: part of the state, in its own precision and place
        self._transient: dict[str, Any] = {}  # of the estimator: saves work, never changes a result
        self._still: Still = set()  # buffers known not to move
        self._told: ToldLosses | None = None
        self._candidates, self._asked_with = [], {}
        self._symptoms, self._rounding, self._swallowed = Symptoms(), 0.0, Swallowed(composition)
        self._half: torch.dtype | None = None  # precision in which losses were seen to be computed
        self._watched = not (composition.estimator.uses_eps and composition.check_precision)
        # The inner rule tells which hyper-parameters groups have; its own parameters are the master copies.
        probe = composition.inner([{**group, "params": list(group["params"])} for group in groups])
        composition.check_maximize(probe.param_groups, known="maximize" in probe.defaults)
        super().__init__(probe.param_groups, {**probe.defaults, "eps_zo": eps})
        self.param_groups[0][OWN] = b""
        self._lay_out()
        if self.checkpoint:
            enable_checkpointing(self._module)

    @property
    def checkpoint(self) -> bool:
        """Whether the model should recompute activations in the backward pass instead of storing them."""
        return self.composition.estimator.checkpoint

    def held(self) -> list[Tensor]:
        """Tensors kept from step to step besides the model's own: master copies, moments, history, covariance, mask, ..."""
        moments = [value for state in self.inner.state.values() for value in state.values()]
        kept = [self.flat.vector, self._mask, *self._memory.values(), *self._adapted.values(), *moments]
        return [value for value in kept if isinstance(value, Tensor)]

    @property
    def first_order(self) -> bool:
        """Whether the previous step used the exact gradient, as the first steps of a hybrid run do."""
        return self.composition.is_exact(self.steps - 1 if self.steps else self.composition.first_order_steps)

    @property
    def per_example(self) -> bool:
        """Whether ``closure`` may return one loss for each example, and should."""
        return self.composition.estimator.per_example

    @undisturbed
    def step(self, closure: Closure | None = None, full: Sequence[Closure] = ()) -> Tensor:  # type: ignore[override]
        """Make one step.

        Args:
            closure: returns the loss at the current parameters, a tensor or a number, and never calls backward. It is
                evaluated several times and must use the same mini-batch each time, unchanged: a model that works on its
                input in place needs a copy. Where ``per_example`` is true it
                should return one loss per example, ``[N]``. Where processes share the mini-batch, it must be a ``Slice``,
                or all processes must have equally large parts.
            full: closures of mini-batches that together are the whole training data; only ``zo-svrg`` evaluates them, when
                it takes a snapshot.

        Returns:
            The loss (mean over the finite evaluations near theta), float64, 0-dimensional; NaN where none was finite, in
            which case nothing has moved.

        Raises:
            NonFiniteLoss: more than ``max_skipped`` consecutive steps had no finite loss.
            TypeError: the loss is not a scalar, or has a graph where none is allowed.
            ConfigError: the loss is computed in half precision and eps is too small for that.
        """
        if closure is None and self._only_creates_state():
            return torch.tensor(math.nan, dtype=torch.float64)
        if not callable(closure):
            raise TypeError(
                "step: expected a closure that returns the loss, as in optimizer.step(lambda: loss(model(x), y))"
            )
        if self._told is not None and closure is not self._told:
            raise RuntimeError("step: an ask awaits its losses; call tell first")
        return self._make_step(closure, several(full))

    def _make_step(self, closure: Closure, full: Sequence[Closure] = ()) -> Tensor:
        self._adopt_changes()
        self._checked = self._checked or check_processes(self._module, self._given)
        if not self._agreed:
            settings = type(self.composition.estimator).__name__, self.seed, self.queries, self.steps
            self.executor.agree(repr(settings).encode() + self.flat.sample(), *BEGINNING)
            self._agreed = True
        method, first_order = self.composition, self.steps < self.composition.first_order_steps
        if self.steps in (0, method.first_order_steps) and self.inner.state:
            self.inner = self._rule()  # moments start anew
        estimator: Estimator = Backpropagation(self.checkpoint) if first_order else method.estimator
        mask = trained_components(self._module, self.flat, self._mask, exact=self.composition.is_exact(self.steps))
        objective = self._objective(closure, mask)
        estimate = estimator.estimate(objective, self.queries)
        objective.settle()
        if self.executor.rank == 0:
            self._check_symptoms(estimate)
        if estimate.usable:
            self.skipped = 0
            with torch.no_grad():
                self._push_settings(method.lr_factor(self.steps))
                vector = estimate.vector()
                if mask is not None:
                    vector.mul_(mask)
                step = Step(objective, estimator, self.queries, estimate, self._memory, full)
                for direction in () if first_order else method.directions:
                    vector = direction(vector, step)
                update = Plain() if first_order else method.update
                try:
                    update(Rule(self.inner, self.flat, mask, self._without_gradient(estimate)), vector, step)
                finally:  # what was tried before a closure failed has left no trace in the rule, and so none here
                    self.flat.show()
                    self._pull_state()
        else:
            self.skipped += 1
        objective.finish()
        self.steps += 1
        self.forwards += objective.forwards
        # Counted forward passes and not the formula's: a snapshot or a census takes more.
        self.equivalents += objective.forwards
        self.equivalents += estimator.equivalents(self.queries) - estimator.cost(self.queries)
        if self.skipped > method.max_skipped:
            raise NonFiniteLoss(
                f"no finite loss in {self.skipped} steps in a row (the last: {estimate.loss}); parameters are those of the "
                "last good step. Lower lr or eps, or check the data"
            )
        return torch.tensor(estimate.loss, dtype=torch.float64)

    @undisturbed
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Moments, history and mask of existing parameters are kept; a snapshot or a distribution is reset.

        Raises:
            ValueError: parameters that cannot be trained together with those so far; nothing is added then.
            TypeError: as of the constructor; nothing is added then.
        """
        if not hasattr(self, "flat"):
            super().add_param_group(param_group)
            return
        (group,) = parameter_groups([param_group])
        self.composition.check_maximize([group], known="maximize" in self.defaults)
        named, first = "param_names" in self.param_groups[0], isinstance(next(iter(group["params"]), None), tuple)
        if named and not first:
            number = len(self.param_groups)
            group["params"] = [(f"group{number}.{i}", p) for i, p in enumerate(group["params"])]
        elif first and not named:
            group["params"] = [p for _, p in group["params"]]
        if "eps_adam" in group and "eps_adam" not in self.defaults:
            group["eps"] = group.pop("eps_adam")  # torch's Adam calls it so
        FlatParameters([*self.flat.parameters, *(p[1] if isinstance(p, tuple) else p for p in group["params"])])
        super().add_param_group(group)
        self._lay_out()

    def _lay_out(self) -> None:
        """Put all parameters into one vector, along with the state of each component."""
        # Named parameters are laid out by name, so that the order they were registered in does not change the noise.
        named: list[tuple[str, nn.Parameter]] = []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"\0{number:04d}.{i:06d}" for i in range(len(group["params"]))]
            named += zip(names, group["params"], strict=True)
        before: FlatParameters | None = getattr(self, "flat", None)
        self.flat = FlatParameters([parameter for _, parameter in sorted(named, key=lambda pair: pair[0])])
        mask = noise.mask(self.flat.vector, self.seed, self.composition.sparsity) if self.composition.sparsity else None
        if before is None:
            self._mask = mask
        else:
            self._carry_over(before, mask)
        if self._mask is not None and not self._mask.any():
            raise ValueError(
                f"sparsity={self.composition.sparsity}: none of {self.flat.size} components would be trained"
            )
        self.composition.estimator.check(self.flat.size if self._mask is None else int(self._mask.sum()))
        self._master = dict(zip(self.flat.parameters, self.flat.masters, strict=True))
        self.inner = self._rule()
        self._load_moments(None)
        self._check_eps()

    def _load_moments(self, unrounded: Mapping[Any, Any] | None) -> None:
        """Load ``self.state``, or a saved state of the inner rule where that is given, into the inner rule."""
        if unrounded is not None:
            saved = self.inner.state_dict()
            self.inner.load_state_dict({**saved, "state": copy.deepcopy(unrounded.get("state", unrounded))})
            return
        for parameter, master in self._master.items():
            if parameter in self.state:
                self.inner.state[master] = {k: self._like_vector(v) for k, v in self.state[parameter].items()}

    def _carry_over(self, before: FlatParameters, mask: Tensor | None) -> None:
        """Take unrounded values, history and mask of existing parameters from the previous layout."""
        places = dict(before.slices())

        def carried(fresh: Tensor, old: Tensor) -> Tensor:
            for parameter, place in self.flat.slices():
                if parameter in places:
                    fresh[place] = self._like_vector(old[places[parameter]])
            return fresh

        with torch.no_grad():
            for parameter, place in self.flat.slices():
                if parameter in places and torch.equal(
                    before.vector[places[parameter]].to(parameter), parameter.reshape(-1)
                ):
                    self.flat.vector[place] = before.vector[places[parameter]].to(self.flat.vector)
            self._mask = None if mask is None or self._mask is None else carried(mask, self._mask)
            if "history" in self._memory:
                self._memory["history"] = carried(torch.zeros_like(self.flat.vector), self._memory["history"])
            self._memory.pop("snapshot", None)
            if list(map(id, before.parameters)) != list(map(id, self.flat.parameters)):
                self._adapted.clear()  # it is of those components together

    def _like_vector(self, value: Any) -> Any:
        """A tensor with the vector's device and dtype; counters and other values unchanged."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value.to(self.flat.vector) if value.is_floating_point() else value.to(self.flat.vector.device)

    def _rule(self) -> torch.optim.Optimizer:
        groups = [{k: v for k, v in group.items() if k not in ("param_names", OWN)} for group in self.param_groups]
        return self.composition.inner(
            [{**group, "params": [self._master[p] for p in group["params"]]} for group in groups]
        )

    def _adopt_changes(self) -> None:
        """Adopt changes made to parameters and groups since the last step."""
        if self.flat.outdated:
            self._lay_out()
            self._still.clear()
        self.flat.refresh()
        self._check_eps()
        self.composition.check_maximize(self.param_groups, known="maximize" in self.defaults)
        self._told_untrained = self._told_untrained or warn_of_untrained(self._whole, self.flat)

    def _check_eps(self) -> None:
        half = self.flat.half or self._half
        if half is not None and self.composition.estimator.uses_eps and self.composition.check_precision:
            check_eps(min(float(group["eps_zo"]) for group in self.param_groups), half)

    def _without_gradient(self, estimate: Estimate) -> frozenset[int]:
        frozen = {number for number, p in enumerate(self.flat.parameters) if not p.requires_grad}
        return frozenset(frozen | estimate.unused)

    def _push_settings(self, lr_factor: float) -> None:
        """Copy the groups' hyper-parameters, which a user or a scheduler may have changed, to the inner rule."""
        for inner, group in zip(self.inner.param_groups, self.param_groups, strict=True):
            inner.update({k: v for k, v in group.items() if k not in ("params", "param_names", OWN)})
            inner["lr"] = group["lr"] * lr_factor

    def _pull_state(self) -> None:
        """Copy the state of the inner rule back: moments by parameter, and values in its groups."""
        moments = self.inner.state
        self.state.clear()
        self.state.update({p: moments[master] for p, master in self._master.items() if master in moments})
        for inner, group in zip(self.inner.param_groups, self.param_groups, strict=True):
            group.update({k: v for k, v in inner.items() if k not in ("params", "lr")})

    def _objective(self, closure: Closure, mask: Tensor | None = None) -> Objective:
        estimator = self.composition.estimator
        directions = estimator.directions(self.flat, self.seed, mask, self.queries)
        evaluator = Evaluator(
            self.flat,
            self.executor,
            noise.closure_seed(directions.seed, self.steps, self.executor.shard),
            buffers=Buffers(places_of(self._module), self._still, alone=type(self.executor) is LocalExecutor),
            around=self.around,
            ask=self._ask,
        )
        perturbation = Perturbation(self._eps(), directions, self.steps)
        memory = Memory(self._transient, self._adapted)
        return Objective(closure, evaluator, perturbation, memory, per_example=estimator.per_example)

    def _ask(self, closure: Closure) -> Tensor | float:
        """Evaluate the closure; the first time, see what precision it computes in, which may take a call that is not counted."""
        if not self._watched:
            first, self._half, counts = watched(closure)
            self._watched = True
            self._check_eps()
            if not counts:
                raise AskAgain
            return first
        answer = closure()
        self._rounding = rounding(answer)
        return answer

    def _only_creates_state(self) -> bool:
        """Whether torch's checkpoint functions call this step, with zero gradients and lr, only to create the moments."""
        asked = all(group["lr"] == 0 for group in self.param_groups) and all(
            parameter.grad is not None and not parameter.grad.any()
            for parameter in self.flat.parameters
            if parameter.requires_grad
        )
        if asked:
            self._push_settings(1.0)
            with torch.no_grad():
                Rule(self.inner, self.flat, None).apply(torch.zeros_like(self.flat.vector))
            self._pull_state()
        return asked

    def _check_symptoms(self, estimate: Estimate) -> None:
        group = self.param_groups[0]
        eps = float(group["eps_zo"]) if self.composition.estimator.uses_eps else None
        diverged = self._symptoms.see(
            estimate.loss, estimate.differences(), lr=float(group["lr"]), eps=eps, rounding=self._rounding
        )
        if not diverged:
            self._swallowed.look(self.steps, self.flat, self.param_groups, self._names)

    def _eps(self) -> float | Tensor:
        sizes = {float(group["eps_zo"]) for group in self.param_groups}
        if len(sizes) == 1:
            return sizes.pop()
        of = {parameter: float(group["eps_zo"]) for group in self.param_groups for parameter in group["params"]}
        return self.flat.filled(lambda p: of[p])
