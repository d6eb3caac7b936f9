"""Checks of all that a step must leave alone: parameters, random numbers, buffers, memory; and of resuming."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import itertools
import math
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zeroflow.optim.testing.checks.expectations import SEED, close, expect
from zeroflow.optim.testing.problems import Dropout, Loss, regression, theta
from zeroflow.optim.testing.subject import Stepper, Subject
from zeroflow.optim.testing.workers import Backwards, Twice, share


def check_parameters_are_restored_exactly(subject: Subject, steps: int = 100) -> None:
    """Parameters are bit-identical where nothing should move them: after steps of lr = 0, an exception, NaN losses.

    Catches restoration by arithmetic: theta + eps z - 2 eps z + eps z is not theta in floating point and drifts.
    """
    if subject.takes("lr"):
        model, loss = regression(dtype=torch.float32, per_example=subject.per_example)
        optimizer, before = subject.build(model, SEED, lr=0.0), theta(model)
        for _ in range(steps):
            optimizer.step(loss)
        drift = float((theta(model) - before).norm() / before.norm())
        expect(
            torch.equal(theta(model), before),
            f"{steps} steps of lr=0 moved the parameters by {drift:.2g} of their norm; expected no bit to change. "
            "Released code: restored by +eps, -2 eps, +eps instead of from a copy",
        )
    for what in ("raises", "returns NaN"):
        for call in itertools.count() if what == "raises" else (0,):
            model, loss = regression(dtype=torch.float32, per_example=subject.per_example)
            failing = _Failing(loss, call, what)
            optimizer, before = subject.build(model, SEED), theta(model)
            with contextlib.suppress(_Failure, ArithmeticError):
                optimizer.step(failing)
            if failing.calls <= call:
                break  # it makes no more evaluations than that
            expect(
                torch.equal(theta(model), before),
                f"after a closure that {what} at evaluation {call} of a step the parameters differ by "
                f"{float((theta(model) - before).norm()):.2g} (NaN: spoilt); expected no bit to change. Released "
                "code: restored by arithmetic, or not at all",
            )


def check_every_evaluation_sees_the_same_function(subject: Subject, steps: int = 3) -> None:
    """All evaluations of a step have the same dropout mask and draw the same mini-batch from torch's generator.

    Another step has others, and the caller's random numbers stay. Catches two sides of a difference that are two
    functions, and generators re-seeded under the caller's feet.
    """
    dropout = Dropout()
    model, loss = regression(dropout, per_example=subject.per_example)
    optimizer = subject.build(model, SEED)
    seen: list[tuple[float, ...]] = []

    def watched() -> Tensor:
        batch = torch.rand(4)
        answer = loss()
        seen.append((*batch.tolist(), *dropout.masks.pop().flatten().tolist()))
        return answer

    before: list[tuple[float, ...]] = []
    for number in range(steps):
        seen.clear()
        _seed_all(number)
        expected = _draw_all()
        _seed_all(number)
        optimizer.step(watched)
        expect(
            _draw_all() == expected,
            "a step moved the caller's random numbers (torch, NumPy or random); expected none moved",
        )
        different = sum(one != seen[0] for one in seen)
        expect(
            different == 0,
            f"{different} of {len(seen)} evaluations of step {number} had another dropout mask or mini-batch than the "
            "first; expected 0. Released code: dropout active and not seeded, or two mini-batches, in the two "
            "evaluations",
        )
        expect(
            seen[0] not in before,
            f"step {number} has the dropout mask of an earlier step; expected a new one each step",
        )
        before.append(seen[0])


def check_batch_statistics_move_once_a_step(subject: Subject, steps: int = 3) -> None:
    """Batch norm's running statistics are the same in all evaluations and move as by one pass at theta a step.

    Catches buffers that see each mini-batch 2q times at perturbed parameters, which makes evaluations different
    functions.
    """
    between = nn.BatchNorm1d(5)
    model, loss = regression(between)
    optimizer, means = subject.build(model, SEED), []

    def watched() -> Tensor:
        assert between.running_mean is not None
        means.append(between.running_mean.clone())
        return loss()

    for number in range(steps):
        twin, twin_loss = regression(copy.deepcopy(between))
        twin.load_state_dict(model.state_dict())
        twin_loss()
        expected = dict(twin.get_submodule("between").named_buffers())
        means.clear()
        before = theta(model)
        optimizer.step(watched)
        different = sum(not torch.equal(mean, means[0]) for mean in means)
        expect(
            different == 0,
            f"{different} of {len(means)} evaluations of step {number} had other running statistics than the first; "
            "expected 0. Released code: batch norm active during the evaluations",
        )
        for name, buffer in between.named_buffers():
            close(buffer, expected[name], f"batch norm's {name} after step {number}", "one pass at theta", 1e-12)
        expect(not torch.equal(theta(model), before), f"step {number} of a network with batch norm moved no parameter")


def check_results_do_not_depend_on_who_evaluates(subject: Subject, steps: int = 3) -> None:
    """The same bits with 1, 2, 3 workers that share the queries, in reverse order, with all evaluations made twice.

    Workers have a model and an optimizer each and exchange losses only. Catches seeds made as base + worker.
    """

    def train(executor: object) -> Tensor:
        model, loss = regression(Dropout(), per_example=subject.per_example)
        options: dict[str, Any] = {"queries": 5} if subject.takes("queries") else {}
        optimizer = subject.build(model, SEED, executor=executor, **options)
        for _ in range(steps):
            optimizer.step(loss)
        return theta(model)

    alone = train(None)
    for how, ends in (
        ("evaluations in reverse order", [train(Backwards())]),
        ("every evaluation made twice", [train(Twice())]),
        *((f"{size} workers", _undisturbed(functools.partial(share, size, train))) for size in (1, 2, 3)),
    ):
        for rank, end in enumerate(ends):
            expect(
                torch.equal(end, alone),
                f"with {how} the parameters after {steps} steps (of worker {rank}) differ by "
                f"{float((end - alone).norm()):.2g} from those of one process; expected the same bits. Released code: "
                "seeds made as base + worker",
            )


def check_order_of_parameters_does_not_matter(subject: Subject, steps: int = 3) -> None:
    """A module whose parts are registered the other way around is trained to the same bits, parameter by parameter.

    Catches noise drawn in the order of ``parameters()``: a refactoring of the model then changes the run.
    """
    ends = []
    for turned in (False, True):
        model, loss = regression(turned=turned, per_example=subject.per_example)
        optimizer = subject.build(model, SEED)
        for _ in range(steps):
            optimizer.step(loss)
        ends.append(theta(model))
    expect(
        torch.equal(*ends),
        f"registering the module's parts in another order changed the parameters after {steps} steps by "
        f"{float((ends[0] - ends[1]).norm()):.2g}; expected the same bits. Released code: noise drawn in the order of "
        "parameters()",
    )


def check_memory_is_that_of_a_forward_pass(subject: Subject) -> None:
    """No graph, no ``param.grad``, no noise kept, and with 16 queries the peak memory of one (unless it is a population's).

    After steps ``Subject.kept`` vectors of the parameters' size are left besides the model, in all that torch and
    Python allocate. Catches stored noise (one vector a query) and evaluations with gradients on.
    """
    peaks: list[float] = []
    assert subject.kept is not None, "needs the number of vectors that it keeps"
    for queries in (1, 16) if subject.takes("queries") and not subject.population else (subject.queries,):
        options = {"queries": queries} if subject.takes("queries") else {}

        def train(options: dict[str, int] = options) -> tuple[nn.Module, Loss, Stepper]:
            # Wide enough that a vector of all parameters outweighs everything else.
            model, loss = regression(dtype=torch.float32, inputs=100, hidden=500, per_example=subject.per_example)
            optimizer = subject.build(model, SEED, **options)
            optimizer.step(loss)
            optimizer.step(loss)
            return model, loss, optimizer

        train()  # what is only imported or made once is no memory of an optimizer's
        (model, loss, optimizer), left, _ = _allocated(train)
        vector = sum(p.numel() * p.element_size() for p in model.parameters())
        kept = left / vector - 1
        expect(
            kept <= subject.kept + 0.5,
            f"{kept:.2f} vectors of the parameters' size stay besides the model after two steps of {queries} queries; "
            f"expected {subject.kept}. A master copy of the parameters, moments, a snapshot, a mask are one each (two where they "
            "are float64): count them in Subject.kept. Released code: noise stored instead of regenerated",
        )
        saved = _Saved()
        with saved:
            _, _, peak = _allocated(functools.partial(optimizer.step, loss))
        expect(
            saved.count == 0,
            f"a step saved {saved.count} tensors for a backward pass; expected none: evaluate under torch.no_grad()",
        )
        expect(all(p.grad is None for p in model.parameters()), "a step left something in param.grad; expected None")
        peaks.append(peak / vector)
    expect(
        peaks[-1] - peaks[0] <= 3,
        f"the peak of a step grows from {peaks[0]:.1f} vectors of the parameters' size with 1 query to "
        f"{peaks[-1]:.1f} with 16; expected the same within 3. Released code: the noise of all queries stored, or "
        "queries evaluated in one batch",
    )


def check_resumes_bit_for_bit(subject: Subject, steps: int = 7) -> None:
    """Saved to a file and loaded (``weights_only=True``) at any step, training ends in the same bits as in one go.

    Catches state outside ``state_dict()``: counters that key the noise, snapshots, history, moments.
    """

    def start() -> tuple[nn.Module, Loss, Any]:
        model, loss = regression(Dropout(), per_example=subject.per_example)
        return model, loss, subject.build(model, SEED)

    model, loss, optimizer = start()
    saved = []
    for _ in range(steps):
        saved.append(_through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
        optimizer.step(loss)
    whole = theta(model)
    for number, state in enumerate(saved):
        model, loss, optimizer = start()
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for _ in range(number, steps):
            optimizer.step(loss)
        expect(
            torch.equal(theta(model), whole),
            f"resumed after step {number}, the parameters after step {steps} differ by "
            f"{float((theta(model) - whole).norm()):.2g} from those of a run in one go; expected the same bits. "
            "Something that matters is not in state_dict()",
        )


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the tensors that autograd keeps for a backward pass."""

    def __init__(self) -> None:
        self.count = 0
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        self.count += 1
        return tensor


class _Failure(Exception):
    """Raised by a closure on purpose."""


class _Failing:
    """A closure that goes wrong at one evaluation, or in NaN's case from it on."""

    def __init__(self, loss: Loss, at: int, what: str) -> None:
        self.loss, self.at, self.what, self.calls = loss, at, what, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls <= self.at:
            return self.loss()
        if self.what == "raises":
            raise _Failure
        return self.loss() * math.nan


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _draw_all() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.random()), random.random()


def _undisturbed(work: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Workers that take turns in one process leave its random numbers somewhere; put them back."""
    with torch.random.fork_rng(devices=[]):
        return work()


def _through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _allocated(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, bytes that ``work`` leaves allocated, peak bytes meanwhile), tensors and everything of Python's."""
    gc.freeze()  # what is there already need not be searched for garbage
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profiler:
        tracemalloc.start()
        try:
            result = work()
            gc.collect()
            python_left, python_peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.unfreeze()
    live = peak = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return result, live + python_left, peak + python_peak
