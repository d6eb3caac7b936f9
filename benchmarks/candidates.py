"""Ways to make a training step: the named optimizers and their peers, each on a method of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peers import PAIRS, Peer, make_peer
from torch import Tensor

from zeroflow.methods import Method, MiniBatch, methods
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import build_timm, create_backbone
from zeroflow.models.timm_backbone import TransformerBackbone
from zeroflow.optim import ThreeStepOptimizer, create_optimizer, optimizers
from zeroflow.trial.meters import Stopwatch

MODELS: dict[str, Callable[[], Backbone]] = {
    "embedded": create_backbone,
    "vit-tiny": lambda: TransformerBackbone(build_timm("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4})),
}
LONG = "vit-tiny"
"""Here more than one query is measured only for ``TYPICAL``, the most queries only for ``BEST``, in half the rounds."""
TYPICAL = ("zo-sgd", "zo-rge", "zo-per-example", "zo-muon", "forward-grad", "mezo-loop", "infty-zo-sgd")
BEST = ("zo-sgd", "zo-per-example")
OPTIONS: dict[str, dict[str, Any]] = {"es-cma": {"separable": True}}
"""Of candidates that refuse this many parameters as they are."""
QUERIES = (1, 4, 16)
BUDGETS = (2, 8, 32, 128)
LARGE = 32
"""From this budget on quality is measured only for ``TYPICAL``, over fewer seeds."""
WHOLE = {"zo-sgd, whole passes": "zo-sgd"}
"""Candidates that make whole forward passes, as peers do, instead of sharing the prefix; and what they are registered as."""
TARGETS = {
    "two-sided, plain forwards per query": {"with the prefix shared": 1.92, "without": 2.01},
    "two-sided, q = 16 over q = 4 per query": 1.0,
    "one-sided, plain forwards per query": "(q + 1) / q",
    "perturbation, share of the embedded backbone's forward": 0.005,
    "two-sided, memory of a plain forward": {"SGD": 1.05, "Adam": 1.08},
}
MIB = 2**20


@dataclass
class Bench:
    """A model, a mini-batch of random images, and fresh methods over the one frozen backbone."""

    name: str
    backbone: Backbone
    images: Tensor
    labels: Tensor

    @classmethod
    def make(cls, name: str, batch: int, device: torch.device) -> Bench:
        backbone = MODELS[name]().to(device)
        size = backbone.image_size
        images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        return cls(name, backbone, images, (torch.arange(batch) % 10).to(device))

    @property
    def device(self) -> torch.device:
        return self.images.device

    def method(self) -> Method:
        return new_method(self.backbone).train()

    def forward(self, method: Method) -> float:
        """The unit of everything: one plain forward pass."""
        with torch.no_grad():
            return float(method.loss(method.prepare(MiniBatch(self.images, self.labels))))


@dataclass
class Candidate:
    """One way to make a training step, on a method of its own."""

    bench: Bench
    name: str
    method: Method
    optimizer: ThreeStepOptimizer | Peer

    @classmethod
    def make(cls, bench: Bench, name: str) -> Candidate:
        method, registered = bench.method(), WHOLE.get(name, name)
        if name in PAIRS:
            return cls(bench, name, method, make_peer(name, method, lr=1e-6))
        named = list(method.trainable().items())
        return cls(bench, name, method, create_optimizer(registered, named, lr=1e-6, **OPTIONS.get(name, {})))

    @property
    def fewest(self) -> int:
        """The smallest number of queries that it works with."""
        return 1 if isinstance(self.optimizer, Peer) else self.optimizer.composition.estimator.least_queries

    @property
    def whole(self) -> bool:
        """Whether every evaluation is a whole forward pass."""
        return self.name in PAIRS or self.name in WHOLE

    def query_counts(self, most: int) -> list[int]:
        """Numbers of queries at which it is measured."""
        optimizer, name = self.optimizer, self.name
        one = optimizer.one_query if isinstance(optimizer, Peer) else not optimizer.composition.estimator.uses_queries
        if one:
            return [1]
        counts = [q for q in QUERIES if self.fewest <= q <= most and not (q > 4 and name == "forward-grad")]
        if self.bench.name == LONG:
            counts = [q for q in counts if q == counts[0] or (name in TYPICAL and (q <= 4 or name in BEST))]
        return counts

    def forwards(self, queries: int) -> int:
        """Forward passes of a step."""
        if isinstance(self.optimizer, Peer):
            return self.optimizer.forwards(queries)
        return optimizers.get(WHOLE.get(self.name, self.name)).forwards(queries)

    def step(self, queries: int) -> float:
        bench, method, optimizer = self.bench, self.method, self.optimizer
        batch = MiniBatch(bench.images, bench.labels)
        if isinstance(optimizer, Peer):
            return optimizer.step(lambda: method.loss(method.prepare(batch)), queries)
        optimizer.queries = queries
        bench.backbone.set_grad_checkpointing(optimizer.checkpoint)
        if self.whole:
            return float(optimizer.step(lambda: method.loss(method.prepare(batch))))
        inputs = method.prepare(batch)
        loss = method.losses if optimizer.per_example else method.loss
        return float(optimizer.step(lambda: loss(inputs)))

    def held(self) -> list[Tensor]:
        """What is kept from step to step: the flat vector, moments, snapshots."""
        return self.optimizer.held()


def new_method(backbone: Backbone, **options: Any) -> Method:
    """EASE with a bottleneck of 16 at its first task of 10 classes."""
    info = methods.get("ease")
    method = info.build(backbone, info.parse({"bottleneck": 16, **options}))
    method.begin_task(range(10), torch.Generator().manual_seed(0))
    return method.to(next(backbone.parameters()).device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    watch = Stopwatch(device)
    with watch.running():
        work()
    return watch.seconds
