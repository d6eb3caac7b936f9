"""The conformance suite: every optimizer here passes it, and each check fails on code that is wrong on purpose."""

from __future__ import annotations

import copy
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT
from references import DIRECTIONS, EXAMPLES, reference, signs, stream
from torch import nn

from zeroflow.optim import Slice, create_optimizer, list_optimizers
from zeroflow.optim.testing import CHECKS, ConformanceError, Subject, checks, run_conformance, subject
from zeroflow.optim.testing.problems import Quadratic, regression, theta

DOCUMENT = ROOT / "docs" / "conformance.md"


def referred(name: str, **options: Any) -> Subject:
    """A named optimizer as a subject, with its reference."""
    per_example = options.pop("per_example", False)
    return subject(name, **options, per_example=per_example, reference=reference(name, **options))


SUBJECTS = [
    *(referred(name) for name in list_optimizers()),
    referred("zo-per-example", per_example=True, queries=2), referred("zo-sgd", queries=3),
    referred("zo-svrg", queries=2, snapshot_every=3), referred("es-cma", lr=1.0, separable=True),
    referred("zo-sgd", queries=3, combine="span"),
    referred("zo-per-example", per_example=True, queries=2, normalize=True),
    # The three enhancements.
    referred("zo-sgd", history=0.6), referred("zo-sgd", sparsity=0.5), referred("zo-adam", hybrid=3),
    referred("zo-adam", history=0.6, history_of="directions", queries=2),
]  # fmt: skip
"""All checks are made of these."""

MORE_QUERIES = [
    referred(name, queries=3) for name in list_optimizers("zo-*") if name not in ("zo-cars", "zo-fzoo", "zo-sgd")
]
"""Of these, whether steps are right."""

VARIANTS = [
    # Rules with memory, other distributions, the other sign.
    referred("zo-sgd", momentum=0.9, nesterov=True, weight_decay=0.1, distribution="rademacher"),
    referred("zo-rge", queries=4, distribution="sphere"),
    referred("forward-grad", queries=2, distribution="rademacher"),
    referred("zo-sgd-sign", sign="scalar", queries=3), referred("zo-adam", betas=(0.8, 0.9), weight_decay=0.1),
    referred("zo-sgd-conserve", momentum=0.9, lr=0.1), referred("zo-adam-conserve", lr=0.5, queries=2),
    referred("zo-adamm", betas=(0.5, 0.5), weight_decay=0.1), referred("zo-radazo", betas=(0.5, 0.9)),
    # All coordinates: a finite-difference gradient.
    replace(referred("zo-cge", queries=5000), unbiased=True), referred("zo-scd", queries=5000),
    # The span of the directions.
    referred("zo-rge", queries=4, combine="span", distribution="sphere"), referred("zo-adam", queries=50, combine="span"),
    referred("forward-grad", queries=4, combine="span", distribution="rademacher", sparsity=0.5),
    referred("zo-svrg", queries=3, combine="span"),
    # A subspace of low rank that changes.
    *(referred("zo-muon", rank=2, resample_every=5, **options) for options in ({}, {"sparsity": 0.5, "history": 0.4})),
    referred("zo-muon", rank=1, queries=3, combine="span", momentum=0.9),
    # A population: the published step, another size, components held still.
    referred("es-cma", lr=1.0), referred("es-cma", lr=1.0, queries=7, eps=0.5),
    *(referred("es-cma", lr=1.0, sparsity=0.5, separable=separable) for separable in (False, True)),
    # History, sparsity, hybrid.
    referred("zo-adam-sign", history=0.8, queries=2),
    referred("zo-sgd-sign", history=0.4, sign="scalar"), referred("zo-svrg", history=0.5, snapshot_every=3),
    *(referred(name, history=0.7, history_of="directions", queries=3) for name in ("zo-sgd", "zo-sgd-sign", "forward-grad")),
    referred("zo-sgd-sign", sign="scalar", history=0.7, history_of="directions", queries=2, sparsity=0.5),
    referred("zo-rge", history=0.5, history_of="directions", queries=2, distribution="sphere"),
    referred("zo-sgd-conserve", history=0.5, history_of="directions", hybrid=2, lr=0.5),
    *(referred("zo-sgd", sparsity=s) for s in (0.1, 0.9)),
    referred("zo-sgd", sparsity=0.3, momentum=0.9, weight_decay=0.5),
    referred("zo-adam", sparsity=0.5, weight_decay=0.5),
    referred("zo-sgd-sign", sparsity=0.5), referred("zo-adam-conserve", sparsity=0.5, lr=1e-3, queries=4),
    referred("zo-svrg", sparsity=0.5, queries=2), referred("zo-rge", sparsity=0.5, distribution="sphere"),
    referred("zo-scd", sparsity=0.5, queries=5000), referred("zo-cge", sparsity=0.5, queries=5000),
    referred("zo-fzoo", sparsity=0.5), referred("forward-grad", sparsity=0.5), referred("zo-cars", sparsity=0.2),
    referred("fo-adam", sparsity=0.5, weight_decay=0.5), referred("zo-per-example", sparsity=0.5, per_example=True),
    referred("zo-sgd", hybrid=3, momentum=0.9), referred("zo-adam", hybrid=3, hybrid_lr=0.2),
    referred("zo-adam-conserve", hybrid=2, sparsity=0.5), referred("zo-svrg", hybrid=3, snapshot_every=2, history=0.5),
]  # fmt: skip
"""Of these, the checks of formulas."""

