"""The blocks of the front page: six kinds of rows, and what they answer, from all committed stores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from findings import LEVEL, shift_gains, verdicts

from zeroflow.results import load
from zeroflow.results.estimates import ROUNDING, Estimate, estimate
from zeroflow.results.summary import Row, gradients, same_problem, summary

STREAM = {"dataset": "quickdraw100-marker", "tasks": 10, "stop_after": 5, "class_order_seed": 1993, "validation": 0.0}
"""What `make sweep` runs."""
SEEDS = 3
"""What trains counts from so many seeds on: the best of many single runs would be the luckiest."""
MANY = 10_000
"""Trained values from which on they are many."""

KINDS = (
    "no training", "closed form", "first order", "a few values by forward passes", "tens of thousands by forward passes", "joint",
)  # fmt: skip


def kind(row: Row) -> str | None:
    """Which of the six kinds a row is; None: of none, as what takes exact gradients in some steps alone."""
    way = gradients(row.config)
    if row.is_baseline:
        return "no training"
    if way == "none":
        return "closed form"
    if row.seeds < SEEDS or way == "both":
        return None
    if row.config["method"] == "joint":
        return "joint"
    if way == "exact":
        return "first order"
    many = (row.trainable_parameters or 0) >= MANY
    return "tens of thousands by forward passes" if many else "a few values by forward passes"


@functools.cache
def _trials(results: Path) -> pa.Table:
    """All committed cells."""
    return load(sorted(folder for folder in results.iterdir() if (folder / "trials").is_dir()), "trials")


@functools.cache
def best_rows(results: Path) -> tuple[dict[str, Row], list[Row]]:
    """The row with the highest Avg of every kind, the cheaper one where they are level, and all that were compared."""
    rows = summary(_trials(results))
    usual = next(row for row in rows if row.is_baseline and _on_stream(row.config))
    compared = [row for row in rows if same_problem(row.config) == same_problem(usual.config) and row.avg]
    best = {}
    for name in KINDS:
        own = [row for row in compared if kind(row) == name]
        best[name] = max(own, key=lambda row: (round(_avg(row).mean, 2), -(row.forward_passes or 0)))
    return best, compared


def _on_stream(config: Mapping[str, object]) -> bool:
    return (
        all(config[key] == value for key, value in STREAM.items()) and not config["checkpoint"] and not config["access"]
    )


def _avg(row: Row) -> Estimate:
    assert row.avg is not None
    return row.avg


def table(results: Path) -> str:
    """Six rows: the best committed one of each kind, what it costs and what it trains."""
    best, compared = best_rows(results)
    lines = [
        "| | best committed row | Avg % | Last % | forward passes in training | trained values |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, row in best.items():
        passes, work = row.forward_passes or 0, row.forward_equivalents or 0
        backward = (
            f" + {(work - passes) / 2:,.0f} backward" if name in ("first order", "joint") and work > passes else ""
        )
        lines.append(
            f"| **{name}** | {_named(row)} | {row.avg} | {row.last} | {passes:,.0f}{backward} | {row.trainable_parameters or 0:,.0f} |"
        )
    cells = sum(row.seeds for row in compared)
    source = (
        f"The best by Avg of {len(compared)} rows ({cells} cells under `results/`) on the stream of `make sweep`, "
        f"`{STREAM['dataset']}`, first {STREAM['stop_after']} tasks; ± 95 % t-interval over seeds, at least {SEEDS} where anything is trained."
    )
    return "\n".join([*lines, "", source, ""])


def _named(row: Row) -> str:
    parts = [row.config[key] for key in ("method", "classifier", "optimizer")]
    queries = row.config["queries"]
    return " ".join(f"`{part}`" for part in parts if part) + (f" q = {queries}" if (queries or 1) > 1 else "")


def answer(results: Path) -> str:
    """What the six rows say, in three sentences."""
    best, _ = best_rows(results)
    none, closed, first, few, many = (best[name] for name in KINDS[:5])
    return (
        f"A few trained values are within reach of forward passes alone: {few.trainable_parameters:,.0f} values trained with "
        f"{few.forward_passes:,.0f} forward passes reach {few.avg} % average accuracy, {_against(results, few, first)} the best first-order row "
        f"({first.avg}) and {_against(results, few, closed)} the best classifier in closed form, which trains nothing ({closed.avg}). "
        f"{many.trainable_parameters:,.0f} values trained with {many.forward_passes:,.0f} forward passes reach {many.avg}, "
        f"{_against(results, many, none)} class means of frozen features, no training at all ({none.avg}). {_on_streams(results, few)}\n"
    )


def _on_streams(results: Path, row: Row) -> str:
    """On how many streams training gains over the same classifier on frozen features, judged as in ``findings.md``."""
    key = tuple(row.config[name] for name in ("method", "classifier", "optimizer"))
    _, trained, _ = shift_gains(results / "forward_only")
    judged = dict(zip(trained, verdicts(list(trained.values())), strict=True))
    own = [verdict for (_, other), verdict in judged.items() if other == key]
    if not own:
        return "On other streams that row was not run."
    return (
        f"Compared with the same untrained classifier, training these values helps significantly on {own.count('gain')} of {len(own)} "
        f"streams and hurts on {own.count('loss')}; on the others the difference is not significant."
    )


def _against(results: Path, one: Row, other: Row) -> str:
    """How a row lies to another one: by the t-test of their differences, seed by seed, at the 5 % level."""
    difference = _difference(results, one, other)
    single = difference.p_value is None  # one seed, or no spread
    apart = abs(difference.mean) > ROUNDING if single else (difference.p_value or 0.0) < LEVEL
    size = Estimate(abs(difference.mean), difference.half_width, difference.n)
    return f"{size} points {'above' if difference.mean > 0 else 'below'}" if apart else "level with"


@functools.cache
def _averages(results: Path) -> dict[str, tuple[int, float]]:
    """Seed and Avg of every committed cell."""
    columns = (_trials(results)[name].to_pylist() for name in ("cell_id", "seed", "avg"))
    return {cell: (seed, avg) for cell, seed, avg in zip(*columns, strict=True)}


def _difference(results: Path, one: Row, other: Row) -> Estimate:
    """One row's Avg minus another's on their common seeds; or minus the only one that what trains nothing has."""
    of = _averages(results)
    mine, theirs = (dict(of[cell] for cell in row.cells) for row in (one, other))
    if len(theirs) == 1 and other.config["optimizer"] is None:
        (constant,) = theirs.values()
        theirs = dict.fromkeys(mine, constant)
    return estimate([mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())])


def adapters_at_home(results: Path) -> str:
    """What training adapters gains where backbone and stream share one domain, beside classifiers in closed form."""
    rows = [row for row in summary(load(results / "forward_only", "trials")) if row.config["dataset"] == "quickdraw100"]
    none, trained = next(row for row in rows if row.is_baseline), [row for row in _by_avg(rows) if not row.is_baseline]
    differences = [_difference(results, row, none) for row in trained]
    told = []
    for row, difference, verdict in zip(trained, differences, verdicts(differences), strict=True):
        side = "above" if difference.mean > 0 else "below"
        word = {"n.s.": "not significantly different", "-": f"{side} (one run)"}.get(verdict, side)
        told.append(f"{_named(row)} {row.avg}, {word}")
    return f"The first five tasks, Avg in percent, against class means of frozen features ({none.avg}): {'; '.join(told)}.\n"


def _by_avg(rows: Sequence[Row]) -> list[Row]:
    return sorted((row for row in rows if row.avg), key=lambda row: -_avg(row).mean)


def blocks(results: Callable[[], Path]) -> dict[str, Callable[[], str]]:
    """The blocks by name; ``results``: where the stores are."""
    return {
        "front-table": lambda: table(results()),
        "front-answer": lambda: answer(results()),
        "adapters-at-home": lambda: adapters_at_home(results()),
    }
