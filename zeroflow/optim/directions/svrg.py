"""Variance reduction by a snapshot of the parameters."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zeroflow.optim.closure import Slice
from zeroflow.optim.cost import Cost
from zeroflow.optim.directions.direction import FULL_FORWARDS, Direction, Step
from zeroflow.optim.estimators.estimator import Estimator, Slopes
from zeroflow.optim.estimators.rge import RGE
from zeroflow.optim.estimators.spsa import SPSA


@dataclass(frozen=True)
class SVRG(Direction):
    """estimate_B(theta; u) - estimate_B(snapshot; u) + estimate_full(snapshot; u').

    The same directions u in both estimates on the mini-batch B; every ``snapshot_every`` steps theta is copied and the full
    estimate is made anew (so it is when other components may move than then), over all closures of ``optimizer.step(closure, full=...)`` or over this step's mini-batch where
    none are given. Closures count equally, ``Slice``s by their samples, as a mean over all examples does. Only the slopes are kept,
    the directions u' are regenerated; one along which a closure had no finite loss is left out of the full estimate.

    Source: Liu et al. 2018 (ZO-SVRG), Algorithm 2. Memory: one vector ``[d]``. Cost: 2q forward passes besides the
    estimator's, and 2q for each closure of ``full`` at a snapshot.
    """

    needs: ClassVar[tuple[type[Estimator], ...]] = (SPSA, RGE)
    before_history: ClassVar[bool] = True
    full: ClassVar[Cost] = Cost(2)
    """Forward passes on each mini-batch of the whole training data, at a snapshot."""
    cost: ClassVar[Cost] = Cost(2, beside=f" (and {full} a mini-batch at each snapshot)")
    kept: ClassVar[int] = 1

    snapshot_every: int = 50

    def __post_init__(self) -> None:
        if isinstance(self.snapshot_every, bool) or not isinstance(self.snapshot_every, int) or self.snapshot_every < 1:
            raise ValueError(f"snapshot_every={self.snapshot_every!r}: expected an integer >= 1")

    def snapshot_forwards(self, queries: int, steps: int, batches: int) -> int:
        return -(-steps // self.snapshot_every) * self.full(queries) * batches

    def __call__(self, vector: Tensor, step: Step) -> Tensor:
        objective, memory, now = step.objective, step.memory, step.estimate
        assert isinstance(now, Slopes)
        if memory.get("snapshot_free") != _hash(objective.directions.free):
            memory.pop("snapshot", None)  # its slopes are along other components, or nobody knows along which
        if "snapshot" not in memory or objective.step - memory["snapshot_step"] >= self.snapshot_every:
            self._take(step)
        if "snapshot" not in memory:
            return vector
        there = objective.at(memory["snapshot"])
        before = step.estimator.estimate(there, step.queries)
        objective.forwards += there.forwards
        assert isinstance(before, Slopes)
        both = now.slopes.keys() & before.slopes.keys()
        full = Slopes(0.0, objective, memory["full_slopes"], now.factor, memory["snapshot_eps"], now.span)
        return now.of(both) - before.of(both) + full.of(full.slopes, step=memory["snapshot_step"])

    @staticmethod
    def _take(step: Step) -> None:
        """Copy theta, and find the slopes of the full loss there along this step's directions."""
        objective = step.objective
        closures = step.full or [objective.closure]
        sizes = [closure.samples if isinstance(closure, Slice) else None for closure in closures]
        weights = [float(size or 0) if len(set(sizes)) > 1 and None not in sizes else 1.0 for size in sizes]
        found: list[dict[int, float]] = []
        for closure in closures:
            part = objective.of(closure)
            estimate = step.estimator.estimate(part, step.queries)
            objective.forwards += part.forwards
            if step.full:
                step.memory[FULL_FORWARDS] = step.memory.get(FULL_FORWARDS, 0) + part.forwards
            assert isinstance(estimate, Slopes)
            found.append(estimate.slopes)
        everywhere = sorted(set.intersection(*map(set, found)))
        if not everywhere:
            warnings.warn(
                f"zo-svrg: no direction of step {objective.step} has a finite loss on all of the training data, so no snapshot is "
                "taken there; lower lr or eps",
                stacklevel=2,
            )
            return
        step.memory["snapshot"] = objective.theta.clone()
        step.memory["snapshot_step"], step.memory["snapshot_eps"] = objective.step, objective.eps
        step.memory["snapshot_free"] = _hash(objective.directions.free)
        step.memory["full_slopes"] = {
            query: sum(weight * slopes[query] for weight, slopes in zip(weights, found, strict=True)) / sum(weights)
            for query in everywhere
        }


def _hash(free: Tensor | None) -> int:
    """What tells positions of components from others, without keeping them."""
    found = 0
    for part in () if free is None else torch.split(free, 2**20):
        mixed = part * -7046029254386353131  # SplitMix64, modulo 2^64
        mixed = (mixed ^ mixed >> 30) * -4658895280553007687
        found += int((mixed ^ mixed >> 27).sum())
    return found
