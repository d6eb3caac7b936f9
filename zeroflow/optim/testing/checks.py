"""The checks: each takes a ``Subject`` and raises ``ConformanceError`` where it does not do what it claims."""

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
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zeroflow.optim.testing.problems import Dropout, Loss, Places, Quadratic, named, regression, theta, true_gradient
from zeroflow.optim.testing.subject import ConformanceError, Stepper, Subject
from zeroflow.optim.testing.workers import Backwards, Twice, share

SEED = 11


def check_estimate_is_unbiased(subject: Subject, samples: int = 200) -> None:
    """The mean of many first steps is -lr * gradient, in each component and along it, within 5 standard errors.

    E[g z] = gradient for z with E[z z^T] = I. Catches wrong factors: no 1/q, a stray mu, no d on the sphere, one
    direction for all tensors where they should differ.
    """
    assert subject.lr, "needs the learning rate"
    steps = []
    for seed in range(samples):
        model, loss = regression(per_example=subject.per_example)
        before = theta(model)
        subject.build(model, seed).step(loss)
        steps.append((before - theta(model)) / subject.lr)
    model, loss = regression()
    gradient, found = true_gradient(model, loss), torch.stack(steps)
    # Finite differences are off by about eps; that is no defect.
    allowed = 1e-2 * float(gradient.abs().max())
    error = 5 * found.std(0) / math.sqrt(samples) + allowed
    along = found @ gradient / (gradient @ gradient)
    tolerance = 5 * float(along.std()) / math.sqrt(samples) + 1e-2
    _expect(
        abs(float(along.mean()) - 1) <= tolerance,
        f"the mean of {samples} steps, over -lr, has {float(along.mean()):.4g} times the gradient's length along the "
        f"gradient; expected 1 +- {tolerance:.2g}. Released code: 1/q forgotten, a stray factor mu, the sphere's "
        "factor d lost",
    )
    worst = int(((found.mean(0) - gradient).abs() - error).argmax())
    _expect(
        bool(((found.mean(0) - gradient).abs() <= error).all()),
        f"component {worst} of the mean of {samples} steps, over -lr, is {float(found.mean(0)[worst]):.4g}; the "
        f"gradient's is {float(gradient[worst]):.4g} +- {float(error[worst]):.2g}. Released code: update and "
        "perturbation of a tensor differ",
    )


def check_update_lies_along_perturbations(subject: Subject) -> None:
    """The first step is one combination of the perturbations for all tensors: step = sum_i c_i (place_i - theta).

    With one query that is a cosine of +-1 on every tensor. Perturbations span as many dimensions as there are queries.
    Catches an update whose noise is re-seeded for each tensor (cosine about 0 after the first), and evaluations along
    other directions.
    """
    model, loss = regression()
    optimizer, places = subject.build(model, SEED), Places(model, loss)
    optimizer.step(places)
    seen, step = places.matrix(), theta(model) - places.origin
    _expect(
        len(seen) > 0,
        "no perturbation of the module's parameters was seen inside the closure; it must evaluate the module it was "
        "given",
    )
    _expect(bool(step.any()), "the first step moved nothing")
    rank = int(torch.linalg.matrix_rank(seen / seen.norm(dim=1, keepdim=True), rtol=1e-5))
    _expect(
        rank <= subject.queries,
        f"places evaluated span {rank} dimensions, expected at most {subject.queries}, one a query. Released code: "
        "the two sides of a query, or SVRG's two estimates, with different seeds",
    )
    coefficients = torch.linalg.lstsq(seen.T, step[:, None], driver="gelsd").solution[:, 0]
    rest = step - seen.T @ coefficients
    for name, part in _slices(model):
        off = float(rest[part].norm() / step.norm())
        sides = seen[:, part] @ step[part] / (seen[:, part].norm(dim=1) * step[part].norm()).clamp_min(1e-300)
        _expect(
            off < 1e-5,
            f"the step of {name} is not made of its perturbations: {off:.2g} of the step is outside their span "
            f"(expected < 1e-5), its largest cosine to one is {float(sides.abs().max()):.3f}. Released code: the "
            "update re-seeds for each tensor",
        )


