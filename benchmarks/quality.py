"""What an estimate is worth: its cosine to the true gradient, by number of queries and by budget of forward passes."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from candidates import BUDGETS, LARGE, OPTIONS, TYPICAL, new_method, seconds
from peers import PAIRS, Peer, make_peer
from torch import Tensor

from zeroflow.data import class_incremental, class_order, datasets, even_increments, load_dataset, transforms
from zeroflow.data.scenario import Batch
from zeroflow.methods import Method, MiniBatch
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import create_backbone
from zeroflow.optim import Composition, ThreeStepOptimizer, create_optimizer, list_optimizers, optimizers


@dataclass
class Sample:
    """A mini-batch of drawings and a method at some state, whose gradient is known by backpropagation."""

    method: Method
    batch: Batch

    def __post_init__(self) -> None:
        self.prefix = self.method.backbone.prefix(self.batch[0])

    def loss(self) -> Tensor:
        return self.method.loss((self.prefix, self.batch[1]))

    def losses(self) -> Tensor:
        return self.method.losses((self.prefix, self.batch[1]))

    def forward(self) -> float:
        with torch.no_grad():
            return float(self.method.loss(self.method.prepare(MiniBatch(*self.batch))))

    def estimates(self, name: str, queries: int, seeds: int) -> Iterator[tuple[Tensor, float]]:
        """Estimates ``[d]`` and their seconds: the step that SGD with lr 1 takes; the parameters are put back."""
        if name in PAIRS:
            yield from self.estimates_of(make_peer(name, self.method, lr=1.0), queries, seeds)
            return
        info = optimizers.get(name)
        estimator = dataclasses.replace(info.estimator, **OPTIONS.get(name, {}))  # type: ignore[type-var]
        composition = Composition(estimator, [], lambda groups: torch.optim.SGD(groups, lr=1.0))
        named = list(self.method.trainable().items())
        optimizer = ThreeStepOptimizer(named, composition, queries=queries, eps=info.default_eps)
        loss, device = self.losses if optimizer.per_example else self.loss, self.batch[0].device
        before, fresh = [p.detach().clone() for _, p in named], copy.deepcopy(optimizer.state_dict())
        for seed in range(seeds):
            optimizer.load_state_dict(fresh)
            optimizer.seed = seed
            spent = seconds(lambda: optimizer.step(loss), device)
            yield put_back(before, [p for _, p in named]), spent

    def estimates_of(self, peer: Peer, queries: int, seeds: int) -> Iterator[tuple[Tensor, float]]:
        """A peer's estimates, likewise, with whole forward passes."""
        parameters, device = list(self.method.trainable().values()), self.batch[0].device
        before = [p.detach().clone() for p in parameters]
        np.random.seed(0)
        for _ in range(seeds):
            spent = seconds(
                lambda: peer.step(lambda: self.method.loss(self.method.prepare(MiniBatch(*self.batch))), queries),
                device,
            )
            yield put_back(before, parameters), spent
        self.method.train()

    def example_lengths(self) -> float:
        """Root mean square over the examples of the length of their gradients."""
        squares = []
        parameters = list(self.method.trainable().values())
        for loss in self.losses():
            gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
            squares.append(sum(float(g.square().sum()) for g in gradient))
        return math.sqrt(statistics.fmean(squares))


