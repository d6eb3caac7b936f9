"""The table of searches: for each one how many tries it had, what was chosen, and whether that is the best of its range."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zeroflow.results.differences import DEFAULT, short_number
from zeroflow.results.rendering import Table, markdown_grid, words


@dataclass(frozen=True)
class SearchRow:
    """One search.

    Attributes:
        config: keys that its candidates have in common.
        setting: what of them tells it from other searches of its data set, method, optimizer and queries; empty: nothing.
        tries: number of candidates.
        failed: how many of them failed.
        budget: in forward-equivalents.
        spent: in forward-equivalents.
        lr: what was chosen; None: nothing.
        eps: what was chosen; None: nothing, or the optimizer has none.
        options: what was chosen, by dotted name; empty: nothing, or none were searched.
        accuracy: percent, mean over seeds, of the chosen candidate.
        loss: its training loss.
        lower: accuracy at the next smaller lr tried with the same eps and options; None: none, or it failed.
        higher: accuracy at the next larger lr tried with the same eps and options; None: none, or it failed.
        best: the highest accuracy of all candidates.
        level: candidates that held-out samples cannot tell from it.
        edge: ``"lowest"`` or ``"highest"`` where the chosen lr is that of all tried, whatever their eps and
            options; the best may lie outside.
    """

    config: Mapping[str, Any]
    tries: int
    failed: int
    budget: int
    spent: int
    lr: float | None
    eps: float | None
    accuracy: float | None
    loss: float | None
    lower: float | None
    higher: float | None
    best: float | None
    level: int
    edge: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    setting: str = ""

    @property
    def options_text(self) -> str | None:
        """The chosen options as a reader sees them: ``bottleneck=16 momentum=0.9``."""
        return " ".join(f"{name.partition('.')[2]}={_short(value)}" for name, value in self.options.items()) or None


def search_rows(searches: Iterable[Mapping[str, Any]]) -> list[SearchRow]:
    """A row for each search, by data set, method, optimizer.

    Args:
        searches: rows of the table ``searches``, all those of each search.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in searches:
        groups.setdefault(row["search_id"], []).append(row)
    rows = [_row(members) for members in groups.values()]
    rows = [replace(row, setting=_apart(row, rows)) for row in rows]
    return sorted(rows, key=lambda row: [(value is not None, str(value)) for value in map(row.config.get, _NAMED)])


_NAMED = ("dataset", "method", "optimizer", "queries")


def _apart(row: SearchRow, rows: Sequence[SearchRow]) -> str:
    """What tells a search from those of the same name: ``momentum=0.9``."""
    others = [_flat(other.config) for other in rows if all(other.config.get(k) == row.config.get(k) for k in _NAMED)]
    own = _flat(row.config)
    telling = [key for other in others for key in own.keys() | other.keys() if own.get(key) != other.get(key)]
    parts = []
    for key in sorted(set(telling)):
        beside = [value for other in others if isinstance(value := other.get(key), float)]
        parts.append(f"{key.rpartition('.')[2]}={_short(own.get(key, DEFAULT), beside)}")
    return " ".join(parts)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and dotted options."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _row(members: Sequence[Mapping[str, Any]]) -> SearchRow:
    tries: dict[int, list[Mapping[str, Any]]] = {}
    for member in members:
        tries.setdefault(member["candidate"], []).append(member)
    # By (lr, (eps, options)): accuracy, None where a cell failed.
    found = {(cells[0]["lr"], _besides_lr(cells[0])): _mean(cells, "accuracy") for cells in tries.values()}
    chosen = [member for member in members if member["chosen"]]
    lr, besides = (chosen[0]["lr"], _besides_lr(chosen[0])) if chosen else (None, (None, None))
    rates = sorted({rate for rate, other in found if other == besides})
    lower = max((rate for rate in rates if lr is not None and rate < lr), default=None)
    higher = min((rate for rate in rates if lr is not None and rate > lr), default=None)
    tried, edge = {rate for rate, _ in found}, None
    if lr is not None and len(tried) > 1:
        edge = "lowest" if lr == min(tried) else "highest" if lr == max(tried) else None
    accuracy = _mean(chosen, "accuracy")
    best = max((value for value in found.values() if value is not None), default=None)
    samples = min((member["n"] for member in members if member["error"] is None and member["n"]), default=0)
    return SearchRow(
        config={**json.loads(members[0]["shared"]), "queries": members[0]["queries"]},
        tries=len(tries),
        failed=sum(value is None for value in found.values()),
        budget=members[0]["budget"],
        spent=sum(member["forward_equivalents"] for member in members),
        lr=lr,
        eps=besides[0],
        options=json.loads(besides[1] or "{}"),
        accuracy=accuracy,
        loss=_mean(chosen, "final_loss"),
        lower=None if lower is None else found[lower, besides],
        higher=None if higher is None else found[higher, besides],
        best=best,
        level=0
        if best is None
        else sum(v is not None and round(v, 9) >= least_level(best, samples) for v in found.values()),
        edge=edge,
    )


def _besides_lr(member: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """Eps and the searched options, which rows of older files lack."""
    return member["eps"], member.get("options")


def least_level(best: float, samples: int) -> float:
    """The least accuracy, percent, within one standard error of the ``best`` over so many samples; 0 samples: the best."""
    share = round(best, 9) / 100
    return round(best - 100 * math.sqrt(share * (1 - share) / samples) if samples else best, 9)


def _mean(members: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [member[key] for member in members]
    return None if not values or None in values else sum(values) / len(values)


SEARCH_LEGEND = (
    "tries: candidates, in brackets those that failed. spent: forward-equivalents (an exact gradient is three) of the budget. "
    "held-out: accuracy of the chosen candidate, percent, and in brackets that at the next smaller and next larger lr tried. "
    "best: the highest accuracy. level: candidates within one standard error of it; of these the smallest lr is chosen."
)


def render_searches(rows: Sequence[SearchRow]) -> str:
    """The table in GitHub's Markdown, its columns set wide enough for a terminal, with a legend."""
    searched = ["options"] if any(row.options for row in rows) else []
    settings = ["setting"] if any(row.setting for row in rows) else []
    heads = [
        "dataset",
        "method",
        "optimizer",
        "q",
        *settings,
        "tries",
        "spent",
        "lr",
        "eps",
        *searched,
        "held-out",
        "best",
        "level",
        "note",
    ]
    values = []
    for row in rows:
        note = "all failed" if row.lr is None else f"{row.edge} lr tried: widen the range" if row.edge else ""
        tried = " (".join([str(row.tries), *([f"{row.failed})"] if row.failed else [])])
        held_out = f"{_percent(row.accuracy)} ({_percent(row.lower)}, {_percent(row.higher)})"
        values.append(
            [
                *map(row.config.get, _NAMED),
                *(row.setting for _ in settings),
                tried,
                f"{row.spent:,} of {row.budget:,}",
                _general(row.lr),
                _general(row.eps),
                *(row.options_text for _ in searched),
                held_out,
                _percent(row.best),
                row.level,
                note,
            ]
        )
    return f"{markdown_grid(Table.of(words(*heads), values), padded=True)}\n\n{SEARCH_LEGEND}\n"


def _short(value: Any, beside: Iterable[float] = ()) -> str:
    return short_number(value, beside) if isinstance(value, float) else str(value)


def _general(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
