"""Why training does not move: what the losses say about the estimate, its eps and its learning rate.

At the start of the first task a few directions are looked along, on a few mini-batches. With slopes ``s = u . g`` along standard
normal directions ``u``, the mean of ``s ** 2`` is the gradient's squared length, its spread over mini-batches their noise, and the
mean of second differences the trace of the Hessian. From these follow how near an estimate of q queries is to the gradient
(Nesterov & Spokoiny, "Random gradient-free minimization of convex functions", 2017), and which steps of plain SGD lower the
loss in expectation: with the estimate's second moment ``|g|^2 (d + q + 1) / q``, curvature takes back what a step gains where
``lr`` exceeds ``2 q |g|^2 / (|g_b|^2 tr H)``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zeroflow.errors import ConfigError
from zeroflow.methods import MiniBatch
from zeroflow.models.access import accesses
from zeroflow.optim import LocalExecutor, optimizers
from zeroflow.optim.directions import Identity
from zeroflow.optim.estimators import RGE, SPSA, ForwardGradient
from zeroflow.optim.estimators.estimator import RandomSlopes
from zeroflow.optim.factory import OptimizerInfo
from zeroflow.optim.updates import Plain
from zeroflow.trial import randomness
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.placement import Placement, limited_threads
from zeroflow.trial.trial import Trial

EPS = 1e-3
"""Looked at for optimizers without an eps of their own."""

_HARMLESS = frozenset(("max_skipped", "check_precision"))
"""Options that change no step."""

_DISAGREE = 0.5
"""Relative difference of slopes from which on one of two eps is wrong."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        parameters: d, values trained in the first task.
        queries: directions of a step.
        exact: whether steps follow the exact gradient of a mini-batch; then nothing limits lr here, and no cost is given.
        eps: size of a displacement.
        loss: at the start, mean over the mini-batches.
        gradient: its length, from slopes along random directions; 0: below the noise of mini-batches.
        batch_noise: length of what a mini-batch's gradient has beside it.
        cosine: expected between an estimate of one step and the gradient.
        curvature: trace of the Hessian.
        smaller: relative difference between slopes at eps and at a tenth of it.
        larger: relative difference between slopes at eps and at ten times eps.
        eps_is: ``"fine"``, ``"in rounding noise"`` or ``"beyond curvature"``.
        largest_lr: of plain SGD steps that lower the loss in expectation, if its curvature is the same in all directions: 2 q d /
            (q + d + 1) |gradient|^2 / (curvature (|gradient|^2 + batch_noise^2)), d = ``parameters``; None: no limit was seen.
        passes_for_one_percent: forward passes that lower the loss by 1 % at half of it; None: no way was seen.
        fallen: stored loss of the first tenth of the first task's steps minus that of the last, over its noise; None: there are
            too few steps.
    """

    parameters: int
    queries: int
    exact: bool
    eps: float
    loss: float
    gradient: float
    batch_noise: float
    cosine: float
    curvature: float
    smaller: float
    larger: float
    eps_is: str
    largest_lr: float | None
    passes_for_one_percent: float | None
    fallen: float | None

    def sentences(self, config: TrialConfig) -> list[str]:
        """The same in words, with what to do."""
        said = []
        if self.fallen is not None:
            size = f"{abs(self.fallen):.1f} standard errors {'down' if self.fallen >= 0 else 'up'}"
            moves = "falls" if self.fallen > 2 else "rises" if self.fallen < -2 else "does not move beyond its noise"
            said.append(f"Stored steps: the loss of the first task {moves} ({size}).")
        said.append(
            f"{self._estimate(config)}; its cosine with the gradient is about {self.cosine:.3g}. "
            f"The gradient's length is {self.gradient:.3g}, the mini-batches' noise {self.batch_noise:.3g}."
        )
        if self.exact:
            return [*said, "eps, learning rate and cost: what is measured here limits estimates, not exact gradients."]
        what = {
            "fine": "a tenth and ten times of it give the same slopes nearly enough",
            "in rounding noise": "differences of losses drown in rounding; take ten times as much"
            + (", or float64" if config.dtype != "float64" else ""),
            "beyond curvature": "a tenth of it gives other slopes; take that",
        }[self.eps_is]
        if optimizers.get(str(config.optimizer)).estimator.uses_eps:
            said.append(f"eps={self.eps:g} is {self.eps_is}: {what}.")
        if self.largest_lr is None:
            said.append("Learning rate: no curvature was seen that limits it.")
        else:
            own = f"; this cell has {config.lr:g}" if config.lr and _plain(config) else ""
            said.append(
                f"Learning rate: steps of plain SGD lower the loss in expectation below {self.largest_lr:.3g}, if "
                f"it bends alike in all directions{own}."
            )
        if self.largest_lr is None and self.gradient:
            said.append("Cost: without curvature none can be given.")
        elif self.passes_for_one_percent is None:
            said.append(
                "Cost: no gradient stands out of the noise; more samples in a mini-batch or fewer values may help."
            )
        else:
            said.append(
                f"Cost: lowering the loss by 1 % takes about {self.passes_for_one_percent:,.0f} forward passes from the start, at "
                "the best learning rate; fewer trained values take fewer."
            )
        return said

    def _estimate(self, config: TrialConfig) -> str:
        if self.exact:
            return "Estimate: the gradient of a mini-batch"
        alike = isinstance(optimizers.get(str(config.optimizer)).estimator, RandomSlopes)
        who = "Estimate" if alike else f"{config.optimizer} is not looked at; zo-sgd in its place"
        return f"{who}: {self.queries} direction(s) for {self.parameters:,} values"


def _plain(config: TrialConfig) -> bool:
    """Whether a cell's steps are those of plain SGD along the estimate that was looked at, which the bound on lr holds for."""
    info = optimizers.get(str(config.optimizer))
    changed = {name for name, value in config.optimizer_options.items() if value != info.options.get(name)}
    return (
        type(info.estimator) in (SPSA, RGE, ForwardGradient)  # others of their kind take coordinates or low ranks
        and info.rule is torch.optim.SGD
        and (type(info.direction), type(info.update)) == (Identity, Plain)
        and not config.hybrid_epochs
        and changed <= _HARMLESS
    )


