"""What a reader wants to know first of some results, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zeroflow.results.estimates import ROUNDING
from zeroflow.results.summary import PROBLEM, Row, gradients, problem_names, same_problem

_WAYS = {
    "simplecil": "SimpleCIL, which trains nothing",
    "none": "of the others without training",
    "exact": "with exact gradients",
    "both": "with exact gradients in some steps and forward passes in others",
    "forward": "by forward passes alone",
}
"""How rows come about, as a sentence says it."""


def findings(rows: Sequence[Row]) -> list[str]:
    """The best row of a data set, whatever it is, and beside it the best of every way to train.

    Of several streams (task sequences, class orders, backbones) the one with the most rows is told of, since only its own rows
    may be held against each other.

    Args:
        rows: of one data set.
    """
    streams: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.avg is not None:
            streams.setdefault(same_problem(row.config), []).append(row)
    if not streams:
        return []
    problem, measured = max(streams.items(), key=lambda item: len(item[1]))
    best = max(measured, key=_avg)
    parts = []
    if len(measured) > 1:
        way = _WAYS[_way(best)]
        how = (
            "which trains nothing"
            if best.is_baseline
            else "without training"
            if best.config["optimizer"] is None
            else way
        )
        parts.append(f"the best of {len(measured)} settings is {_name(best)}, {how}, with {_told(best)}")
    groups: dict[str, list[Row]] = {}
    for row in measured:
        groups.setdefault(_way(row), []).append(row)
    for way, what in _WAYS.items():
        own = groups.get(way)
        if not own or (len(measured) > 1 and best in own):
            continue
        leader = max(own, key=_avg)
        parts.append(
            f"{what}, has Avg {leader.avg} %"
            if way == "simplecil"
            else f"the best {what} is {_name(leader)} with {_told(leader)}"
        )
    named = problem_names([row.config for own in streams.values() for row in own])[problem]
    where = ", ".join(filter(None, [str(best.config["dataset"]), named]))
    more = len(streams) - 1
    others = (
        f" {more} more stream{'s' if more > 1 else ''} of this data set {'are' if more > 1 else 'is'} in the tables."
        if more
        else ""
    )
    return [f"{where}: {'; '.join(parts)}.{_clearly_above(groups.get('forward', []))}{others}"]


def _way(row: Row) -> str:
    return "simplecil" if row.is_baseline else gradients(row.config)


def _clearly_above(trained: Sequence[Row]) -> str:
    """How many rows of several seeds lie above SimpleCIL for certain."""
    gains = [
        (row.vs_simplecil, row.avg.half_width)
        for row in trained
        if row.avg and row.avg.half_width is not None and row.vs_simplecil is not None
    ]
    if not gains:
        return ""
    clear = sum(gain > half_width + ROUNDING for gain, half_width in gains)
    if len(gains) == 1:
        lies = "lies" if clear else "does not lie"
        return f" The one setting trained by forward passes alone with several seeds {lies} above SimpleCIL with its whole 95 % interval."
    lie = "lies above SimpleCIL with its" if clear < 2 else "lie above SimpleCIL with their"
    return f" Of {len(gains)} settings trained by forward passes alone with several seeds, {clear or 'none'} {lie} whole 95 % interval."


def _told(row: Row) -> str:
    gain = "" if row.vs_simplecil is None else f", {row.vs_simplecil:+.2f} points"
    seeds = "one seed" if row.seeds == 1 else f"{row.seeds} seeds"
    return f"{row.avg} % ({seeds}{gain})"


def _name(row: Row) -> str:
    return row.name(without=PROBLEM)


def _avg(row: Row) -> float:
    """For the best: of rows that differ by rounding alone the first one is."""
    return round(row.avg.mean / ROUNDING) if row.avg else float("-inf")