def check_mask_holds_the_same_components_still_everywhere(subject: Subject, steps: int = 5) -> None:
    """Of sparsity s a share s of the components never moves, neither in perturbations nor in updates; the same ones.

    The share is binomial: s +- 5 sqrt(s (1 - s) / d). Catches ``normal() < ratio`` as a mask (s = .1 holds 54 % still,
    s = .9 82 %), a mask on perturbations only, and weight decay or momentum that moves masked components.
    """
    s = subject.sparsity
    model, loss = regression(inputs=20, hidden=50, per_example=subject.per_example)
    optimizer, places = subject.build(model, SEED), Places(model, loss)
    updated = perturbed = torch.zeros_like(places.origin, dtype=torch.bool)
    for _ in range(steps):
        places.watch()
        optimizer.step(loss if subject.per_example else places)
        updated = updated | (theta(model) != places.origin)
        for displacement in places.displacements:
            perturbed = perturbed | (displacement != 0)
    size, still = len(updated), float((~updated).double().mean())
    bound = 5 * math.sqrt(s * (1 - s) / size) + 1 / size
    _expect(
        abs(still - s) <= bound,
        f"sparsity {s}: {still:.1%} of {size} components did not move in {steps} steps, expected {s:.1%} +- "
        f"{bound:.1%}. Released code: normal() < ratio as a Bernoulli mask; a mask on the perturbation but not on the "
        "update (or on momentum, weight decay)",
    )
    if subject.forward_only and not subject.per_example:
        different = int((updated != perturbed).sum())
        _expect(
            different == 0,
            f"sparsity {s}: {different} of {size} components are still in the perturbations but not in the updates, "
            "or the other way around; expected 0. Released code: the mask applied to one of the two only",
        )


def check_snapshot_is_a_copy_and_both_estimates_share_directions(subject: Subject, steps: int = 3) -> None:
    """SVRG: step = -lr (e(theta; u) - e(snapshot; u) + e(snapshot; u')), with e from the perturbations that were seen.

    e(x; u) = mean over u of (L(x + u) - L(x - u)) / 2 eps^2 * u, u being displacements, or the least vector of which these
    are the differences, where ``subject.span``; the snapshot is where the first step was made. Catches a snapshot that aliases the live parameters and different directions in the two estimates.
    """
    assert subject.lr and subject.eps, "needs lr and eps"
    lr, eps = subject.lr, subject.eps
    model = Quadratic()
    optimizer, places = subject.build(model, SEED), Places(model, model)

    def estimate(at: Tensor, directions: list[Tensor]) -> Tensor:
        slopes = [model.value((at + u).numpy()) - model.value((at - u).numpy()) for u in directions]
        if subject.span:
            return torch.linalg.pinv(torch.stack(directions)) @ torch.tensor(slopes, dtype=torch.float64) / 2
        parts = [slope / (2 * eps**2) * u for slope, u in zip(slopes, directions, strict=True)]
        return torch.stack(parts).mean(0)

    snapshot = places.origin
    optimizer.step(places)
    at_snapshot = estimate(snapshot, _lines(places.matrix()))
    for number in range(1, steps):
        places.watch()
        here, away = places.origin, places.origin - snapshot
        optimizer.step(places)
        seen = places.matrix()
        near = seen.norm(dim=1) <= (seen + away).norm(dim=1)
        _expect(
            bool(near.any()) and not bool(near.all()),
            f"step {number} evaluated {int(near.sum())} places around theta and {int((~near).sum())} around the "
            "snapshot; expected some of each. Released code: the snapshot aliases the live parameters",
        )
        ours, theirs = _lines(seen[near]), _lines(seen[~near] + away)
        shared = all(min(min((u - v).norm(), (u + v).norm()) for v in theirs) < 1e-6 * u.norm() for u in ours)
        _expect(
            shared and len(ours) == len(theirs) == subject.queries,
            f"step {number}: {len(ours)} directions around theta and {len(theirs)} around the snapshot are not the "
            f"same {subject.queries}. Released code: SVRG's two estimates use different seeds",
        )
        expected = -lr * (estimate(here, ours) - estimate(snapshot, ours) + at_snapshot)
        _close(theta(model) - here, expected, f"step {number}", "the sum of SVRG's three estimates", 1e-6)


