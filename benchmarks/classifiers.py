"""What closed-form classifiers cost beside the backbone that makes their features, and random projection at its published size.

``python benchmarks/classifiers.py`` goes through the embedded stream of ten tasks. For each task it times a plain forward pass
over the task's training images, and every classifier's update, choice of lambda and solution on their features; then scores.
Medians over tasks of ratios to that forward pass: a machine's speed drops out.

Whole cells are timed too, in turns: those without training on the first five tasks of the marker stream, features computed anew
in each, as ratios to SimpleCIL's.

Beside random projection's time stands its bound: the floating point operations that it cannot do without, at the speed of a
float64 product of the same size in the same run. ``--published`` also times width 768, M = 10,000, 100 classes and 5,000
samples (3 GB, some minutes), in seconds.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import click
import torch
from candidates import seconds
from torch import Tensor

from zeroflow import Placement, TrialConfig, run_trial
from zeroflow.classifiers import Classifier, RandomProjection, classifiers
from zeroflow.data import class_incremental, class_order, datasets, even_increments, load_dataset, transforms
from zeroflow.models.factory import create_backbone
from zeroflow.trial.result import provenance

CPU = torch.device("cpu")
DATA = "quickdraw100"
CLASSES, TASKS = 100, 10
BATCH = 100


def floating_point_operations(samples: int, width: int, size: int, classes: int) -> float:
    """Of one task of random projection with fewer samples than M: symmetric matrices are counted once, not twice."""
    fit = samples - samples // 5
    update = 2 * samples * width * size + samples * size**2 + 2 * samples * size * classes
    kernel = fit**2 * size + 2 * (samples - fit) * fit * size
    eigenvectors = 4 / 3 * fit**3 + 2 * fit**3  # to a tridiagonal matrix, and back
    solution = size**3 / 3 + 2 * size**2 * classes
    return update + kernel + eigenvectors + solution


def product_speed(samples: int, size: int) -> float:
    """Operations per second of a float64 product ``[size, samples] @ [samples, size]``."""
    rows = torch.randn(samples, size, dtype=torch.float64)
    found = [seconds(lambda: rows.T @ rows, CPU) for _ in range(5)]
    return 2 * samples * size**2 / statistics.median(found)


def learn(classifier: Classifier, features: Tensor, labels: Tensor) -> None:
    """A task's update, choice and solution."""
    for start in range(0, len(labels), BATCH):
        classifier.add(features[start : start + BATCH], labels[start : start + BATCH])
    classifier.end_task()


@torch.no_grad()
def measure_embedded(tasks: int) -> dict[str, Any]:
    backbone, info = create_backbone(), datasets.get(DATA)
    scenario = class_incremental(
        load_dataset(DATA),
        even_increments(CLASSES, TASKS),
        transforms.get(info.transform),
        backbone.image_size,
        order=class_order(CLASSES, 1993),
    )
    each = CLASSES // TASKS
    built = {name: info.build() for name, info in classifiers.items()}
    learning: dict[str, list[float]] = {name: [] for name in built}
    scoring: dict[str, list[float]] = {name: [] for name in built}
    forwards, bounds, projections = [], [], []
    for number, task in enumerate(scenario.tasks[:tasks]):
        batches = list(task.train.plain_batches(BATCH))
        labels = torch.cat([y for _, y in batches])
        features = torch.cat([backbone(x) for x, _ in batches])
        for name, classifier in built.items():
            classifier.begin_task(range(number * each, (number + 1) * each), features.shape[1], torch.Generator())
            before = seconds(lambda: [backbone(x) for x, _ in batches], CPU)  # noqa: B023
            spent = seconds(lambda: learn(classifier, features, labels), CPU)  # noqa: B023
            found = seconds(lambda: classifier.scores(features), CPU)  # noqa: B023
            learning[name].append(spent / before)
            scoring[name].append(found / before)
            forwards.append(before)
            if isinstance(classifier, RandomProjection):
                size = len(classifier.gram)
                needed = floating_point_operations(len(labels), features.shape[1], size, (number + 1) * each)
                bounds.append(needed / product_speed(len(labels), size))
                projections.append(spent)
    return {
        "images": len(labels),
        "width": features.shape[1],
        "forward_seconds": statistics.median(forwards),
        "classifiers": [
            {
                "classifier": name,
                "learning_in_forwards": statistics.median(learning[name]),
                "scoring_in_forwards": statistics.median(scoring[name]),
                "mib": sum(b.nbytes for b in classifier.buffers()) / 2**20,
            }
            for name, classifier in built.items()
        ],
        "random_projection_seconds": statistics.median(projections),
        "random_projection_bound_seconds": statistics.median(bounds),
        "random_projection_over_bound": statistics.median(a / b for a, b in zip(projections, bounds, strict=True)),
    }


