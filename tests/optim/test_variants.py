"""Each check of the conformance suite fails on code that is wrong on purpose, and lets pass what is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from places import ROOT
from references import reference
from torch import nn
from variants import (
    AnotherMiniBatchForEachSide,
    BatchNormSeesEveryEvaluation,
    BatchNormUndoesTheStep,
    BuildsAGraph,
    DecaysWhatIsMasked,
    ForgetsItsCounter,
    ForgetsToDivideByQueries,
    FreshDropoutMasks,
    HoldsTheNoiseOfAStep,
    LeavesGradients,
    Masked,
    MaskFromNormals,
    MaskOnPerturbationOnly,
    MaskOnUpdateOnly,
    Mezo,
    MovesOnNaN,
    NoiseInOrderOfRegistration,
    OneDirectionForAllQueries,
    OneDropoutMaskForEver,
    OtherNoiseForEachTensor,
    RestoresByArithmetic,
    RestoresOnlyWhenAllGoesWell,
    SeedsAreSums,
    SeedsFromBaseAndWorker,
    SeedsInOrderOfEvaluation,
    SeedStandsStill,
    SeedsTheCallersGenerator,
    Sphere,
    SphereWithoutItsFactor,
    StatisticsNeverMove,
    StoresItsNoise,
    StrayFactorMu,
    mezo,
)

from zeroflow.optim.testing import CHECKS, ConformanceError, Subject, run_conformance, subject

DOCUMENT = ROOT / "docs" / "conformance.md"


# Somebody else's optimizer: right in everything, and made wrong by one change at a time.


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

(
    unbiased,
    along,
    fresh,
    masks,
    snapshots,
    keeping,
    restored,
    same,
    batch_norm,
    workers,
    order,
    formula,
    memory,
    resumes,
) = CHECKS

BROKEN = [
    (along, mezo(OtherNoiseForEachTensor), "last.bias.*re-seeds|re-seeds for each tensor"),
    (unbiased, mezo(OtherNoiseForEachTensor), "gradient"),
    (fresh, mezo(SeedStandsStill), "does not advance"),
    (fresh, mezo(partial(OneDirectionForAllQueries, queries=4), queries=4), "along one direction for 4 queries"),
    (fresh, mezo(SeedsAreSums), "sum of seed, step and query"),
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
    (mezo(Sphere, reference=reference("zo-rge", distribution="sphere")), [unbiased, along, fresh, formula]),
    (mezo(partial(Svrg, queries=2), queries=2, snapshot=True), [unbiased, along, snapshots]),
    (mezo(AdamKeepsBest), [keeping]),
    (mezo(partial(AdamKeepsBest, lr=0.5), **CONSERVE), [formula]),
    (mezo(Adamm, **ADAMM), [formula]),
]


@pytest.mark.parametrize("queries", [8, 32])
def test_coordinates_may_come_again(queries: int) -> None:
    fresh(subject("zo-scd", queries=queries))


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


# The document


def test_the_document_names_every_check_and_the_variant_that_fails_it() -> None:
    text = DOCUMENT.read_text()
    for check, one, _ in BROKEN:
        assert f"`{check.__name__}`" in text and all(f"`{word}`" in text for word in one.name.split()[:1])