def check_keeps_the_best_and_forgets_rejected_moments(subject: Subject, steps: int = 40) -> None:
    """The loss on one mini-batch never rises, and a step that is rejected leaves no trace in the moments.

    theta' = argmin of L over theta, theta - step, theta + step. Catches a roll-back that is not the inverse of the
    step, and Adam's moments moving with rejected steps.
    """
    model, loss = regression(per_example=subject.per_example)
    # Far too long steps, most of which make it worse.
    optimizer = subject.build(model, SEED, lr=5.0) if subject.takes("lr") else subject.build(model, SEED)
    last, rejected, moments = float(loss().detach().mean()), 0, {}
    for number in range(steps):
        before, moments = theta(model), _remembered(optimizer)
        optimizer.step(loss)
        now = float(loss().detach().mean())
        _expect(
            now <= last,
            f"step {number} raised the loss on the same mini-batch from {last:.17g} to {now:.17g}; expected the best "
            "of the candidates, theta included. Released code: a roll-back that is not the inverse of the step",
        )
        if torch.equal(theta(model), before):
            rejected += 1
            _expect(
                _same(_remembered(optimizer), moments),
                f"step {number} was rejected but moved the rule's moments. Released code: Adam's moments are not "
                "rolled back",
            )
        last = now
    _expect(
        rejected > 0 or not moments,
        f"none of {steps} steps was rejected: nothing is known; build it with a larger learning rate",
    )


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
        _expect(
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
            _expect(
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
        _expect(
            _draw_all() == expected,
            "a step moved the caller's random numbers (torch, NumPy or random); expected none moved",
        )
        different = sum(one != seen[0] for one in seen)
        _expect(
            different == 0,
            f"{different} of {len(seen)} evaluations of step {number} had another dropout mask or mini-batch than the "
            "first; expected 0. Released code: dropout active and not seeded, or two mini-batches, in the two "
            "evaluations",
        )
        _expect(
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
        _expect(
            different == 0,
            f"{different} of {len(means)} evaluations of step {number} had other running statistics than the first; "
            "expected 0. Released code: batch norm active during the evaluations",
        )
        for name, buffer in between.named_buffers():
            _close(buffer, expected[name], f"batch norm's {name} after step {number}", "one pass at theta", 1e-12)
        _expect(not torch.equal(theta(model), before), f"step {number} of a network with batch norm moved no parameter")


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
            _expect(
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
    _expect(
        torch.equal(*ends),
        f"registering the module's parts in another order changed the parameters after {steps} steps by "
        f"{float((ends[0] - ends[1]).norm()):.2g}; expected the same bits. Released code: noise drawn in the order of "
        "parameters()",
    )


def check_trajectory_follows_the_formula(subject: Subject, steps: int = 12) -> None:
    """On a quadratic all parameters after 1, 2, ... steps are those of the subject's NumPy reference.

    Catches what only shows in numbers: sqrt(v) for sqrt(vhat), a stray factor mu, moments that are not rolled back.
    """
    assert subject.reference is not None, "needs a reference"
    model = Quadratic()
    start, optimizer = theta(model).numpy(), subject.build(model, SEED)
    for number in range(1, steps + 1):
        optimizer.step(model)
        expected = subject.reference(model.value, model.gradient, start.copy(), SEED, number)
        # Rounding of the losses is divided by eps, or by r^2 in second differences.
        _close(theta(model), torch.tensor(expected), f"theta after step {number}", "the reference", 1e-7)


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
        _expect(
            kept <= subject.kept + 0.5,
            f"{kept:.2f} vectors of the parameters' size stay besides the model after two steps of {queries} queries; "
            f"expected {subject.kept}. A master copy of the parameters, moments, a snapshot, a mask are one each (two where they "
            "are float64): count them in Subject.kept. Released code: noise stored instead of regenerated",
        )
        saved = _Saved()
        with saved:
            _, _, peak = _allocated(functools.partial(optimizer.step, loss))
        _expect(
            saved.count == 0,
            f"a step saved {saved.count} tensors for a backward pass; expected none: evaluate under torch.no_grad()",
        )
        _expect(all(p.grad is None for p in model.parameters()), "a step left something in param.grad; expected None")
        peaks.append(peak / vector)
    _expect(
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
        _expect(
            torch.equal(theta(model), whole),
            f"resumed after step {number}, the parameters after step {steps} differ by "
            f"{float((theta(model) - whole).norm()):.2g} from those of a run in one go; expected the same bits. "
            "Something that matters is not in state_dict()",
        )


# What checks are made of.


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


def _expect(right: bool, message: str) -> None:
    if not right:
        raise ConformanceError(message)


def _close(found: Tensor, expected: Tensor, what: str, source: str, tolerance: float) -> None:
    off = float((found.double() - expected).abs().max() / expected.double().abs().max().clamp_min(1e-12))
    _expect(
        off <= tolerance,
        f"{what} differs from {source} by {off:.3g} of its largest component; expected at most {tolerance:g}. "
        f"Found {_short(found)}, expected {_short(expected)}",
    )


def _short(vector: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in vector.reshape(-1).tolist()[:8]) + "]"


def _slices(model: nn.Module) -> Iterable[tuple[str, slice]]:
    first = 0
    for name, parameter in named(model):
        yield name, slice(first, first + parameter.numel())
        first += parameter.numel()


def _lines(displacements: Tensor) -> list[Tensor]:
    """Displacements without those that repeat or are the other side of one before."""
    lines: list[Tensor] = []
    for u in displacements:
        if all(min((u - v).norm(), (u + v).norm()) > 1e-6 * u.norm() for v in lines):
            lines.append(u)
    return lines


def _remembered(optimizer: Any) -> Any:
    """A copy of the moments, as ``state_dict`` shows them; empty where there is none."""
    return copy.deepcopy(optimizer.state_dict().get("state", {})) if hasattr(optimizer, "state_dict") else {}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


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
