"""The number of forward passes as a formula in the number of queries, for computing and for printing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Forward passes of one step: ``per_query * q + fixed``.

    Attributes:
        per_query: for each query.
        fixed: independent of the number of queries.
        beside: further passes that are counted elsewhere, in words.
    """

    per_query: int = 0
    fixed: int = 0
    beside: str = ""

    def __call__(self, queries: int) -> int:
        """Forward passes for q queries."""
        return self.per_query * queries + self.fixed

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.per_query + other.per_query, self.fixed + other.fixed, self.beside + other.beside)

    def __str__(self) -> str:
        by_query = f"{'' if self.per_query == 1 else self.per_query}q" if self.per_query else ""
        fixed = str(self.fixed) if self.fixed or not by_query else ""
        return " + ".join(filter(None, (by_query, fixed))) + self.beside
