"""Means over seeds with their intervals, and the correction for many comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import special  # of which ``scipy.stats`` loads much more than is needed here

ROUNDING = 1e-9
"""Differences of percentages up to this are rounding of sums, and no differences."""


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds and the half width of its 95 % t-interval, None for a single one.

    The mean is NaN, without an interval, where a value is not finite: no number can be told of them.
    """

    mean: float
    half_width: float | None
    n: int

    @property
    def p_value(self) -> float | None:
        """Of the two-sided t-test that the mean is 0; None where values do not differ, which are no independent draws."""
        if not self.half_width:
            return None
        t = self.mean / self.half_width * t_quantile(self.n - 1)
        return float(2 * special.stdtr(self.n - 1, -abs(t)))

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:.2f}" + ("" if self.half_width is None else f" ± {self.half_width:.2f}")


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t: half the width of a 95 % interval in standard errors."""
    return float(special.stdtrit(freedom, 0.975))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t-interval of at least one value; values that differ by rounding alone have an interval of width 0."""
    n, mean = len(values), sum(values) / len(values)
    if not math.isfinite(mean):  # as it is, in any order, if one of them is not
        return Estimate(math.nan, None, n)
    if n == 1:
        return Estimate(mean, None, n)
    if max(values) - min(values) <= ROUNDING * max(1.0, abs(mean)):
        return Estimate(values[0], 0.0, n)
    deviation = (sum((value - mean) ** 2 for value in values) / (n - 1)) ** 0.5
    return Estimate(mean, t_quantile(n - 1) * deviation / n**0.5, n)


def measured(values: Iterable[float | None]) -> Estimate | None:
    """The estimate of those values that there are; None where there are none, or where one is not finite: both are missing."""
    there = [value for value in values if value is not None]
    found = estimate(there) if there else None
    return None if found is None or math.isnan(found.mean) else found


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the same order.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted
