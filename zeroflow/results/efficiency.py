"""Table 2: what a step costs, as ratios to first order, which another device can show too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zeroflow.results.published import paper_csv
from zeroflow.results.rendering import Column, Table, text_grid, words


@dataclass(frozen=True)
class Efficiency:
    """A row of Table 2: memory in GB, seconds per epoch by data set, for an optimizer at so many queries."""

    optimizer: str
    queries: int
    memory_gb: float
    seconds_per_epoch: Mapping[str, float]


def table2() -> list[Efficiency]:
    """The rows of Table 2."""
    names = {"cifar100": "cifar100", "cub": "cub", "imagenet-a": "imageneta", "omnibenchmark": "omnibenchmark"}
    return [
        Efficiency(
            row["optimizer"].lower(),
            int(row["queries"]),
            float(row["memory_gb"]),
            {name: float(row[f"{column}_s_per_epoch"]) for name, column in names.items()},
        )
        for row in paper_csv("table2_efficiency")
    ]


@dataclass(frozen=True)
class Ratios:
    """An optimizer's costs over first order's, published and measured; None where there is nothing.

    Attributes:
        row: of the measurement.
        saved: first order's peak memory over this one's, as published.
        saved_here: the same, measured.
        saved_beyond: the same without the model's own parameters, which are in both.
        time: seconds per epoch over first order's: smallest and largest over the data sets.
        time_here: of a step.
    """

    row: Mapping[str, Any]
    saved: float | None
    saved_here: float | None
    saved_beyond: float | None
    time: tuple[float, float] | None
    time_here: float | None


def ratios(result: Mapping[str, Any]) -> list[Ratios]:
    """What ``zeroflow efficiency`` measured, beside Table 2."""
    paper = {(row.optimizer, row.queries): row for row in table2()}
    base = paper["fo-sgd", 1]
    first: Mapping[str, Any] = next((row for row in result["rows"] if row["optimizer"] == "fo-sgd"), {})
    model = result["model_bytes"]
    found = []
    for row in result["rows"]:
        there = paper.get((row["optimizer"], row["queries"] or 1))
        times = [there.seconds_per_epoch[d] / s for d, s in base.seconds_per_epoch.items()] if there else []
        memory, before = row["peak_memory_bytes"], first.get("peak_memory_bytes")
        found.append(
            Ratios(
                row,
                base.memory_gb / there.memory_gb if there else None,
                before / memory if before and memory else None,
                (before - model) / (memory - model) if before and memory else None,
                (min(times), max(times)) if times else None,
                _over(row["in_forwards"], first.get("in_forwards")),
            )
        )
    return found


def _over(value: float | None, unit: float | None) -> float | None:
    return None if value is None or not unit else value / unit


EFFICIENCY_LEGEND = (
    "GB: peak memory of a step, 10^9 bytes. FO/memory: first order's over this one's, published (paper) and here; beyond: "
    "without the model's own parameters.",
    "time/FO: of a step over first order's, published over its four data sets and here, of the times in forwards. in forwards: time "
    "of a step in plain forward passes before and after it, which a machine's drift does not change. forwards: forward passes of a "
    "step. work: forward equivalents (a backward pass counts 2). s/epoch: with the forward passes of snapshots, where there are any.",
)


def efficiency_table(result: Mapping[str, Any]) -> Table:
    """The measurement: a line for each optimizer and number of queries."""
    columns: list[Column | str] = [
        *words("optimizer"),
        "q",
        Column("GB", ".3f"),
        Column("FO/memory: paper", ".2f"),
        Column("here", ".2f"),
        Column("beyond", ".2f"),
        Column("s/step", ".4f"),
        "time/FO: paper",
        Column("here", ".2f"),
        Column("in forwards", ".2f"),
        Column("forwards", "g"),
        Column("work", "g"),
        *(Column(f"s/epoch {name}", ".1f") for name in result["first_task_images"]),
    ]
    values = []
    for found in ratios(result):
        row = found.row
        memory = row["peak_memory_bytes"]
        values.append(
            [
                row["optimizer"],
                row["queries"] or None,
                None if memory is None else memory / 1e9,
                found.saved,
                found.saved_here,
                found.saved_beyond,
                row["seconds_per_step"],
                None if found.time is None else "-".join(dict.fromkeys(f"{each:.2f}" for each in found.time)),
                found.time_here,
                row["in_forwards"],
                row["forward_passes"],
                row["forward_equivalents"],
                *row["seconds_per_epoch"].values(),
            ]
        )
    return Table.of(columns, values, notes=EFFICIENCY_LEGEND)


def render_efficiency(result: Mapping[str, Any]) -> list[str]:
    """The measurement for a terminal."""
    where = (
        f"{result['backbone']}, {result['image_size']} pixels, batch {result['batch_size']}, on {result['device']}; "
        f"a plain forward: {result['forward_memory_bytes'] / 1e9:.3f} GB, {result['forward_seconds']:.4f} s"
    )
    assumed = f"Assumed: {'; '.join(result['assumptions'])}."
    return [where, "", text_grid(efficiency_table(result), rule=False), "", *EFFICIENCY_LEGEND, assumed]
