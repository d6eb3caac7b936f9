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

import functools
import gc
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from candidates import BUDGETS, LARGE, LONG, MIB, MODELS, QUERIES, TARGETS, WHOLE, Bench, Candidate, seconds
from peers import FASTER, PAIRS, infty_version, peers, shift_per_tensor
from quality import measure_quality
from torch import Tensor

from zeroflow.methods import Method
from zeroflow.optim import list_optimizers
from zeroflow.optim.evaluator import Evaluator
from zeroflow.optim.executor import LocalExecutor
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.noise import Directions
from zeroflow.optim.objective import Objective, Perturbation, Shift
from zeroflow.trial.meters import peak_memory
from zeroflow.trial.result import provenance


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
            rows.append(
                {
                    "optimizer": candidate.name,
                    "queries": queries,
                    "forwards": count,
                    "in_forwards": ratio,
                    "per_query": ratio / queries,
                    "limit": float(count) if candidate.whole else share + count * (1 - share),
                    "samples": found,
                }
            )
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
            rows.append(
                {
                    "optimizer": name,
                    "queries": queries,
                    "mib": above / MIB,
                    "ratio": above / unit,
                    "ratio_with_model": (above + own) / (unit + own),
                }
            )
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
                rows.append(
                    {
                        "ours": ours,
                        "theirs": peer,
                        "queries": queries,
                        "faster": statistics.median(ratios),
                        "target": FASTER.get(queries) if peer.startswith("infty-") and ours not in WHOLE else None,
                        "memory": mib[peer, queries] / mib[ours, queries],
                    }
                )
    return rows


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
            "model": name,
            "size": sum(p.numel() for p in trainable),
            "tensors": len(trainable),
            **measure_time(bench, names, rounds if name != LONG else (rounds + 1) // 2, most),
            "perturbation": measure_perturbation(bench, rounds),
            **measure_memory(bench, names, most),
        }
        found.append({**measured, "peers": against_peers(measured["time"], measured["memory"])})
    facts = {key: value for key, value in provenance(on, {"threads": threads}).items() if key != "finished_at"}
    result = {
        "command": command,
        **facts,
        "dtype": "float32",
        "batch": batch,
        "rounds": rounds,
        "quick": quick,
        "targets": TARGETS,
        "infty_version": infty_version(),
        "models": found,
        "quality": measure_quality(names, by_budget, examples, steps, on),
    }
    report(result)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
