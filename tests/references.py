"""What each named optimizer should do on the conformance suite's quadratic: formulas of papers in NumPy alone.

One function for each method, keyed by name in ``METHODS``. The noise is that of the documented scheme.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cmaes
import numpy as np
import scipy.linalg

Vector = np.ndarray
Function = Callable[[Vector], float]
DIRECTIONS, MASK, COORDINATES, EXAMPLES, BASES = 0, 2, 3, 4, 5
SHAPES = [(1, 8), (4, 8)]
"""Of the quadratic's parameters as matrices."""


def stream(seed: int, step: int, query: int, domain: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, domain], counter=[0, 0, query, step]))


def signs(seed: int, step: int, query: int, size: int, domain: int = DIRECTIONS) -> Vector:
    drawn = np.frombuffer(stream(seed, step, query, domain).bytes((size + 7) // 8), np.uint8)
    return np.unpackbits(drawn, count=size) * 2.0 - 1


# Rules of step 3: rule(x, g, state) -> x.


def sgd(lr: float, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False) -> Callable:
    def rule(x: Vector, g: Vector, s: dict) -> Vector:
        g = g + weight_decay * x
        if not momentum:
            return x - s.get("lr", lr) * g
        s["m"] = momentum * s["m"] + g if "m" in s else g
        return x - s.get("lr", lr) * (g + momentum * s["m"] if nesterov else s["m"])

    return rule


def adam(lr: float, betas: tuple = (0.9, 0.999), eps_adam: float = 1e-8, weight_decay: float = 0.0) -> Callable:
    def rule(x: Vector, g: Vector, s: dict) -> Vector:
        g, t = g + weight_decay * x, s.get("t", 0) + 1
        s.update(
            t=t, m=betas[0] * s.get("m", 0) + (1 - betas[0]) * g, v=betas[1] * s.get("v", 0) + (1 - betas[1]) * g * g
        )
        mhat, vhat = s["m"] / (1 - betas[0] ** t), s["v"] / (1 - betas[1] ** t)
        return x - s.get("lr", lr) * mhat / (np.sqrt(vhat) + eps_adam)

    return rule


def adamm(lr: float, betas: tuple = (0.9, 0.999), eps_adam: float = 1e-8, weight_decay: float = 0.0) -> Callable:
    def rule(x: Vector, g: Vector, s: dict) -> Vector:
        g = g + weight_decay * x
        s["m"] = betas[0] * s.get("m", 0) + (1 - betas[0]) * g
        s["v"] = betas[1] * s.get("v", 0) + (1 - betas[1]) * g * g
        s["vhat"] = np.maximum(s.get("vhat", 0), s["v"])
        return x - s.get("lr", lr) * s["m"] / (np.sqrt(s["vhat"]) + eps_adam)

    return rule


def radazo(lr: float, betas: tuple = (0.9, 0.999), eps_adam: float = 1e-8, weight_decay: float = 0.0) -> Callable:
    def rule(x: Vector, g: Vector, s: dict) -> Vector:
        s["m"] = betas[0] * s.get("m", 0) + (1 - betas[0]) * (g + weight_decay * x)
        s["v"] = betas[1] * s.get("v", 0) + (1 - betas[1]) * s["m"] ** 2
        return x - s.get("lr", lr) * s["m"] / np.sqrt(s["v"] + eps_adam)

    return rule


@dataclass
class Step:
    """One step as a method sees it, and what most of them are made of.

    Attributes:
        f: the loss of this step's mini-batch. gradient: of it. t: number of the step. seed, lr, queries, eps: of the run.
        mask: ``[d]`` of ones and zeros. history: share of earlier estimates, or of earlier directions. rule: of step 3, ``state`` its moments.
        memory: what the method itself keeps from step to step.
    """

    f: Function
    gradient: Callable[[Vector], Vector]
    t: int
    seed: int
    lr: float
    queries: int
    eps: float
    mask: Vector
    history: float
    rule: Callable
    state: dict
    memory: dict = field(default_factory=dict)
    history_of: str = "estimates"

    def directions(self, kind: str = "gaussian") -> list[Vector]:
        size, free = len(self.mask), np.flatnonzero(self.mask)
        if kind == "coordinate":
            count = min(self.queries, len(free))
            chosen = stream(self.seed, self.t, 0, COORDINATES).choice(len(free), count, replace=False)
            return list(np.eye(size)[free[chosen]])
        if kind == "rademacher":
            return [self.mask * signs(self.seed, self.t, query, size) for query in range(self.queries)]
        streams = [stream(self.seed, self.t, query, DIRECTIONS) for query in range(self.queries)]
        drawn = [self.mask * one.standard_normal(size) for one in streams]
        return [z / np.linalg.norm(z) for z in drawn] if kind == "sphere" else drawn

    def two_sided(self, x: Vector, zs: Sequence[Vector]) -> Vector:
        return np.array([(self.f(x + self.eps * z) - self.f(x - self.eps * z)) / (2 * self.eps) for z in zs])

    def one_sided(self, x: Vector, zs: Sequence[Vector]) -> Vector:
        return np.array([(self.f(x + self.eps * z) - self.f(x)) / self.eps for z in zs])

    def mixed(self, h: Vector) -> Vector:
        """With the history of earlier ones."""
        if self.history_of == "directions":
            return h
        if self.history and "history" in self.memory:
            h = (1 - self.history) * h + self.history * self.memory["history"]
        self.memory["history"] = h
        return h

    def estimate(self, slopes: Vector, zs: Sequence[Vector], combine: str = "mean") -> Vector:
        """What slopes along directions tell, or the histories of these times the slopes."""
        if self.history_of == "estimates":
            return combined(slopes, zs, combine)
        assert combine == "mean"
        total = np.zeros_like(zs[0])
        for weight, z in zip(slopes / len(zs), zs, strict=True):
            before = self.memory.get("line")
            self.memory["line"] = z if before is None else (1 - self.history) * z + self.history * before
            total = total + weight * self.memory["line"]
        return total

    def moved(self, x: Vector, h: Vector) -> Vector:
        return np.where(self.mask > 0, self.rule(x, h, self.state), x)


def combined(slopes: Vector, zs: Sequence[Vector], combine: str = "mean") -> Vector:
    return np.linalg.pinv(np.stack(zs)) @ slopes if combine == "span" else slopes @ np.stack(zs) / len(zs)


@dataclass(frozen=True)
class Method:
    """``step(s, x, **options)`` gives the next x; ``rule``, ``queries`` and ``eps`` are the defaults of its name."""

    step: Callable[..., Vector]
    rule: Callable[..., Callable]
    queries: int = 1
    eps: float = 1e-3


METHODS: dict[str, Method] = {}


def method(name: str, rule: Callable[..., Callable], **defaults: Any) -> Callable:
    def register(step: Callable[..., Vector]) -> Callable[..., Vector]:
        METHODS[name] = Method(step, rule, **defaults)
        return step

    return register


@method("fo-sgd", sgd)
@method("fo-sgd-checkpoint", sgd)
@method("fo-adam", adam)
def first_order(s: Step, x: Vector) -> Vector:
    return s.moved(x, s.mask * s.gradient(x))


@method("zo-sgd", sgd)
@method("zo-adam", adam)
@method("zo-adamm", adamm)
@method("zo-radazo", radazo)
def spsa(s: Step, x: Vector, distribution: str = "gaussian", combine: str = "mean") -> Vector:
    zs = s.directions(distribution)
    return s.moved(x, s.mixed(s.estimate(s.two_sided(x, zs), zs, combine)))


@method("zo-sgd-sign", sgd)
@method("zo-adam-sign", adam)
def spsa_sign(s: Step, x: Vector, sign: str = "elementwise") -> Vector:
    zs = s.directions()
    slopes = s.two_sided(x, zs)
    if sign == "scalar":
        return s.moved(x, s.mixed(s.estimate(np.sign(slopes), zs)))
    return s.moved(x, np.sign(s.mixed(s.estimate(slopes, zs))))


@method("zo-sgd-conserve", sgd)
@method("zo-adam-conserve", adam)
def spsa_conserve(s: Step, x: Vector) -> Vector:
    zs, moments = s.directions(), dict(s.state)
    step = x - s.moved(x, s.mixed(s.estimate(s.two_sided(x, zs), zs)))
    places = (x, x - step, x + step)
    best = int(np.argmin([s.f(place) for place in places]))
    if best != 1:
        s.state.clear()
        s.state.update(moments)
    return places[best]


@method("zo-svrg", sgd)
def svrg(s: Step, x: Vector, snapshot_every: int = 50, combine: str = "mean", full: Function | None = None) -> Vector:
    zs, memory = s.directions(), s.memory

    def estimate(at: Vector) -> Vector:
        return combined(s.two_sided(at, zs), zs, combine)

    if "taken" not in memory or s.t - memory["taken"] >= snapshot_every:
        f, s.f = s.f, full or s.f
        memory.update(taken=s.t, snapshot=x.copy(), full=estimate(x))
        s.f = f
    return s.moved(x, s.mixed(estimate(x) - estimate(memory["snapshot"]) + memory["full"]))


@method("zo-rge", sgd)
def rge(s: Step, x: Vector, distribution: str = "gaussian", combine: str = "mean") -> Vector:
    zs = s.directions(distribution)
    factor = s.mask.sum() if distribution == "sphere" and combine == "mean" else 1.0
    return s.moved(x, s.mixed(factor * s.estimate(s.one_sided(x, zs), zs, combine)))


@method("zo-cge", sgd)
def cge(s: Step, x: Vector) -> Vector:
    zs = s.directions("coordinate")
    return s.moved(x, s.mixed(s.one_sided(x, zs) @ np.stack(zs)))


@method("zo-scd", sgd)
def scd(s: Step, x: Vector) -> Vector:
    zs = s.directions("coordinate")
    return s.moved(x, s.mixed(s.mask.sum() * combined(s.two_sided(x, zs), zs)))


@method("forward-grad", sgd)
def forward_gradient(s: Step, x: Vector, distribution: str = "gaussian", combine: str = "mean") -> Vector:
    zs = s.directions(distribution)
    return s.moved(x, s.mixed(s.estimate(np.stack(zs) @ s.gradient(x), zs, combine)))


@method("zo-fzoo", sgd, queries=8, eps=1e-4)
def fzoo(s: Step, x: Vector) -> Vector:
    zs = s.directions("rademacher")
    here, there = s.f(x), [s.f(x + s.eps * z) for z in zs]
    sigma = np.std(there if len(there) > 1 else [*there, here], ddof=1)
    return s.moved(x, s.mixed(s.estimate((np.array(there) - here) / sigma, zs)))


@method("zo-per-example", sgd)
def per_example(s: Step, x: Vector, normalize: bool = False) -> Vector:
    """Of a closure with one loss for all: signs, one direction for the whole mini-batch."""
    zs = s.directions("rademacher")
    slopes = s.two_sided(x, zs)
    return s.moved(x, s.mixed(combined(np.sign(slopes) if normalize else slopes, zs)))


@method("zo-muon", sgd, queries=16)
def muon(s: Step, x: Vector, rank: int = 64, resample_every: int = 100, combine: str = "mean") -> Vector:
    drawn = []
    for query in range(s.queries):
        normal, parts = stream(s.seed, s.t, query, DIRECTIONS), []
        for number, (rows, columns) in enumerate(SHAPES):
            raw = stream(s.seed, s.t // resample_every, number, BASES).standard_normal((rows, min(rank, rows)))
            q, r = np.linalg.qr(raw)
            parts.append((q * np.sign(np.diag(r)) @ normal.standard_normal((raw.shape[1], columns))).ravel())
        drawn.append(s.mask * np.concatenate(parts))
    h, parts = s.mixed(combined(s.one_sided(x, drawn), drawn, combine)), []
    for (rows, columns), part in zip(SHAPES, np.split(h, [8]), strict=True):
        u, singular, vt = np.linalg.svd(part.reshape(rows, columns), full_matrices=False)
        singular = singular / np.sqrt((singular**2).sum())
        for _ in range(5):  # the iteration acts on singular values alone
            singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
        parts.append((u * singular @ vt).ravel())
    return s.moved(x, np.concatenate(parts))


@method("zo-cars", sgd, eps=0.5)
def cars(s: Step, x: Vector) -> Vector:
    (u,), r = s.directions("sphere"), s.eps / np.sqrt(s.t + 1)
    plus, minus, here = s.f(x + r * u), s.f(x - r * u), s.f(x)
    d, h = (plus - minus) / (2 * r), (plus + minus - 2 * here) / r**2
    return min((x, x + r * u, x - r * u, x - s.lr * d / h * u), key=s.f)


@method("es-cma", sgd, queries=16, eps=0.1)
def es_cma(s: Step, x: Vector, separable: bool = False) -> Vector:
    """The package ``cmaes``, given the library's noise; lr is the mean's own learning rate."""
    free = s.mask > 0
    if "strategy" not in s.memory:
        kind = cmaes.SepCMA if separable else cmaes.CMA
        s.memory["strategy"] = kind(x[free].copy(), s.eps, population_size=s.queries)
    strategy, x = s.memory["strategy"], x.copy()

    def at(part: Vector) -> float:
        whole = x.copy()
        whole[free] = part
        return s.f(whole)

    root = np.diag(np.sqrt(strategy._C)) if separable else scipy.linalg.sqrtm(strategy._C).real
    places = [strategy.mean + strategy._sigma * root @ z[free] for z in s.directions()]
    before = strategy.mean.copy()
    strategy.tell([(place, at(place)) for place in places])
    strategy._mean = before + s.lr * (strategy.mean - before)
    x[free] = strategy.mean
    return x


def reference(
    name: str,
    lr: float = 0.05,
    queries: int | None = None,
    eps: float | None = None,
    history: float = 0.0,
    history_of: str = "estimates",
    sparsity: float = 0.0,
    hybrid: int = 0,
    hybrid_lr: float | None = None,
    batch: Callable[[int], Function] | None = None,
    **options: Any,
) -> Callable[..., Vector]:
    """The trajectory of a named optimizer. ``batch(t)``: the loss at step t. Other options are the method's, or its rule's."""
    made = METHODS[name]
    own = {key: options.pop(key) for key in inspect.signature(made.step).parameters if key in options}

    def run(loss: Function, gradient: Callable, x: Vector, seed: int, steps: int) -> Vector:
        mask = np.ones(len(x))
        if sparsity:
            mask = (stream(seed, 0, 0, MASK).random(len(x), dtype=np.float32) >= sparsity).astype(float)
        state: dict = {}
        memory: dict = {}
        for t in range(steps):
            if t == hybrid > 0:
                state.clear()
            s = Step(
                batch(t) if batch else loss,
                gradient,
                t,
                seed,
                lr,
                queries or made.queries,
                eps or made.eps,
                mask,
                history,
                made.rule(lr, **options),
                state,
                memory,
                history_of,
            )
            if t < hybrid:
                if hybrid_lr:
                    state["lr"] = hybrid_lr
                x = first_order(s, x)
            else:
                x = made.step(s, x, **own)
        return x

    return run
