"""What every optimizer costs and what its estimate is worth: time, memory, and the cosine to the true gradient.

``python benchmarks/optimizers.py`` measures everything in units of one plain no-grad forward pass of the same method,
from the images to the loss: a machine's speed drops out. A step computes the adapters' prefix once, as a trial does.

Beside the named optimizers stand others' (``peers.py``): ``mezo-loop``, the published algorithm as it is usually written (the
seed is set anew and the noise drawn tensor by tensor, four times a query, with whole forward passes; Malladi et al. 2023,
Algorithm 1), and the authors' own package, ``infty-*``, where it can be imported. ``--peers`` measures them and what does
the same here, on the embedded backbone alone, and how many times faster ours are: medians over rounds in which both had
their turn.

Memory is the peak of live tensor bytes in a step above the model's own parameters and buffers: activations, the prefix,
directions, moments and snapshots. CPU: from torch's profiler; CUDA: from the allocator.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from peers import FASTER, PAIRS, Peer, infty_version, make_peer, peers, shift_per_tensor
from torch import Tensor

from zeroflow.data import class_incremental, class_order, datasets, even_increments, load_dataset, transforms
from zeroflow.data.scenario import Batch
from zeroflow.methods import Method, MiniBatch, methods
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import build_timm, create_backbone
from zeroflow.models.timm_backbone import TransformerBackbone
from zeroflow.optim import Composition, ThreeStepOptimizer, create_optimizer, list_optimizers, optimizers
from zeroflow.optim.evaluator import Evaluator
from zeroflow.optim.executor import LocalExecutor
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.noise import Directions
from zeroflow.optim.objective import Objective, Perturbation, Shift
from zeroflow.trial.meters import Stopwatch, peak_memory
from zeroflow.trial.result import provenance

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


def measure_time(bench: Bench, names: Sequence[str], rounds: int, most: int) -> dict[str, Any]:
    """Steps in plain forwards: the candidates take turns, each between two plain forwards, and medians are kept.

    A step of q queries is long, so it takes part in every sqrt(q)-th round only.
    """
    plain, device = bench.method(), bench.device
    candidates = [Candidate.make(bench, name) for name in names]
    ratios: dict[tuple[str, int], list[float]] = {}
    forwards, prefixes = [], []

    def forward() -> float:
        forwards.append(seconds(lambda: bench.forward(plain), device))
        return forwards[-1]

    for candidate in candidates:  # warm-up: snapshots, moments, kernels
        candidate.step(candidate.fewest)
    before = min(forward() for _ in range(3))
    for number in range(rounds):
        for candidate in candidates:
            for queries in candidate.query_counts(most):
                if number % math.isqrt(queries):
                    continue
                spent = seconds(functools.partial(candidate.step, queries), device)
                after = forward()
                ratios.setdefault((candidate.name, queries), []).append(2 * spent / (before + after))
                before = after
        for _ in range(3):
            prefixes.append(seconds(lambda: bench.backbone.prefix(bench.images), device) / before)
            before = forward()
    share = statistics.median(prefixes)
    rows = []
    for candidate in candidates:
        for queries in candidate.query_counts(most):
            found, count = ratios[candidate.name, queries], candidate.forwards(queries)
            ratio = statistics.median(found)
            rows.append({
                "optimizer": candidate.name, "queries": queries, "forwards": count, "in_forwards": ratio,
                "per_query": ratio / queries, "limit": float(count) if candidate.whole else share + count * (1 - share), "samples": found,
            })  # fmt: skip
    return {"forward_seconds": statistics.median(forwards), "prefix_share": share, "time": rows}


def measure_perturbation(bench: Bench, rounds: int) -> dict[str, float]:
    """One displacement of all trainable parameters, in forwards."""
    plain, device, repeats = bench.method(), bench.device, 20
    parameters = list(plain.trainable().values())
    numbers = itertools.count()

    def flat(distribution: str) -> Objective:
        parameters = FlatParameters(list(bench.method().trainable().values()))
        perturbation = Perturbation(1e-3, Directions(distribution, 0), 0)
        return Objective(lambda: 0.0, Evaluator(parameters, LocalExecutor()), perturbation)

    gaussian, signs, known = flat("gaussian"), flat("rademacher"), flat("gaussian")
    ways: dict[str, Callable[[], None]] = {
        "flat, gaussian": lambda: gaussian.move(Shift(1.0, next(numbers))),
        "flat, signs": lambda: signs.move(Shift(1.0, next(numbers))),
        "flat, noise known": lambda: known.move(Shift(1.0, 0)),
        "per tensor, gaussian": lambda: shift_per_tensor(parameters, next(numbers), 1e-3),
    }
    shares: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(rounds + 1):
            unit = seconds(lambda: bench.forward(plain), device)
            for name, way in ways.items():
                spent = seconds(lambda way=way: [way() for _ in range(repeats)], device)  # type: ignore[misc]
                shares[name].append(spent / repeats / unit)
    return {name: statistics.median(found[1:]) for name, found in shares.items()}


def measure_memory(bench: Bench, names: Sequence[str], most: int) -> dict[str, Any]:
    """Peak bytes of a step above the model's own, and over a plain forward's, above and with the model's."""

    def peak(work: Callable[[], object], method: Method, held: Iterable[Tensor] = ()) -> int:
        return peak_memory(work, method, bench.device, held=held)[1]

    plain = bench.method()
    bench.forward(plain)
    own = peak(lambda: None, plain)
    unit = peak(lambda: bench.forward(plain), plain) - own
    rows = []
    for name in names:
        for queries in Candidate.make(bench, name).query_counts(most):
            if bench.device.type == "cuda":
                gc.collect()  # its allocator counts what only awaits collection, too
            base = peak(lambda: None, bench.method())
            candidate = Candidate.make(bench, name)
            candidate.step(candidate.fewest)  # from now on moments are held
            step = functools.partial(candidate.step, queries)
            above = peak(step, candidate.method, candidate.held()) - base
            rows.append({
                "optimizer": name, "queries": queries, "mib": above / MIB, "ratio": above / unit,
                "ratio_with_model": (above + own) / (unit + own),
            })  # fmt: skip
    return {"model_mib": own / MIB, "forward_mib": unit / MIB, "memory": rows}