STEPS = [
    checks.check_update_lies_along_perturbations, checks.check_trajectory_follows_the_formula,
    checks.check_snapshot_is_a_copy_and_both_estimates_share_directions,
]  # fmt: skip
FORMULAS = [
    *STEPS, checks.check_estimate_is_unbiased, checks.check_mask_holds_the_same_components_still_everywhere,
    checks.check_keeps_the_best_and_forgets_rejected_moments,
]  # fmt: skip


def labelled(one: Subject) -> str:
    return f"{one.name} q={one.queries}".replace(" ", ",")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "check"),
    [
        pytest.param(one, check, id=f"{labelled(one)}-{check.__name__.removeprefix('check_')}")
        for ones, wanted in ((SUBJECTS, CHECKS), (VARIANTS, FORMULAS), (MORE_QUERIES, STEPS))
        for one in ones
        for check in wanted
        if CHECKS[check](one)
    ],
)
@pytest.mark.filterwarnings("ignore:zo-per-example")
def test_conforms(one: Subject, check: Callable[[Subject], None]) -> None:
    check(one)


# Somebody else's optimizer: right in everything, and made wrong by one change at a time.


class Mezo:
    """Two-sided SPSA with SGD on a module: perturbs in place, restores from a copy, regenerates its noise."""

    eps, sides = 1e-3, (1, -1)

    def __init__(self, model: nn.Module, seed: int, lr: float = 0.05, queries: int = 1, executor: Any = None) -> None:
        self.model, self.seed, self.lr, self.queries, self.executor = model, seed, lr, queries, executor
        self.parameters = [p for _, p in sorted(model.named_parameters())]
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        sizes = [p.numel() for p in self.parameters]
        drawn = torch.tensor(stream(self.seed, self.steps, query, DIRECTIONS).standard_normal(sum(sizes)))
        return [z.view(p.shape).to(p) for z, p in zip(drawn.split(sizes), self.parameters, strict=True)]

    def prepare(self, side: int) -> None:
        torch.manual_seed(self.seed * 1000 + self.steps)

    def restore(self, copies: list[torch.Tensor], z: list[torch.Tensor], scale: float) -> None:
        for p, copied in zip(self.parameters, copies, strict=True):
            p.copy_(copied)

    def slope(self, closure: Callable, query: int) -> tuple[float]:
        copies, z, losses = [p.clone() for p in self.parameters], self.z(query), []
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        for side in self.sides:
            for p, part in zip(self.parameters, z, strict=True):
                p.add_(part, alpha=side * self.eps)
            self.prepare(side)
            try:
                losses.append(float(closure().mean()))
            finally:
                self.restore(copies, z, side * self.eps)
                for buffer, before in buffers:
                    buffer.copy_(before)
        return ((losses[0] - losses[1]) / (self.eps * (self.sides[0] - self.sides[1])),)

    def combined(self, slopes: list[float]) -> list[torch.Tensor]:
        """The estimate, tensor by tensor; one direction in memory at a time."""
        total = [torch.zeros_like(p) for p in self.parameters]
        for query, slope in enumerate(slopes):
            for one, z in zip(total, self.z(query, "update"), strict=True):
                one.add_(z, alpha=slope / self.queries)
        return total

    def update(self, slopes: list[float]) -> None:
        for p, g in zip(self.parameters, self.combined(slopes), strict=True):
            p.sub_(g, alpha=self.lr)

    def step(self, closure: Callable) -> None:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if self.executor is None:
                slopes = [self.slope(closure, query)[0] for query in range(self.queries)]
            else:
                slopes = [g for (g,) in self.executor.map(self.queries, lambda query: self.slope(closure, query))]
            if any(True for _ in self.model.buffers()):
                self.prepare(1)
                closure()
            if all(np.isfinite(slopes)):
                self.update(slopes)
            self.steps += 1


