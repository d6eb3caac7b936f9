"""What a reader wants to know first of some results, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from zeroflow.results.summary import Row, same_problem

_WAYS = {
    "simplecil": "SimpleCIL, which trains nothing",
    "closed form": "of the others without training",
    "exact": "with exact gradients",
    "hybrid": "with exact gradients first and forward passes then",
    "forward": "by forward passes alone",
}
"""How rows come about, as a sentence says it."""


def findings(rows: Sequence[Row]) -> list[str]:
    """The best row of a data set, whatever it is, and beside it the best of every way to train.

    Args:
        rows: of one data set.
    """
    measured = [row for row in rows if row.avg is not None]
    if not measured:
        return []
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
        # Of several class orders the one that the best row has: a gain is held against that.
        alike = [row for row in own if same_problem(row.config) == same_problem(best.config)]
        leader = max((way == "simplecil" and alike) or own, key=_avg)
        parts.append(
            f"{what}, has Avg {leader.avg} %"
            if way == "simplecil"
            else f"the best {what} is {_name(leader)} with {_told(leader)}"
        )
    return [f"{rows[0].config['dataset']}: {'; '.join(parts)}.{_clearly_above(groups.get('forward', []))}"]


def _way(row: Row) -> str:
    optimizer = row.config["optimizer"]
    if optimizer is None:
        return "simplecil" if row.is_baseline else "closed form"
    if str(optimizer).startswith("fo-"):
        return "exact"
    return "hybrid" if row.config["hybrid_epochs"] else "forward"


def _clearly_above(trained: Sequence[Row]) -> str:
    """How many rows of several seeds lie above SimpleCIL for certain."""
    gains = [
        (row.vs_simplecil, row.avg.half_width)
        for row in trained
        if row.avg and row.avg.half_width is not None and row.vs_simplecil is not None
    ]
    if not gains:
        return ""
    clear = sum(gain > half_width for gain, half_width in gains)
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
    return row.name(without=["dataset"])


def _avg(row: Row) -> float:
    return row.avg.mean if row.avg else float("-inf")