def against_peers(time: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster ours are than each peer, medians over the rounds that both had a turn in, and their memory."""
    samples = {(row["optimizer"], row["queries"]): row["samples"] for row in time}
    mib = {(row["optimizer"], row["queries"]): row["mib"] for row in memory}
    rows = []
    for (peer, queries), theirs in samples.items():
        for ours in (PAIRS.get(peer), *(whole for whole, name in WHOLE.items() if name == PAIRS.get(peer))):
            if (ours, queries) in samples:
                ratios = [a / b for a, b in zip(theirs, samples[ours, queries], strict=True)]
                rows.append({
                    "ours": ours, "theirs": peer, "queries": queries, "faster": statistics.median(ratios),
                    "target": FASTER.get(queries) if peer.startswith("infty-") and ours not in WHOLE else None,
                    "memory": mib[peer, queries] / mib[ours, queries],
                })  # fmt: skip
    return rows


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
        loss, device = self.losses if optimizer.per_example else self.loss, self.prefix.output.device
        before, fresh = [p.detach().clone() for _, p in named], copy.deepcopy(optimizer.state_dict())
        for seed in range(seeds):
            optimizer.load_state_dict(fresh)
            optimizer.seed = seed
            spent = seconds(lambda: optimizer.step(loss), device)
            yield put_back(before, [p for _, p in named]), spent

    def estimates_of(self, peer: Peer, queries: int, seeds: int) -> Iterator[tuple[Tensor, float]]:
        """A peer's estimates, likewise, with whole forward passes."""
        parameters, device = list(self.method.trainable().values()), self.prefix.output.device
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
        load_dataset("quickdraw100"), even_increments(100, 10), transforms.get(info.transform), backbone.image_size,
        order=class_order(100, 1993),
    )  # fmt: skip
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
            rows.append({
                "state": state, "optimizer": name, "queries": queries, "forwards": forwards, "seeds": count,
                "cosine": mean, "standard_error": statistics.stdev(cosines) / math.sqrt(count),
                "expected": expected_cosine(name, queries, len(gradient), gain),
                "in_forwards": statistics.median(spent for _, spent in found) / unit,
            })  # fmt: skip
        summary.append({
            "state": state, "gradient_length": length, "example_gain": gain,
            "spsa_expected": math.sqrt(2 / math.pi / len(gradient)),
        })  # fmt: skip
        if ("zo-per-example", 2) in by_name:
            summary[-1]["per_example_over_spsa"] = by_name["zo-per-example", 2] / by_name["zo-sgd", 2]
    return {"batch": batch, "size": len(gradient), "states": summary, "quality": rows}