class OtherNoiseForEachTensor(Mezo):
    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        if use == "perturbation":
            return super().z(query)
        seed = self.seed * 1000 + self.steps
        return [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p) for p in self.parameters]


class NoiseInOrderOfRegistration(Mezo):
    def __init__(self, model: nn.Module, seed: int, lr: float = 0.05) -> None:
        super().__init__(model, seed, lr)
        self.parameters = list(model.parameters())


class ForgetsToDivideByQueries(Mezo):
    def update(self, slopes: list[float]) -> None:
        super().update([slope * self.queries for slope in slopes])


class StrayFactorMu(Mezo):
    def update(self, slopes: list[float]) -> None:
        super().update([slope * self.eps for slope in slopes])


class RestoresByArithmetic(Mezo):
    def restore(self, copies: list[torch.Tensor], z: list[torch.Tensor], scale: float) -> None:
        for p, part in zip(self.parameters, z, strict=True):
            p.sub_(part, alpha=scale)


class RestoresOnlyWhenAllGoesWell(Mezo):
    def restore(self, copies: list[torch.Tensor], z: list[torch.Tensor], scale: float) -> None:
        if sys.exc_info()[0] is None:
            super().restore(copies, z, scale)


class MovesOnNaN(Mezo):
    def step(self, closure: Callable) -> None:
        with torch.no_grad():
            self.update([self.slope(closure, query)[0] for query in range(self.queries)])


class FreshDropoutMasks(Mezo):
    def prepare(self, side: int) -> None:
        pass


class AnotherMiniBatchForEachSide(Mezo):
    def prepare(self, side: int) -> None:
        torch.manual_seed(self.seed * 1000 + self.steps + side)


class OneDropoutMaskForEver(Mezo):
    def prepare(self, side: int) -> None:
        torch.manual_seed(self.seed)


class SeedsTheCallersGenerator(Mezo):
    def step(self, closure: Callable) -> None:
        super().step(closure)
        torch.manual_seed(self.seed)


class BatchNormSeesEveryEvaluation(Mezo):
    def slope(self, closure: Callable, query: int) -> tuple[float]:
        slope = super().slope(closure, query)
        closure()
        return slope


class StatisticsNeverMove(Mezo):
    def step(self, closure: Callable) -> None:
        before = [buffer.clone() for buffer in self.model.buffers()]
        super().step(closure)
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)


class BatchNormUndoesTheStep(Mezo):
    def update(self, slopes: list[float]) -> None:
        if not any(True for _ in self.model.buffers()):
            super().update(slopes)


class SeedsFromBaseAndWorker(Mezo):
    def __init__(self, model: nn.Module, seed: int, queries: int = 1, executor: Any = None) -> None:
        super().__init__(model, seed + getattr(executor, "rank", 0), queries=queries, executor=executor)


class SeedsInOrderOfEvaluation(Mezo):
    def __init__(self, model: nn.Module, seed: int, queries: int = 1, executor: Any = None) -> None:
        super().__init__(model, seed, queries=queries, executor=executor)
        self.stream = torch.Generator().manual_seed(seed)

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        if use == "perturbation":
            self.drawn = [torch.randn(p.shape, generator=self.stream, dtype=p.dtype) for p in self.parameters]
        return self.drawn


class StoresItsNoise(Mezo):
    def __init__(self, model: nn.Module, seed: int, queries: int = 1) -> None:
        super().__init__(model, seed, queries=queries)
        self.stored: dict[int, list[torch.Tensor]] = {}

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        return self.stored.setdefault(query, super().z(query))


