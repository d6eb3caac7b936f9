"""One direction per example of the mini-batch, all in the same two forward passes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from zeroflow.optim.closure import mean_finite, scalar
from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.displaced import Displaced, OtherSize
from zeroflow.optim.estimators.estimator import Estimate, Estimator
from zeroflow.optim.estimators.example_signs import signs_of
from zeroflow.optim.executor import Numbers
from zeroflow.optim.objective import HERE, Objective, Shift


@dataclass(frozen=True)
class PerExample(Estimator):
    """Two-sided differences with a separate direction for each of the batch's N examples.

    g_n = (l_n(theta + eps z_n) - l_n(theta - eps z_n)) / 2 eps with l_n the loss of example n;
    estimate = mean over n (and over q repetitions) of g_n z_n.

    The directions of a weight ``[out, in]`` are z_n = Z * (r_n s_n^T), elementwise, with Z, r_n and s_n random signs: any two
    are uncorrelated, and one more matrix product per layer evaluates all of them (Wen et al. 2018, Flipout, Eq. 4). Other
    parameters get a sign for each component and example. N slopes instead of one make the estimate better for the same
    forward passes, by up to sqrt(N) in its cosine to the gradient.

    The closure returns the losses ``[N]`` (``reduction="none"``), and dimension 0 of the model's activations is the example.
    Examples must not interact: no batch statistics. This is verified for every new size of a mini-batch: no loss may change while
    half of the other examples stay at theta, and one must be that of its parameters. A closure that returns a
    single number gets plain SPSA along signs, with a warning.

    With ``normalize`` the g_n of a repetition are divided by their standard deviation over n (about their mean, with 1/N), so
    that lr does not depend on the scale of the loss or of eps; a single example keeps only its sign.
    Source: per-example directions of GRZO and EVA-0 (2026); ``normalize``: Tan et al. 2026 (GRZO, arXiv:2606.02857), whose lr
    is 2 eps times the one here. Cost: 2q forward passes, and 5 more to count and verify a mini-batch of a new size (1 more
    where the size has been seen), or once modules have changed their mode.
    """

    per_example: ClassVar[bool] = True
    cost: ClassVar[Cost] = Cost(2)
    distribution: ClassVar[str] = "rademacher"  # type: ignore[misc]

    normalize: bool = False

    @property
    def unbiased(self) -> bool:
        return not self.normalize

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        census = objective.memory.setdefault("census", Census())
        census.expect(objective.evaluator.buffers.modes)

        def evaluate(index: int) -> Numbers:
            extra = objective.forwards
            if not objective.share:
                return ()
            with torch.no_grad():
                losses = census.losses(objective, index // 2, (1.0, -1.0)[index % 2])
            return (objective.share * (objective.forwards - extra), *losses)

        before = objective.forwards
        answers = objective.run(2 * queries, evaluate, width=None)
        # From the answers alone, so that all processes and a replay count alike and know what has been verified.
        objective.forwards = before + 2 * queries + round(max(answer[0] for answer in answers))
        losses = torch.tensor([answer[1:] for answer in answers], dtype=torch.float64)
        census.examples = losses.shape[1]
        census.verified.add(census.examples)
        slopes = (losses[::2] - losses[1::2]) / 2
        return ExampleSlopes(mean_finite(losses.flatten().tolist()), objective, slopes, self.normalize)


@dataclass
class Census:
    """The number of losses that the closure returns, and the mini-batch sizes for which displaced evaluation is verified.

    Attributes:
        examples: number in the last mini-batch, also where this process evaluates a slice of it; 1 where the closure returns
            a single number; None before the first.
        verified: sizes of mini-batches.
    """

    examples: int | None = None
    verified: set[int] = field(default_factory=set)
    _here: list[float] = field(default_factory=list)  # losses of this process's slice at theta, when they were counted
    _warned: bool = False
    _modes: tuple[bool, ...] = ()

    def expect(self, modes: tuple[bool, ...]) -> None:
        """Verify anew what was verified in other modes: batch statistics are those of a mini-batch in training mode alone."""
        if modes != self._modes:
            self._modes, self.examples = modes, None
            self.verified.clear()

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
                if self.examples not in self.verified:
                    self._verify(objective, query)
                return _displaced(objective, query, scale, self.examples)
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
            return torch.tensor(_displaced(objective, query, far, examples, sides)[own], dtype=torch.float64)

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
        self.verified.add(examples)


@dataclass
class ExampleSlopes(Estimate):
    """Slopes by query and example, and the mean of slope times direction.

    Attributes:
        loss: see ``Estimate``.
        objective: regenerates the directions.
        slopes: multiplied by eps, ``[q, N]``; N = 1 where the closure returns a single number. The mean is over the finite
            ones.
        normalize: whether the slopes of a query are divided by their standard deviation.
    """

    loss: float
    objective: Objective
    slopes: Tensor
    normalize: bool = False

    @property
    def usable(self) -> bool:
        return bool(self.slopes.isfinite().any())

    def differences(self) -> list[float]:
        return list(self.slopes[self.slopes.isfinite()].tolist())

    def vector(self) -> Tensor:
        if self.normalize:
            return self._combine(self.slopes / self._spread())
        return self._combine(self.slopes).div_(self.objective.eps)

    def _spread(self) -> Tensor:
        """Standard deviation of each query's finite slopes ``[q, 1]``; its magnitude for a single one; infinite where zero."""
        kept = self.slopes.isfinite()
        count = kept.sum(1, keepdim=True)
        mean = torch.where(kept, self.slopes, 0.0).sum(1, keepdim=True) / count
        about = torch.where(count > 1, mean, 0.0)
        spread = torch.where(kept, self.slopes - about, 0.0).square().sum(1, keepdim=True).div(count).sqrt()
        return torch.where(spread > 0, spread, math.inf)

    def scalar_sign(self) -> Tensor:
        return self._combine(self.slopes.sign())

    def _combine(self, weights: Tensor) -> Tensor:
        kept = self.slopes.isfinite()
        weights = torch.where(kept, weights, 0.0) / kept.sum()
        examples = weights.shape[1]
        total = torch.zeros_like(self.objective.flat.vector)
        for query, row in enumerate(weights):
            base = self.objective.direction(query)
            if examples == 1:
                total.add_(base, alpha=float(row[0]))
                continue
            on = row.to(base)
            signs = signs_of(self.objective, query, examples)
            for parameter, place in self.objective.flat.slices():
                mean = signs.weighted(parameter, on)
                total[place] += base[place] * mean.reshape(-1)
        return total


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


def _displaced(objective: Objective, query: int, scale: float, examples: int, sides: Tensor | None = None) -> Numbers:
    """Losses of all examples, each at its own theta + scale * eps * z_n; zero for those of other processes."""
    own = objective.own(examples)
    if objective.whole(own.stop - own.start) != examples:
        raise OtherSize((objective.whole(own.stop - own.start),))
    objective.move(HERE)
    with Displaced(objective, query, scale, examples, sides):
        answer = objective.call()
    losses = torch.zeros(examples, dtype=torch.float64)
    losses[own] = _several(objective, answer, examples).as_subclass(Tensor).to(losses)
    return tuple(losses.tolist())