def report(result: dict[str, Any]) -> None:
    """The numbers on the terminal."""
    for what, most in result["targets"].items():
        click.echo(f"target: {what} <= {most}")
    for model in result["models"]:
        click.echo(
            f"\n{model['model']}: d = {model['size']} in {model['tensors']} tensors; a plain forward takes "
            f"{model['forward_seconds'] * 1e3:.1f} ms, {model['prefix_share']:.1%} of it prefix, and "
            f"{model['forward_mib']:.1f} MiB beside the model's {model['model_mib']:.1f}"
        )
        for name, share in model["perturbation"].items():
            click.echo(f"  one perturbation, {name:22} {share:8.3%} of a forward")
        click.echo(
            f"  {'optimizer':20} {'q':>3} {'forwards':>9} {'limit':>7} {'per q':>7} {'MiB':>8} {'ratio':>6} {'whole':>6}"
        )
        memory = {(row["optimizer"], row["queries"]): row for row in model["memory"]}
        for row in model["time"]:
            kept = memory[row["optimizer"], row["queries"]]
            click.echo(
                f"  {row['optimizer']:20} {row['queries']:3} {row['in_forwards']:9.2f} {row['limit']:7.2f} "
                f"{row['per_query']:7.3f} {kept['mib']:8.2f} {kept['ratio']:6.2f} {kept['ratio_with_model']:6.2f}"
            )
        for row in model["peers"]:
            target = f"target {row['target']:.2f}" if row["target"] else ""
            click.echo(
                f"  {row['ours']:20} q = {row['queries']:2}: {row['faster']:5.2f} times faster than "
                f"{row['theirs']:21} {target:12} whose memory is {row['memory']:.2f} times ours"
            )
    quality = result["quality"]
    for state in quality["states"]:
        click.echo(
            f"\ncosine to the gradient, {state['state']}: batch {quality['batch']}, d = {quality['size']}"
            + (
                f"; per-example / SPSA at 2 forwards: {ratio:.2f}"
                if (ratio := state.get("per_example_over_spsa"))
                else ""
            )
        )
        for row in quality["quality"]:
            if row["state"] == state["state"]:
                expected = "" if row["expected"] is None else f"expected {row['expected']:.4f}"
                click.echo(
                    f"  {row['optimizer']:16} q = {row['queries']:2} {row['forwards']:3} forwards "
                    f"{row['cosine']:8.4f} +- {row['standard_error']:.4f} {expected:16} "
                    f"(costs {row['in_forwards']:.1f} forwards)"
                )


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option(
    "--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="May be repeated; default: all."
)
@click.option("--batch", default=32, show_default=True, help="Images of a step, for time and memory.")
@click.option("--rounds", default=6, show_default=True, help="How often each candidate has its turn.")
@click.option("--seeds", default=30, show_default=True, help="Estimates of each kind, for quality.")
@click.option("--most-seeds", default=10, show_default=True, help="The same from 32 forward passes on.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option(
    "--peers", "against", is_flag=True, help="Only others' optimizers and ours like them, on the embedded backbone."
)
@click.option("--quick", is_flag=True, help="A smoke run: few rounds, seeds, images, and at most 4 queries.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Default: results/benchmarks/optimizers.json, with --peers peers.json.",
)
def main(
    device: str,
    models: tuple[str, ...],
    batch: int,
    rounds: int,
    seeds: int,
    most_seeds: int,
    threads: int,
    against: bool,
    quick: bool,
    output: Path | None,
) -> None:
    command = f"python benchmarks/optimizers.py --device {device} --batch {batch} --rounds {rounds} --seeds {seeds}"
    command += f" --most-seeds {most_seeds}"
    command += "".join(f" --model {name}" for name in models) + (f" --threads {threads}" if threads != 1 else "")
    command += (" --peers" if against else "") + (" --quick" if quick else "")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    on, most, steps, examples = torch.device(device), max(QUERIES), 50, 64
    by_budget = {budget: most_seeds if budget >= LARGE else seeds for budget in BUDGETS}
    if quick:
        batch, rounds, most, steps, examples, by_budget = min(batch, 4), 2, 4, 2, 8, {2: 2}
    names = [*(dict.fromkeys((*PAIRS.values(), *WHOLE)) if against else list_optimizers()), *peers()]
    if missing := [name for name in PAIRS if name not in names]:
        click.echo(f"not measured: {', '.join(missing)} (no package infty here; see benchmarks/peers.py)")
    output = output or Path("results/benchmarks") / ("peers.json" if against else "optimizers.json")
    found = []
    for name in models or (("embedded",) if against else tuple(MODELS)):
        bench = Bench.make(name, batch, on)
        trainable = bench.method().trainable().values()
        measured: dict[str, Any] = {
            "model": name, "size": sum(p.numel() for p in trainable), "tensors": len(trainable),
            **measure_time(bench, names, rounds if name != LONG else (rounds + 1) // 2, most),
            "perturbation": measure_perturbation(bench, rounds),
            **measure_memory(bench, names, most),
        }  # fmt: skip
        found.append({**measured, "peers": against_peers(measured["time"], measured["memory"])})
    facts = {key: value for key, value in provenance(on, {"threads": threads}).items() if key != "finished_at"}
    result = {
        "command": command, **facts, "dtype": "float32", "batch": batch, "rounds": rounds, "quick": quick,
        "targets": TARGETS, "infty_version": infty_version(), "models": found, "quality": measure_quality(names, by_budget, examples, steps, on),
    }  # fmt: skip
    report(result)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