class HoldsTheNoiseOfAStep(StoresItsNoise):
    def step(self, closure: Callable) -> None:
        super().step(closure)
        self.stored.clear()


class BuildsAGraph(Mezo):
    def slope(self, closure: Callable, query: int) -> tuple[float]:
        def with_gradients() -> torch.Tensor:
            with torch.enable_grad():
                return closure().detach()

        return super().slope(with_gradients, query)


class LeavesGradients(Mezo):
    def update(self, slopes: list[float]) -> None:
        super().update(slopes)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)


class ForgetsItsCounter(Mezo):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Masked(Mezo):
    """Right: one random mask, multiplied into all noise."""

    def __init__(self, model: nn.Module, seed: int, sparsity: float = 0.1) -> None:
        super().__init__(model, seed)
        generator = torch.Generator().manual_seed(seed)
        self.masks = [self.kept(torch.rand, torch.randn, p.shape, generator, sparsity) for p in self.parameters]

    @staticmethod
    def kept(uniform: Callable, normal: Callable, shape: tuple, generator: torch.Generator, s: float) -> torch.Tensor:
        return uniform(shape, generator=generator) >= s

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        return [z * kept for z, kept in zip(super().z(query), self.masks, strict=True)]


class MaskFromNormals(Masked):
    @staticmethod
    def kept(uniform: Callable, normal: Callable, shape: tuple, generator: torch.Generator, s: float) -> torch.Tensor:
        return ~(normal(shape, generator=generator) < s)


class MaskOnPerturbationOnly(Masked):
    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        return super().z(query) if use == "perturbation" else Mezo.z(self, query)


class MaskOnUpdateOnly(Masked):
    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        return super().z(query) if use == "update" else Mezo.z(self, query)


class DecaysWhatIsMasked(Masked):
    def update(self, slopes: list[float]) -> None:
        super().update(slopes)
        for p in self.parameters:
            p.mul_(0.99)


def mezo(kind: type[Mezo] | partial[Mezo], **claims: Any) -> Subject:
    claims = {"lr": 0.05, "eps": 1e-3, "unbiased": True, "along": True, "resumes": True, **claims}
    return Subject(kind, name=(kind.func if isinstance(kind, partial) else kind).__name__, **claims)


class Sphere(Mezo):
    """Right: one-sided differences along directions of length 1, times d."""

    sides = (1, 0)

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        drawn = super().z(query)
        length = torch.stack([z.square().sum() for z in drawn]).sum().sqrt()
        return [z / length for z in drawn]

    def update(self, slopes: list[float]) -> None:
        super().update([slope * sum(p.numel() for p in self.parameters) for slope in slopes])


class SphereWithoutItsFactor(Sphere):
    def update(self, slopes: list[float]) -> None:
        Mezo.update(self, slopes)


class Svrg(Mezo):
    """Right: a snapshot of the first step's parameters, and the same directions in both estimates."""

    snapshot: list[torch.Tensor] | None = None

    def taken(self) -> list[torch.Tensor]:
        return [p.clone() for p in self.parameters]

    def estimate(self, closure: Callable) -> list[torch.Tensor]:
        return self.combined([self.slope(closure, query)[0] for query in range(self.queries)])

    def there(self, closure: Callable) -> list[torch.Tensor]:
        return self.estimate(closure)

    @torch.no_grad()
    def step(self, closure: Callable) -> None:
        now = self.estimate(closure)
        if self.snapshot is None:
            self.snapshot, self.full = self.taken(), now
        live = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.snapshot)
        before = self.there(closure)
        torch._foreach_copy_(self.parameters, live)
        for p, a, b, c in zip(self.parameters, now, before, self.full, strict=True):
            p.sub_(a - b + c, alpha=self.lr)
        self.steps += 1


class AliasedSnapshot(Svrg):
    def taken(self) -> list[torch.Tensor]:
        return self.parameters


class OtherDirectionsAtTheSnapshot(Svrg):
    def there(self, closure: Callable) -> list[torch.Tensor]:
        self.steps += 1000
        try:
            return self.estimate(closure)
        finally:
            self.steps -= 1000