def _looked_at(name: str) -> OptimizerInfo:
    """The optimizer whose estimate is looked at: the one of the name, or ``zo-sgd`` where its slopes are of another kind."""
    info = optimizers.get(name)
    return info if isinstance(info.estimator, RandomSlopes) else optimizers.get("zo-sgd")


@torch.no_grad()
def diagnose(
    config: TrialConfig,
    placement: Placement | None = None,
    losses: Sequence[float] = (),
    *,
    directions: int = 16,
    batches: int = 4,
) -> Diagnosis:
    """Look at the start of a cell's first task, in ``2 * directions * (batches + 2) + batches`` forward passes.

    Args:
        config: the cell.
        placement: where.
        losses: of its first task's steps, as they were stored.
        directions: number of random directions.
        batches: number of mini-batches, at least 2.

    Raises:
        ConfigError: the cell trains nothing, or its backbone is a black box.
    """
    placement = placement or Placement()
    with limited_threads(placement.threads):
        trial = _opened(config, placement)
        task = trial.scenario.tasks[0]
        parameters = list(trial.begin_task(task).values())
        if not parameters:
            raise ConfigError(f"{config.cell_id}: method {config.method!r} trains nothing in its first task")
        evaluated, batches = _losses(trial, batches)
        eps, dimensions = config.eps or EPS, sum(p.numel() for p in parameters)
        generator = torch.Generator().manual_seed(randomness.key(config.seed, randomness.OPTIMIZER, 0))
        along = [torch.randn(dimensions, generator=generator) for _ in range(directions)]
        seen = _look(evaluated, parameters, along, eps, batches)
    return _found(config, seen, eps, dimensions, losses)


def _found(config: TrialConfig, seen: _Seen, eps: float, dimensions: int, losses: Sequence[float]) -> Diagnosis:
    """What follows from losses around the start."""
    queries, batches = config.queries or 1, len(seen.here)
    slopes = [[(up - down) / (2 * eps) for up, down in row] for row in seen.ends]
    # A task that is one mini-batch has no noise of mini-batches.
    noise2 = statistics.fmean(statistics.variance(row) for row in slopes) if batches > 1 else 0.0
    length2 = max(statistics.fmean(statistics.fmean(row) ** 2 for row in slopes) - noise2 / batches, 0.0)
    first, (near, far) = [row[0] for row in slopes], seen.slopes_beside(eps)
    smaller, larger = _apart(first, near), _apart(first, far)
    # From the wider ends: at the narrow ones rounding is as large as what is bent.
    second = statistics.fmean((up + down - 2 * seen.here[0]) / (10 * eps) ** 2 for up, down in seen.far)
    whole, loss = length2 + noise2, statistics.fmean(seen.here)
    info = optimizers.get(str(config.optimizer))
    exact, passes = info.estimator.exact, _looked_at(info.name).forwards(queries)
    kept = 1.0 if exact else queries / (queries + dimensions + 1)
    # An estimate's own e^T H e is tr H |g|^2 ((1 + 1/q) / d + 1/q) in expectation where H bends alike in all directions.
    lr = 2 * length2 * dimensions * kept / (whole * second) if second > 0 and whole and not exact else None
    gain = length2 * lr / 4 if lr else 0.0  # at half of the largest: lr |g|^2 / 2 with lr = largest / 2
    return Diagnosis(
        parameters=dimensions,
        queries=queries,
        exact=exact,
        eps=eps,
        loss=loss,
        gradient=math.sqrt(length2),
        batch_noise=math.sqrt(noise2),
        cosine=math.sqrt(kept * length2 / whole) if whole else 0.0,
        curvature=second,
        smaller=smaller,
        larger=larger,
        eps_is=_judged(seen.ends, smaller, getattr(torch, config.dtype)),
        largest_lr=lr,
        passes_for_one_percent=max(passes * abs(loss) / 100 / gain, float(passes)) if gain > 0 else None,
        fallen=_fallen(losses),
    )


