"""Checks of what a step does: its estimate, its direction, its mask, its snapshot, its rule."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.optim.testing.checks.expectations import SEED, close, expect
from zeroflow.optim.testing.problems import Places, Quadratic, named, regression, theta, true_gradient
from zeroflow.optim.testing.subject import Subject


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
    expect(
        abs(float(along.mean()) - 1) <= tolerance,
        f"the mean of {samples} steps, over -lr, has {float(along.mean()):.4g} times the gradient's length along the "
        f"gradient; expected 1 +- {tolerance:.2g}. Released code: 1/q forgotten, a stray factor mu, the sphere's "
        "factor d lost",
    )
    worst = int(((found.mean(0) - gradient).abs() - error).argmax())
    expect(
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
    expect(
        len(seen) > 0,
        "no perturbation of the module's parameters was seen inside the closure; it must evaluate the module it was "
        "given",
    )
    expect(bool(step.any()), "the first step moved nothing")
    rank = int(torch.linalg.matrix_rank(seen / seen.norm(dim=1, keepdim=True), rtol=1e-5))
    expect(
        rank <= subject.queries,
        f"places evaluated span {rank} dimensions, expected at most {subject.queries}, one a query. Released code: "
        "the two sides of a query, or SVRG's two estimates, with different seeds",
    )
    coefficients = torch.linalg.lstsq(seen.T, step[:, None], driver="gelsd").solution[:, 0]
    rest = step - seen.T @ coefficients
    for name, part in _slices(model):
        off = float(rest[part].norm() / step.norm())
        sides = seen[:, part] @ step[part] / (seen[:, part].norm(dim=1) * step[part].norm()).clamp_min(1e-300)
        expect(
            off < 1e-5,
            f"the step of {name} is not made of its perturbations: {off:.2g} of the step is outside their span "
            f"(expected < 1e-5), its largest cosine to one is {float(sides.abs().max()):.3f}. Released code: the "
            "update re-seeds for each tensor",
        )


def check_directions_are_new_for_each_query_step_and_seed(subject: Subject, steps: int = 3) -> None:
    """Directions of all queries, steps and neighbouring seeds differ: of a thousand components each, no cosine is beyond one half.

    Independent ones have cosines of about 1 / sqrt(d) = 0.03. Those of a few components (coordinates, single layers) are not
    compared: they do meet. Catches a seed that does not advance, one direction for all
    queries, and seeds that are sums: ``seed + step`` gives the next step the direction that the next seed has now.
    """
    found: dict[str, Tensor] = {}
    for seed in (SEED, SEED + 1):
        model, loss = regression(inputs=20, hidden=50)
        optimizer, places = subject.build(model, seed), Places(model, loss)
        for step in range(steps):
            places.watch()
            optimizer.step(places)
            seen = places.matrix()
            if not len(seen) or float((seen != 0).double().mean()) < 0.5:
                return
            kept = _apart(seen)
            expect(
                len(kept) > 1 or subject.queries < 3,
                f"places evaluated in step {step} lie along one direction for {subject.queries} queries. Released code: the same seed "
                "for all queries",
            )
            for number, direction in enumerate(kept):
                where = f"direction {number} of step {step}, seed {seed}"
                for other, known in found.items():
                    cosine = abs(float(direction @ known))
                    expect(
                        other.endswith(f"step {step}, seed {seed}") or cosine < 0.5,
                        f"{where}, is {other} again (cosine {cosine:.3f}); expected new ones. Released code: a seed that does "
                        "not advance, or that is a sum of seed, step and query",
                    )
                found[where] = direction


def _apart(seen: Tensor) -> list[Tensor]:
    """Unit vectors of displacements ``[m, d]``, without those that are another one's or its opposite."""
    kept: list[Tensor] = []
    for one in seen / seen.norm(dim=1, keepdim=True):
        if all(abs(float(one @ other)) < 0.999 for other in kept):
            kept.append(one)
    return kept


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
    expect(
        abs(still - s) <= bound,
        f"sparsity {s}: {still:.1%} of {size} components did not move in {steps} steps, expected {s:.1%} +- "
        f"{bound:.1%}. Released code: normal() < ratio as a Bernoulli mask; a mask on the perturbation but not on the "
        "update (or on momentum, weight decay)",
    )
    if subject.forward_only and not subject.per_example:
        different = int((updated != perturbed).sum())
        expect(
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
        expect(
            bool(near.any()) and not bool(near.all()),
            f"step {number} evaluated {int(near.sum())} places around theta and {int((~near).sum())} around the "
            "snapshot; expected some of each. Released code: the snapshot aliases the live parameters",
        )
        ours, theirs = _lines(seen[near]), _lines(seen[~near] + away)
        shared = all(min(min((u - v).norm(), (u + v).norm()) for v in theirs) < 1e-6 * u.norm() for u in ours)
        expect(
            shared and len(ours) == len(theirs) == subject.queries,
            f"step {number}: {len(ours)} directions around theta and {len(theirs)} around the snapshot are not the "
            f"same {subject.queries}. Released code: SVRG's two estimates use different seeds",
        )
        expected = -lr * (estimate(here, ours) - estimate(snapshot, ours) + at_snapshot)
        close(theta(model) - here, expected, f"step {number}", "the sum of SVRG's three estimates", 1e-6)


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
        expect(
            now <= last,
            f"step {number} raised the loss on the same mini-batch from {last:.17g} to {now:.17g}; expected the best "
            "of the candidates, theta included. Released code: a roll-back that is not the inverse of the step",
        )
        if torch.equal(theta(model), before):
            rejected += 1
            expect(
                _same(_remembered(optimizer), moments),
                f"step {number} was rejected but moved the rule's moments. Released code: Adam's moments are not "
                "rolled back",
            )
        last = now
    expect(
        rejected > 0 or not moments,
        f"none of {steps} steps was rejected: nothing is known; build it with a larger learning rate",
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
        close(theta(model), torch.tensor(expected), f"theta after step {number}", "the reference", 1e-7)


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