class AdamKeepsBest(Mezo):
    """Right: the best of theta and theta -+ Adam's step; moments are those before where a step is rejected."""

    def __init__(self, model: nn.Module, seed: int, lr: float = 0.05) -> None:
        super().__init__(model, seed, lr)
        self.inner = torch.optim.Adam(self.parameters, lr=lr)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, **self.inner.state_dict()}

    def forget(self, moments: dict[str, Any]) -> None:
        self.inner.load_state_dict(moments)

    def stay(self, before: list[torch.Tensor], g: list[torch.Tensor]) -> None:
        torch._foreach_copy_(self.parameters, before)

    @torch.no_grad()
    def step(self, closure: Callable) -> None:
        g = self.combined([self.slope(closure, query)[0] for query in range(self.queries)])
        before, moments = [p.clone() for p in self.parameters], copy.deepcopy(self.inner.state_dict())
        losses = [float(closure())]
        for p, part in zip(self.parameters, g, strict=True):
            p.grad = part
        self.inner.step()
        self.inner.zero_grad()
        after = [p.clone() for p in self.parameters]
        losses.append(float(closure()))
        other = [2 * b - a for a, b in zip(after, before, strict=True)]
        torch._foreach_copy_(self.parameters, other)
        losses.append(float(closure()))
        best = losses.index(min(losses))
        torch._foreach_copy_(self.parameters, (after, after, other)[best])
        if best == 0:
            self.stay(before, g)
        if best != 1:
            self.forget(moments)
        self.steps += 1


class KeepsRejectedMoments(AdamKeepsBest):
    def forget(self, moments: dict[str, Any]) -> None:
        pass


class RollsBackAsIfItWereSgd(AdamKeepsBest):
    def stay(self, before: list[torch.Tensor], g: list[torch.Tensor]) -> None:
        torch._foreach_add_(self.parameters, g, alpha=self.lr)


class Adamm(Mezo):
    """Right: divides by the root of the largest second moment so far."""

    def __init__(self, model: nn.Module, seed: int, lr: float = 0.05) -> None:
        super().__init__(model, seed, lr)
        self.m, self.v, self.vhat = ([torch.zeros_like(p) for p in self.parameters] for _ in range(3))

    def under(self, v: torch.Tensor, vhat: torch.Tensor) -> torch.Tensor:
        return vhat

    def update(self, slopes: list[float]) -> None:
        for p, g, m, v, vhat in zip(self.parameters, self.combined(slopes), self.m, self.v, self.vhat, strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.5).add_(g * g, alpha=0.5)
            torch.maximum(v, vhat, out=vhat)
            p.sub_(self.lr * m / (self.under(v, vhat).sqrt() + 1e-8))


class NotTheLargestSecondMoment(Adamm):
    def under(self, v: torch.Tensor, vhat: torch.Tensor) -> torch.Tensor:
        return v


OWN_RULE = {"unbiased": False, "along": False, "resumes": False}
ADAMM = {**OWN_RULE, "reference": reference("zo-adamm", betas=(0.9, 0.5))}
CONSERVE = {**OWN_RULE, "keeps_best": True, "reference": reference("zo-adam-conserve", lr=0.5)}

unbiased, along, masks, snapshots, keeping, restored, same, batch_norm, workers, order, formula, memory, resumes = (
    CHECKS
)