def measure_cells(rounds: int) -> list[dict[str, Any]]:
    """Seconds of whole cells, in turns; medians of their ratios to SimpleCIL's of the same round."""
    spent: dict[str, list[float]] = {name: [] for name in ("simplecil", "slda", "acil", "ranpac", "fecam")}
    for number in range(rounds + 1):
        for name, own in spent.items():
            cell = {"dataset": "quickdraw100-marker", "transform": "plain", "stop_after": 5, "method": name}
            found = seconds(lambda: run_trial(TrialConfig.from_dict(cell), Placement(cache_bytes=0)), CPU)  # noqa: B023
            if number:  # the first round imports what is needed
                own.append(found)
    first = spent["simplecil"]
    return [
        {
            "method": name,
            "seconds": statistics.median(own),
            "over_simplecil": statistics.median(a / b for a, b in zip(own, first, strict=True)),
        }
        for name, own in spent.items()
    ]


@torch.no_grad()
def measure_published(samples: int, width: int, size: int, classes: int) -> dict[str, Any]:
    """Random projection at its published size: seconds of the update, the solution, and all of it with the choice."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % classes
    features = torch.randn(classes, width, generator=generator)[labels]
    features += torch.randn(samples, width, generator=generator)

    def fresh(ridge: float) -> RandomProjection:
        classifier = RandomProjection(RandomProjection.Options(ridge=ridge, dimension=size))
        classifier.begin_task(range(classes), width, generator)
        return classifier

    def fixed() -> tuple[float, float]:
        classifier = fresh(1e4)
        return seconds(lambda: classifier.add(features, labels), CPU), seconds(classifier.end_task, CPU)

    update, solution = fixed()  # one classifier of this size at a time
    classifier = fresh(0.0)
    classifier.add(features, labels)
    whole = seconds(classifier.end_task, CPU)
    return {
        "samples": samples,
        "width": width,
        "size": size,
        "classes": classes,
        "update_seconds": update,
        "solution_seconds": solution,
        "choice_seconds": whole - update - solution,
    }


def report(result: dict[str, Any]) -> None:
    found = result["embedded"]
    click.echo(
        f"a task of {found['images']} images, width {found['width']}; one forward {found['forward_seconds']:.2f} s"
    )
    click.echo(f"{'classifier':20}{'learning':>10}{'scores':>10}{'MiB':>8}    (forwards over the same images)")
    for row in found["classifiers"]:
        click.echo(
            f"{row['classifier']:20}{row['learning_in_forwards']:10.3f}{row['scoring_in_forwards']:10.3f}{row['mib']:8.1f}"
        )
    click.echo(
        f"random projection: {found['random_projection_seconds']:.2f} s a task, "
        f"{found['random_projection_over_bound']:.2f} times its bound of {found['random_projection_bound_seconds']:.2f} s"
    )
    for row in result["cells"]:
        click.echo(f"cell {row['method']:12} {row['seconds']:6.1f} s, {row['over_simplecil']:.2f} times SimpleCIL's")
    if big := result["published"]:
        click.echo(
            f"width {big['width']}, M = {big['size']:,}, {big['classes']} classes, {big['samples']:,} samples: update "
            f"{big['update_seconds']:.1f} s, solution {big['solution_seconds']:.1f} s, choice {big['choice_seconds']:.1f} s"
        )


@click.command(help=__doc__)
@click.option("--tasks", default=TASKS, show_default=True, help="tasks of the embedded stream")
@click.option("--published", is_flag=True, help="also time random projection at its published size")
@click.option("--rounds", default=3, show_default=True, help="of whole cells; 0: none")
@click.option("--threads", default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the result")
def main(tasks: int, published: bool, rounds: int, threads: int, output: Path | None) -> None:
    torch.set_num_threads(threads)
    command = " ".join(["python benchmarks/classifiers.py", *(a for a in sys.argv[1:] if a == "--published")])
    facts = {key: value for key, value in provenance(CPU, {"threads": threads}).items() if key != "finished_at"}
    result = {
        "command": command,
        **facts,
        "embedded": measure_embedded(tasks),
        "cells": measure_cells(rounds) if rounds else [],
        "published": measure_published(5_000, 768, 10_000, 100) if published else None,
    }
    report(result)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
