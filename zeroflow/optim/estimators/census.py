"""Whether each example's loss depends on its own direction alone, found out by evaluating."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zeroflow.optim.closure import scalar
from zeroflow.optim.estimators.displaced import Displaced, OtherSize
from zeroflow.optim.estimators.example_signs import signs_of
from zeroflow.optim.executor import Numbers
from zeroflow.optim.objective import HERE, Objective, Shift


@dataclass
class Census:
    """How many losses the closures return that an optimizer is given, and for which of them displaced evaluation is verified.

    Attributes:
        examples: number in the last mini-batch, also where this process evaluates a slice of it; 1 where the closure returns
            a single number; None before the first.
        verified: ``Displaced.program`` and size of mini-batches; with None in its place a log or other processes answer for it.
    """

    examples: int | None = None
    verified: set[tuple[int | None, int]] = field(default_factory=set)
    _here: list[float] = field(default_factory=list)  # losses of this process's slice at theta, when they were counted
    _warned: bool = False

    def __reduce__(self) -> tuple[type[Census], tuple[()]]:
        """A copy, or another process, verifies by itself: programs are told by this process's objects."""
        return Census, ()

    def found(self, examples: int) -> None:
        """Remember how many losses all processes together have found."""
        self.examples = examples
        if all(size != examples for _, size in self.verified):
            self.verified.add((None, examples))

    def _knows(self, program: int, examples: int) -> bool:
        if (None, examples) in self.verified:
            self.verified.discard((None, examples))
            self.verified.add((program, examples))
        return (program, examples) in self.verified

    def losses(self, objective: Objective, query: int, scale: float) -> Numbers:
        """Losses of all examples at theta + scale * eps * z_n, or the one loss of a mini-batch that has only one.

        Only the slice of this process is evaluated, so that the sum over shards has all: losses of other examples are zero,
        and a single loss is weighted.
        """
        if self.examples not in (None, 1, objective.samples) and objective.samples:
            self.examples = None  # what was made for another size may be as large as both sizes multiplied
        counted = False
        for _ in range(2):
            if self.examples is None:
                self._count(objective)
                counted = True
            assert self.examples is not None
            try:
                if self.examples == 1:
                    objective.move(Shift(scale, query))
                    return (objective.share * scalar(_several(objective, objective.call(), 1)),)
                losses, program = _displaced(objective, query, scale, self.examples)
                if not self._knows(program, self.examples):
                    if not counted:
                        self._count(objective)
                    self._verify(objective, query)
                    self.verified.add((program, self.examples))
                return losses
            except OtherSize as error:
                found, self.examples = error, None
            except (TypeError, RuntimeError, ValueError, IndexError):
                if counted:
                    raise
                self.examples = None  # a mini-batch of another size than the last one can show in any layer
        raise TypeError(
            f"zo-per-example: the closure gives one number of losses, a layer's input has shape {found}; dimension 0 of every "
            "activation must be the example"
        )

    def _count(self, objective: Objective) -> None:
        objective.move(HERE)
        answer = objective.call()
        objective.forwards += 1
        self.examples = objective.whole(len(answer)) if isinstance(answer, Tensor) and answer.ndim == 1 else 1
        self._here = answer.tolist() if isinstance(answer, Tensor) and answer.ndim == 1 else []
        if not self._here and not self._warned:
            scalar(answer)
            self._warned = True
            warnings.warn(
                "zo-per-example: the closure returns one loss for the whole mini-batch, so there is one direction for all "
                'of it (plain SPSA); return a loss for each example, such as cross_entropy(..., reduction="none")',
                stacklevel=2,
            )

    def _verify(self, objective: Objective, query: int) -> None:
        """See whether examples are evaluated as the loss is meant: far from theta, where differences show.

        Half of them are left at theta, then the other half: that changes no loss of the others, unless they interact (of a
        dependence on one other example alone every second is seen). And one loss is compared with that of the whole mini-batch at
        its parameters: both are the same function, unless a dimension that happens to have the batch's size was mistaken for
        the batch.

        Raises:
            TypeError: they are not.
        """
        examples, eps = self.examples or 1, objective.eps
        far = 30.0 if isinstance(eps, Tensor) else max(30.0, 0.03 / eps)
        own = objective.own(examples)
        half = torch.randint(0, 2, (examples,), generator=torch.Generator().manual_seed(examples))[own]

        def displaced(sides: Tensor | None = None) -> Tensor:
            objective.forwards += 1
            losses, _ = _displaced(objective, query, far, examples, sides)
            return torch.tensor(losses[own], dtype=torch.float64)

        fast = displaced()
        here = torch.tensor(self._here, dtype=torch.float64) if len(self._here) == len(fast) else torch.zeros_like(fast)
        change, rounding = (fast - here).abs(), 3e-6 if objective.flat.half is None else 5e-2
        for moved in (half, 1 - half):
            alone = displaced(moved)
            met = (fast - alone).abs() > rounding * (1 + fast.abs()) + 1e-4 * change
            if bool((met & (moved > 0) & fast.isfinite() & alone.isfinite()).any()):
                raise TypeError(
                    "zo-per-example: the loss of an example changes with the parameters of others: they interact (batch statistics, "
                    "attention over dimension 0, negatives of the same mini-batch); take zo-sgd"
                )
        # The one that moves most shows most; in half precision it is the one that rounding moves.
        order = change.nan_to_num(0.0, 0.0).argsort()
        one = int(order[-1 if objective.flat.half is None else len(order) // 2])
        signs, place = signs_of(objective, query, examples), objective.direction(query).clone()
        for parameter, part in objective.flat.slices():
            place[part] *= signs.full(parameter)[own.start + one].reshape(-1)
        objective.move(Shift(far, vector=place * eps))
        slow, found = float(_several(objective, objective.call(), examples)[one]), float(fast[one])
        objective.forwards += 1
        tolerance = (2e-4 if objective.flat.half is None else rounding) * (1 + abs(slow)) + 0.02 * float(change[one])
        if math.isfinite(found) and math.isfinite(slow) and abs(found - slow) > tolerance:
            raise TypeError(
                f"zo-per-example: with a direction of its own an example's loss is {found:.6g}, evaluated alone {slow:.6g}. "
                "Examples interact (batch statistics, attention over dimension 0), or a tensor that is no activation has the "
                f"length of the mini-batch ({examples}); take zo-sgd or another batch size"
            )


def _several(objective: Objective, answer: Tensor | float, examples: int) -> Tensor:
    """A closure's result as losses of its slice of a mini-batch of ``examples``; of one example it may be a number."""
    if examples == 1 and not (isinstance(answer, Tensor) and answer.ndim):
        return torch.tensor([scalar(answer)], dtype=torch.float64)
    if not isinstance(answer, Tensor) or answer.ndim != 1:
        found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise TypeError(f"closure: expected one loss per example, [{examples}], got {found}")
    own = objective.own(examples)
    if len(answer) != own.stop - own.start or objective.whole(len(answer)) != examples:
        raise OtherSize(tuple(answer.shape))
    return answer


def _displaced(
    objective: Objective, query: int, scale: float, examples: int, sides: Tensor | None = None
) -> tuple[Numbers, int]:
    """Losses of all examples, each at its own theta + scale * eps * z_n, zero for those of other processes, and the program."""
    own = objective.own(examples)
    if objective.whole(own.stop - own.start) != examples:
        raise OtherSize((objective.whole(own.stop - own.start),))
    objective.move(HERE)
    displaced = Displaced(objective, query, scale, examples, sides)
    answer = objective.call(within=displaced)
    losses = torch.zeros(examples, dtype=torch.float64)
    losses[own] = _several(objective, answer, examples).as_subclass(Tensor).to(losses)
    return tuple(losses.tolist()), displaced.program