BROKEN = [
    (along, mezo(OtherNoiseForEachTensor), "last.bias.*re-seeds|re-seeds for each tensor"),
    (unbiased, mezo(OtherNoiseForEachTensor), "gradient"),
    (order, mezo(NoiseInOrderOfRegistration), "order"),
    (unbiased, mezo(partial(ForgetsToDivideByQueries, queries=4)), "1/q forgotten"),
    (unbiased, mezo(StrayFactorMu), "stray factor mu"),
    (formula, mezo(StrayFactorMu, reference=reference("zo-sgd")), "differs from the reference"),
    (restored, mezo(RestoresByArithmetic), "steps of lr=0 moved"),
    (restored, mezo(RestoresOnlyWhenAllGoesWell), "closure that raises"),
    (restored, mezo(MovesOnNaN), "returns NaN"),
    (same, mezo(FreshDropoutMasks), "dropout"),
    (same, mezo(AnotherMiniBatchForEachSide), "two mini-batches"),
    (same, mezo(OneDropoutMaskForEver), "new one each step"),
    (same, mezo(SeedsTheCallersGenerator), "caller's random numbers"),
    (batch_norm, mezo(partial(BatchNormSeesEveryEvaluation, queries=2)), "running statistics"),
    (batch_norm, mezo(StatisticsNeverMove), "one pass at theta"),
    (batch_norm, mezo(BatchNormUndoesTheStep), "moved no parameter"),
    (workers, mezo(SeedsFromBaseAndWorker), "base . worker"),
    (workers, mezo(SeedsInOrderOfEvaluation), "reverse order"),
    (memory, mezo(StoresItsNoise), "noise stored"),
    (memory, mezo(HoldsTheNoiseOfAStep), "peak"),
    (memory, mezo(BuildsAGraph), "saved .* for a backward"),
    (memory, mezo(LeavesGradients, kept=1), "param.grad"),
    (resumes, mezo(ForgetsItsCounter), "resumed after step 1"),
    (masks, mezo(MaskFromNormals, sparsity=0.1), "5[0-9].[0-9]% of .* expected 10.0%"),
    (masks, mezo(MaskOnPerturbationOnly, sparsity=0.1), "but not on the update"),
    (masks, mezo(MaskOnUpdateOnly, sparsity=0.1), "one of the two only"),
    (masks, mezo(DecaysWhatIsMasked, sparsity=0.1), "weight decay"),
    (snapshots, mezo(AliasedSnapshot, snapshot=True), "alias"),
    (snapshots, mezo(OtherDirectionsAtTheSnapshot, snapshot=True), "different seeds"),
    (keeping, mezo(KeepsRejectedMoments), "not rolled back"),
    (keeping, mezo(RollsBackAsIfItWereSgd), "raised the loss"),
    (keeping, mezo(Mezo), "raised the loss"),
    (formula, mezo(partial(KeepsRejectedMoments, lr=0.5), **CONSERVE), "differs from the reference"),
    (formula, mezo(NotTheLargestSecondMoment, **ADAMM), "differs from the reference"),
    (unbiased, mezo(SphereWithoutItsFactor), "sphere's factor d lost"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "one", "message"),
    [pytest.param(*case, id=f"{case[1].name}-{case[0].__name__.removeprefix('check_')}") for case in BROKEN],
)
def test_a_check_fails_on_what_it_is_there_for(check: Callable, one: Subject, message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        check(one)


RIGHT = [
    (mezo(Mezo, reference=reference("zo-sgd")), None),
    (mezo(partial(Mezo, queries=3), queries=3, reference=reference("zo-sgd", queries=3)), None),
    (mezo(Masked, sparsity=0.1, unbiased=False, kept=1), None),
    (mezo(Sphere, reference=reference("zo-rge", distribution="sphere")), [unbiased, along, formula]),
    (mezo(partial(Svrg, queries=2), queries=2, snapshot=True), [unbiased, along, snapshots]),
    (mezo(AdamKeepsBest), [keeping]),
    (mezo(partial(AdamKeepsBest, lr=0.5), **CONSERVE), [formula]),
    (mezo(Adamm, **ADAMM), [formula]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "wanted"), RIGHT, ids=[one.name for one, _ in RIGHT])
def test_an_optimizer_from_elsewhere_that_is_right_passes(one: Subject, wanted: list[Callable] | None) -> None:
    """Each broken one differs by one method from one of these."""
    if wanted is None:
        assert [str(outcome) for outcome in run_conformance(one) if outcome.passed is False] == []
    for check in wanted or []:
        check(one)


def test_a_report_tells_what_passed_failed_and_did_not_apply() -> None:
    class Unfinished:
        def step(self, closure: Callable) -> None:
            raise NotImplementedError("soon")

    outcomes = {outcome.check: outcome for outcome in run_conformance(Subject(lambda model, seed: Unfinished()))}
    assert len(outcomes) == len(CHECKS)
    assert outcomes["check_estimate_is_unbiased"].passed is None
    failed = outcomes["check_order_of_parameters_does_not_matter"]
    assert failed.passed is False and "NotImplementedError: soon" in str(failed) and str(failed).startswith("FAILED")


# What the named optimizers promise beyond the suite.


def test_svrg_follows_its_formula_with_mini_batches_and_full_closures() -> None:
    """Mini-batches are quadratics of their own; the full loss at a snapshot is the mean over four of them."""
    parts = [Quadratic(seed) for seed in range(4)]
    model = parts[0]
    for part in parts[1:]:
        part.bias, part.weight = model.bias, model.weight
    start = theta(model).numpy()
    optimizer = create_optimizer("zo-svrg", model, lr=0.02, queries=2, seed=5, snapshot_every=3)
    for step in range(8):
        optimizer.step(parts[step % 4], full=parts)
    follow = reference(
        "zo-svrg",
        lr=0.02,
        queries=2,
        snapshot_every=3,
        batch=lambda t: parts[t % 4].value,
        full=lambda x: float(np.mean([part.value(x) for part in parts])),
    )
    np.testing.assert_allclose(theta(model).numpy(), follow(None, None, start, 5, 8), rtol=0, atol=1e-8)


def test_svrgs_full_loss_is_the_mean_over_all_examples_whatever_the_mini_batches() -> None:
    """Of a linear loss the slopes are known: directions times the mean of all data, not of two unequal means."""
    data = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data[48:] += 10

    def slopes(*cuts: int) -> dict[int, float]:
        weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = create_optimizer("zo-svrg", [weight], lr=1.0, queries=3)
        parts = [
            Slice(lambda a=a, b=b: (data[a:b] @ weight).mean(), 0, b - a, b - a) for a, b in itertools.pairwise(cuts)
        ]
        optimizer.step(parts[0], parts)
        return optimizer._memory["full_slopes"]  # of theta = 0, where the step began

    whole = slopes(0, 50)
    assert slopes(0, 48, 50) == pytest.approx(whole, abs=1e-12) and slopes(0, 1, 2, 50) == pytest.approx(
        whole, abs=1e-12
    )


def test_svrg_takes_no_snapshot_of_a_loss_that_is_not_finite() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = create_optimizer("zo-svrg", [weight], lr=0.01, queries=2, seed=1)
    plain = nn.Parameter(torch.ones(3))
    spsa = create_optimizer("zo-sgd", [plain], lr=0.01, queries=2, seed=1)
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"zo-svrg: no direction of step \d has a finite loss on all of the training data"
        ):
            optimizer.step(lambda: weight.square().sum(), [lambda: weight.sum(), lambda: math.nan])
        spsa.step(lambda: plain.square().sum())
    assert torch.equal(weight, plain), "the estimate without a correction"
    with pytest.raises(TypeError, match="step: full=generator: expected a list of closures"):
        optimizer.step(lambda: weight.square().sum(), (f for f in [lambda: weight.sum()]))  # type: ignore[arg-type]