@dataclass(frozen=True)
class _Seen:
    """Losses at the start by mini-batch, and at both ends of every direction.

    ``ends``: by mini-batch at eps; ``near`` and ``far``: on the first mini-batch, at a tenth and ten times of it.
    """

    here: list[float]
    ends: list[list[tuple[float, float]]]
    near: list[tuple[float, float]]
    far: list[tuple[float, float]]

    def slopes_beside(self, eps: float) -> tuple[list[float], list[float]]:
        """Slopes on the first mini-batch, at a tenth and ten times of eps."""
        near, far = (
            [(up - down) / (eps / 5) for up, down in self.near],
            [(up - down) / (20 * eps) for up, down in self.far],
        )
        return near, far


def _look(
    evaluated: Callable[[int], float],
    parameters: Sequence[nn.Parameter],
    along: Sequence[Tensor],
    eps: float,
    batches: int,
) -> _Seen:
    start = torch.nn.utils.parameters_to_vector(parameters)

    def at(batch: int, size: float, direction: Tensor) -> float:
        torch.nn.utils.vector_to_parameters(start + size * direction.to(start), parameters)
        return evaluated(batch)

    def both(batch: int, size: float, direction: Tensor) -> tuple[float, float]:
        return at(batch, size, direction), at(batch, -size, direction)

    seen = _Seen(
        [at(batch, 0.0, along[0]) for batch in range(batches)],
        [[both(batch, eps, u) for batch in range(batches)] for u in along],
        [both(0, eps / 10, u) for u in along],
        [both(0, 10 * eps, u) for u in along],
    )
    torch.nn.utils.vector_to_parameters(start, parameters)
    return seen


def _opened(config: TrialConfig, placement: Placement) -> Trial:
    config = TrialConfig.from_dict(dataclasses.asdict(config))
    if config.optimizer is None:
        raise ConfigError(
            f"{config.cell_id}: method {config.method!r} trains nothing, so there is no estimate to look at"
        )
    if accesses[config.access or "white-box"].remote:
        raise ConfigError(f"{config.cell_id}: access={config.access!r}: expected a backbone that is on this machine")
    trial = Trial(config, placement, LocalExecutor())
    trial.open()
    trial.backbone.calibrate(images for images, _ in trial.images(trial.scenario.tasks[0].train))
    return trial


def _losses(trial: Trial, count: int) -> tuple[Callable[[int], float], int]:
    """The loss on each of the first mini-batches of the first epoch, by number, and how many there are, ``count`` at most.

    Random draws are equal at every call.
    """
    method = trial.method
    made = trial.batches(trial.scenario.tasks[0])
    order, size = made.order(0), made.batch_size
    inputs = []
    for number in range(min(count, math.ceil(len(order) / size))):
        positions = order[number * size :][:size]
        parts = made.make_training(0, number, positions)()
        placed = [part.to(trial.device, trial.dtype if part.is_floating_point() else part.dtype) for part in parts]
        inputs.append(method.prepare(MiniBatch(*placed)))
    method.train()

    def loss(batch: int) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch)  # dropout is the same at both ends of a direction
            return float(method.loss(inputs[batch]))

    return loss, len(inputs)


def _apart(some: Sequence[float], others: Sequence[float]) -> float:
    """Root mean square of differences over that of the first ones."""
    size = math.sqrt(statistics.fmean(value**2 for value in some))
    apart = math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(some, others, strict=True)))
    return apart / size if size else math.inf


def _judged(ends: Sequence[Sequence[tuple[float, float]]], smaller: float, dtype: torch.dtype) -> str:
    """What slopes at eps and at a tenth of it say of eps, for losses computed in ``dtype``."""
    pairs = list(itertools.chain.from_iterable(ends))
    steps = statistics.median(abs(up - down) for up, down in pairs)
    rounding = 4 * statistics.median(abs(up) for up, _ in pairs) * torch.finfo(dtype).eps
    if steps < rounding:
        return "in rounding noise"
    # Where the smaller one would drown itself, its slopes prove nothing.
    return "beyond curvature" if smaller > _DISAGREE and steps > 10 * rounding else "fine"


def _fallen(losses: Sequence[float]) -> float | None:
    """How many standard errors the loss has fallen from the first tenth of steps to the last."""
    part = len(losses) // 10
    if part < 3:
        return None
    first, last = losses[:part], losses[-part:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / part)
    fallen = statistics.fmean(first) - statistics.fmean(last)
    if not error:  # both are constant
        return math.copysign(math.inf, fallen) if fallen else 0.0
    return fallen / error
