"""What frozen features cost a cell that computes them, and the next one that reads them: seconds of class means, in pairs.

``python benchmarks/features.py`` runs one cell three times a round, in one process that is warm: without a cache, with an
empty one, and with what the second time left there. The ratios are medians over rounds.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from written import write

from zeroflow import Placement, TrialConfig, run_trial

OUTPUT = Path("results/benchmarks/features.json")
WAYS = ("none", "first", "second")


def seconds(config: TrialConfig, place: Placement) -> tuple[float, list[list[float]]]:
    """Wall seconds of a cell, and its accuracies."""
    started = time.perf_counter()
    found = run_trial(config, place)
    return time.perf_counter() - started, found.accuracy_matrix.tolist()


@click.command(help=__doc__)
@click.option("--dataset", default="quickdraw100", show_default=True)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--tasks-run", default=10, show_default=True, help="Of ten tasks, how many a cell runs.")
@click.option("--output", type=click.Path(path_type=Path), help=f"Write the result there too, e.g. {OUTPUT}.")
def main(dataset: str, rounds: int, tasks_run: int, output: Path | None) -> None:
    config = TrialConfig.from_dict({"dataset": dataset, "method": "simplecil", "stop_after": tasks_run})
    place, without = Placement(device="cpu"), Placement(device="cpu", cache_bytes=0)
    run_trial(TrialConfig.from_dict({"dataset": dataset, "method": "simplecil", "stop_after": 1}), without)  # warm up
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            results = [seconds(config, where) for where in (without, place, place)]
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        assert repr(results[0][1]) == repr(results[1][1]) == repr(results[2][1]), "the same bits"
        for way, (spent, _) in zip(WAYS, results, strict=True):
            found[way].append(spent)

    def ratio(way: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(found[way], found[base], strict=True))

    result: dict[str, Any] = {
        "command": f"python benchmarks/features.py --dataset {dataset} --rounds {rounds} --tasks-run {tasks_run}",
        "dataset": dataset,
        "rounds": rounds,
        "tasks_run": tasks_run,
        "bytes": size,
        **{f"{way}_seconds": statistics.median(found[way]) for way in WAYS},
        "first_to_none": ratio("first", "none"),
        "second_to_first": ratio("second", "first"),
    }
    write(result, output, asdict(place))


if __name__ == "__main__":
    main()