def linear_problem(examples: int) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, *(torch.randn(examples, width, generator=generator, dtype=torch.float64) for width in (4, 3))


def test_a_layer_called_by_keywords_has_directions_for_each_example_too() -> None:
    """Its weights are the second positional argument of torch's function only where people write it so."""

    def losses(call: Callable[..., torch.Tensor], model: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (call(x, model) - y).square().mean(1)

    found = []
    for call in (
        lambda x, m: nn.functional.linear(x, m.weight, m.bias),
        lambda x, m: nn.functional.linear(x, bias=m.bias, weight=m.weight),
        lambda x, m: nn.functional.linear(input=x, weight=m.weight, bias=m.bias),
    ):
        model, x, y = linear_problem(8)
        optimizer = create_optimizer("zo-per-example", model, lr=0.1, queries=2)
        optimizer.step(partial(losses, call, model, x, y))
        found.append(theta(model))
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_per_example_directions_follow_their_formula_example_by_example(queries: int, normalize: bool) -> None:
    """z_n = Z * (r_n s_n^T) for the weight, Z * signs for the bias; the step is the mean of g_n z_n, by brute force.

    With ``normalize`` of g_n over the standard deviation of g_1 ... g_N.
    """
    n, lr, eps, seed = 6, 0.1, 1e-3, 9
    model, x, y = linear_problem(n)
    weight, bias = (p.detach().numpy().copy() for p in (model.weight, model.bias))
    optimizer = create_optimizer(
        "zo-per-example", model, lr=lr, eps=eps, seed=seed, queries=queries, normalize=normalize
    )
    assert optimizer.per_example
    for step in range(4):
        optimizer.step(lambda: (model(x) - y).square().sum(1))
        change_w, change_b = np.zeros_like(weight), np.zeros_like(bias)
        for query in range(queries):
            base = signs(seed, step, query, 15)  # in the order of names: bias, then weight
            base_b, base_w = base[:3], base[3:].reshape(3, 4)
            own = signs(seed, step, query, n * (3 + 3 + 4), EXAMPLES).reshape(n, 10)  # of each: bias, rows, columns
            slopes, places = [], []
            for i in range(n):
                z_b, z_w = base_b * own[i, :3], base_w * np.outer(own[i, 3:6], own[i, 6:])

                sides = []
                for side in (eps, -eps):
                    output = (weight + side * z_w) @ x[i].numpy() + bias + side * z_b
                    sides.append(np.sum((output - y[i].numpy()) ** 2))
                slopes.append((sides[0] - sides[1]) / (2 * eps))
                places.append((z_w, z_b))
            spread = np.std(slopes) if normalize else 1.0
            for g, (z_w, z_b) in zip(slopes, places, strict=True):
                change_w += g / spread * z_w / (n * queries)
                change_b += g / spread * z_b / (n * queries)
        weight, bias = weight - lr * change_w, bias - lr * change_b
        np.testing.assert_allclose(model.weight.detach().numpy(), weight, rtol=0, atol=1e-8)
        np.testing.assert_allclose(model.bias.detach().numpy(), bias, rtol=0, atol=1e-8)


@pytest.mark.parametrize("sizes", [(6, 3, 6), (6, 1, 6), (1, 6)], ids=str)
def test_per_example_directions_take_mini_batches_of_any_size(sizes: tuple[int, ...]) -> None:
    """The last mini-batch of an epoch is smaller, at times a single example."""
    model, x, y = linear_problem(6)
    optimizer = create_optimizer("zo-per-example", model, lr=0.05)
    for size in sizes:
        before = theta(model)
        optimizer.step(lambda size=size: (model(x[:size]) - y[:size]).square().sum(1))
        assert not torch.equal(theta(model), before)


@pytest.mark.slow
def test_a_thousand_steps_of_length_zero_leave_every_bit() -> None:
    checks.check_parameters_are_restored_exactly(subject("zo-sgd", weight_decay=0.1, momentum=0.9), steps=1000)


def test_half_precision_parameters_are_restored_exactly() -> None:
    model, loss = regression(dtype=torch.bfloat16)
    optimizer, before = create_optimizer("zo-sgd", model, lr=0.0, eps=0.05, queries=2), theta(model)
    for _ in range(100):
        optimizer.step(loss)
    assert torch.equal(theta(model), before)


@pytest.mark.parametrize("name", ["zo-sgd", "zo-cge", "zo-adam-conserve"])
def test_a_saved_run_goes_on_in_an_optimizer_built_with_another_seed(name: str) -> None:
    """The seed is part of the state, and with it everything that is made of the seed: directions and the mask."""
    model, loss = regression()
    optimizer = create_optimizer(name, model, lr=0.01, seed=1, sparsity=0.5, queries=2)
    for _ in range(3):
        optimizer.step(loss)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in range(3):
        optimizer.step(loss)
    whole = theta(model)

    model, loss = regression()
    optimizer = create_optimizer(name, model, lr=0.01, seed=2, sparsity=0.5, queries=2)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for _ in range(3):
        optimizer.step(loss)
    assert torch.equal(theta(model), whole)


def test_batch_norm_is_trained_with_its_network() -> None:
    model, loss = regression(nn.BatchNorm1d(5))
    optimizer = create_optimizer("zo-sgd", model, lr=0.05, queries=4)
    start = float(loss().detach())
    for _ in range(50):
        optimizer.step(loss)
    assert float(loss().detach()) < 0.8 * start


@pytest.mark.slow
def test_the_example_in_the_document_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 40
    run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert (
        "FAILED check_parameters_are_restored_exactly" in run.stdout
        and "ok     check_estimate_is_unbiased" in run.stdout
    )


def test_the_document_names_every_check_and_the_variant_that_fails_it() -> None:
    text = DOCUMENT.read_text()
    for check, one, _ in BROKEN:
        assert f"`{check.__name__}`" in text and all(f"`{word}`" in text for word in one.name.split()[:1])
