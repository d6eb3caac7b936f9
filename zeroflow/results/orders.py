"""What depends on the order of the classes: each setting over the orders that it was run in, beside its seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zeroflow.results.estimates import Estimate, estimate, t_quantile
from zeroflow.results.rendering import Cell, Column, Mark, Table, words
from zeroflow.results.summary import Row, same_problem

_KEY = "class_order_seed"


@dataclass(frozen=True)
class OverOrders:
    """A setting over several class orders.

    Attributes:
        rows: one for each order.
        avg: over orders, of the means over seeds; percent.
        last: likewise.
        fgt: likewise.
        gain: likewise, of Avg minus SimpleCIL's in the same order; None where an order lacks that.
        over_seeds: half width of the 95 % t-interval of one order's Avg over its seeds, from their variance within orders, pooled;
            None where no order has two seeds.
    """

    rows: Sequence[Row]
    avg: Estimate
    last: Estimate
    fgt: Estimate | None
    gain: Estimate | None
    over_seeds: float | None

    @property
    def label(self) -> str:
        return self.rows[0].name(without=[_KEY, "dataset"])

    @property
    def problem(self) -> tuple[Any, ...]:
        """What settings must have in common to be compared: the stream, and the orders of its classes."""
        return same_problem({**self.rows[0].config, _KEY: None}), tuple(sorted(str(r.config[_KEY]) for r in self.rows))


def over_orders(rows: Sequence[Row]) -> list[OverOrders]:
    """Settings that differ in their class order alone, put together; those with one order are left out.

    Args:
        rows: from ``summary.summary``.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.config["fixed_class_order"] is None and row.avg is not None:
            groups.setdefault(tuple(str(value) for key, value in row.config.items() if key != _KEY), []).append(row)
    found = []
    for own in groups.values():
        if len(own) < 2:
            continue
        gains = [row.vs_simplecil for row in own if row.vs_simplecil is not None]
        avg, last, fgt = (
            [value.mean for row in own if (value := getattr(row, name)) is not None] for name in ("avg", "last", "fgt")
        )
        found.append(
            OverOrders(
                own,
                estimate(avg),
                estimate(last),
                estimate(fgt) if fgt else None,
                estimate(gains) if len(gains) == len(own) else None,
                _over_seeds([row.avg for row in own if row.avg is not None]),
            )
        )
    return found


def _over_seeds(values: Sequence[Estimate]) -> float | None:
    several = [value for value in values if value.half_width is not None]
    if not several:
        return None
    # A half width is t s / sqrt(n): back to the variances, which pool by their degrees of freedom.
    freedom = [value.n - 1 for value in several]
    variances = [
        value.n * (value.half_width / t_quantile(value.n - 1)) ** 2 for value in several if value.half_width is not None
    ]
    pooled = sum(v * f for v, f in zip(variances, freedom, strict=True)) / sum(freedom)
    seeds = sum(value.n for value in several) / len(several)
    return t_quantile(sum(freedom)) * (pooled / seeds) ** 0.5


def order_table(rows: Sequence[Row]) -> Table:
    """A line for each setting that was run in several class orders."""
    found = over_orders(rows)
    sizes = Counter(each.problem for each in found)
    # The best of a stream is told among those in the orders that most settings were run in: means of others are of other orders.
    usual = {problem[0]: problem for problem, _ in sorted(sizes.items(), key=lambda item: (item[1], len(item[0][1])))}
    columns: list[Column | str] = [
        *words("dataset", "setting"),
        "orders",
        "n",
        "Avg",
        Column("over seeds", ",.2f"),
        "Last",
        "Fgt",
        Column("gain", "+.2f"),
    ]
    return Table.of(
        columns,
        [
            (
                str(each.rows[0].config["dataset"]),
                Cell(each.label, each.label),
                len(each.rows),
                min(row.seeds for row in each.rows),
                each.avg,
                each.over_seeds,
                each.last,
                each.fgt,
                each.gain,
            )
            for each in found
        ],
        name="orders",
        title="Class orders",
        notes=[
            "± half width of the 95 % t-interval over class orders, each the mean of its seeds; over seeds: the half width of one order's "
            "Avg over its seeds, pooled. n: seeds of an order, at least. gain: Avg minus SimpleCIL's in the same order.",
            *(
                ["Marked among the settings in the same orders, those that most were run in."]
                if len(sizes) > len(usual)
                else []
            ),
        ],
        marks=[
            Mark(
                each.rows[0].filters,
                each.problem[0],
                groups={}
                if usual[each.problem[0]] == each.problem
                else {head: (each.problem, number) for head in ("Avg", "Last", "Fgt", "gain")},
            )
            for number, each in enumerate(found)
        ],
    )