@torch.no_grad()
def put_back(before: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """By how much the parameters have fallen, ``[d]``; afterwards they are as before."""
    fallen = torch.cat([(old - p).reshape(-1) for old, p in zip(before, parameters, strict=True)])
    for old, p in zip(before, parameters, strict=True):
        p.copy_(old)
    return fallen


def drawings(backbone: Backbone, batch: int, number: int) -> Batch:
    """A mini-batch of the embedded data's first task."""
    info, device = datasets.get("quickdraw100"), next(backbone.parameters()).device
    scenario = class_incremental(
        load_dataset("quickdraw100"),
        even_increments(100, 10),
        transforms.get(info.transform),
        backbone.image_size,
        order=class_order(100, 1993),
    )
    train = scenario.tasks[0].train
    positions = np.random.Generator(np.random.Philox(number)).permutation(len(train))[:batch]
    images, labels = train.training_batch(positions, torch.Generator().manual_seed(number))
    return images.to(device), labels.to(device)


def states(batch: int, steps: int, device: torch.device) -> Iterator[tuple[str, Sample]]:
    """Freshly initialised adapters and trained ones, without dropout: the gradient of one function is asked for."""
    backbone = create_backbone().to(device)
    method = new_method(backbone, dropout=0.0)
    sample = Sample(method, drawings(backbone, batch, 0))
    yield "fresh", sample
    optimizer = create_optimizer("fo-sgd", list(method.trainable().items()), lr=0.1)
    for number in range(1, steps + 1):
        images, labels = drawings(backbone, batch, number)
        optimizer.step(lambda images=images, labels=labels: method.loss(method.prepare(MiniBatch(images, labels))))  # type: ignore[misc]
    yield f"after {steps} first-order steps", sample


def budgeted(names: Sequence[str], seeds: Mapping[int, int]) -> Iterator[tuple[str, int, int, int]]:
    """(name, queries, forward passes, seeds): one name for each estimator, at each budget; ``seeds`` by budget."""
    seen = set()
    known = [info for info in list_optimizers(details=True) if info.name in names]
    for info in sorted(known, key=lambda info: (info.name != "zo-sgd", info.name)):
        estimator = info.estimator
        if type(estimator) in seen or estimator.exact:
            continue
        seen.add(type(estimator))
        if not estimator.uses_queries:
            yield info.name, 1, estimator.cost(1), seeds[BUDGETS[0]]
            continue
        typical = info.name in TYPICAL and not estimator.differentiates
        for budget, count in seeds.items():
            if typical or budget < LARGE:
                queries = max(q for q in range(1, budget + 1) if estimator.cost(q) <= budget)
                yield info.name, queries, estimator.cost(queries), count
    for peer, ours in PAIRS.items():
        if peer in names and ours == "zo-sgd":
            yield from ((peer, budget // 2, budget, count) for budget, count in seeds.items())


def expected_cosine(name: str, queries: int, size: int, gain: float) -> float | None:
    """Mean cosine for d >> q: E chi_q / sqrt(d) along shared directions; per-example ones: sqrt(q / d) * gain.

    ``gain`` is sqrt(N) times the gradient's length over the root mean square length of the N examples' own gradients.
    """
    estimator = optimizers.get(PAIRS.get(name, name)).estimator
    if estimator.per_example:
        return gain * math.sqrt(queries / size)
    if estimator.distribution in ("coordinate", "low-rank") or not estimator.uses_queries:
        # Too few components; it depends on the matrices' shares of the gradient; CARS turns round where the loss is concave.
        return None
    return math.sqrt(2) * math.exp(math.lgamma((queries + 1) / 2) - math.lgamma(queries / 2)) / math.sqrt(size)


def measure_quality(
    names: Sequence[str], seeds: Mapping[int, int], batch: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Cosine of estimates to the true gradient of the same mini-batch, and what they really cost, in plain forwards."""
    rows, summary = [], []
    for state, sample in states(batch, steps, device):
        ((gradient, _),) = sample.estimates("fo-sgd", 1, 1)
        length = float(torch.linalg.vector_norm(gradient))
        gain = math.sqrt(batch) * length / sample.example_lengths()
        by_name: dict[tuple[str, int], float] = {}
        for name, queries, forwards, count in budgeted(names, seeds):
            found = list(sample.estimates(name, queries, count))
            cosines = [float(torch.nn.functional.cosine_similarity(vector, gradient, dim=0)) for vector, _ in found]
            unit = statistics.median(seconds(sample.forward, device) for _ in range(5))
            mean = by_name[name, forwards] = statistics.fmean(cosines)
            rows.append(
                {
                    "state": state,
                    "optimizer": name,
                    "queries": queries,
                    "forwards": forwards,
                    "seeds": count,
                    "cosine": mean,
                    "standard_error": statistics.stdev(cosines) / math.sqrt(count),
                    "expected": expected_cosine(name, queries, len(gradient), gain),
                    "in_forwards": statistics.median(spent for _, spent in found) / unit,
                }
            )
        summary.append(
            {
                "state": state,
                "gradient_length": length,
                "example_gain": gain,
                "spsa_expected": math.sqrt(2 / math.pi / len(gradient)),
            }
        )
        if ("zo-per-example", 2) in by_name:
            summary[-1]["per_example_over_spsa"] = by_name["zo-per-example", 2] / by_name["zo-sgd", 2]
    return {"batch": batch, "size": len(gradient), "states": summary, "quality": rows}
