"""Symptoms of a run that does not learn: warn of each once, with a remedy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field

IN_A_ROW = 10
"""Number of steps that must show the same symptom; a single one can be chance."""
ROUNDING = 4
"""Differences of at most so many rounding errors of the loss are noise."""
GROWN = 1e3
"""A loss that is so many times the first one has diverged."""


@dataclass
class Symptoms:
    """Checks the losses of every step and warns once of each symptom."""

    _first: float | None = None
    _told: set[str] = field(default_factory=set)
    _counts: dict[str, int] = field(default_factory=dict)

    def see(
        self, loss: float, differences: Collection[float] | None, *, lr: float, eps: float | None, rounding: float
    ) -> bool:
        """Check one step.

        Args:
            loss: of the step.
            differences: loss differences, or slopes; None where none were measured.
            lr: for the message.
            eps: for the message; None where no evaluation is displaced by it.
            rounding: relative rounding error of the loss; 0: unknown.

        Returns:
            Whether the loss has diverged in this step: what else is found then is a consequence.
        """
        if not math.isfinite(loss):
            return True
        if self._first is None:
            self._first = loss
        grown = self._first != 0 and loss > GROWN * abs(self._first)
        if self._lasts("grown", grown):
            self._tell(
                "grown",
                f"the loss has grown from {self._first:.3g} to {loss:.3g}: lower lr (it is {lr:g}), or take more queries or a "
                "-conserve optimizer, which never makes a mini-batch worse",
            )
        if differences is None or grown:
            return grown
        largest = max((abs(difference) for difference in differences), default=0.0)
        flat = self._lasts("flat", largest == 0)
        noise = ROUNDING * rounding * abs(loss) if eps is not None else 0.0
        if self._lasts("blind", largest <= noise):
            self._tell("blind", _flat(eps) if flat else _rounding(largest, loss, eps))
        return False

    def _lasts(self, symptom: str, shows: bool) -> bool:
        self._counts[symptom] = self._counts.get(symptom, 0) + 1 if shows else 0
        return self._counts[symptom] >= IN_A_ROW

    def _tell(self, symptom: str, message: str) -> None:
        if symptom not in self._told:
            self._told.add(symptom)
            warnings.warn(message, stacklevel=6)


def _flat(eps: float | None) -> str:
    small = f"eps={eps:g} is too small for it, " if eps is not None else ""
    return (
        f"no difference between the losses of different parameters in {IN_A_ROW} steps: nothing is learnt. Either the weights "
        "that the closure uses are cached or compiled in (frozen), or the loss moves in steps (as an accuracy does) and "
        f"{small}or the closure does not use the parameters given to the optimizer. Try a larger eps first"
    )


def _rounding(largest: float, loss: float, eps: float | None) -> str:
    return (
        f"the differences of losses in {IN_A_ROW} steps are as small as the loss's rounding (the last: {largest:.1g} of a loss of "
        f"{loss:.3g}, with eps={eps or 0:g}): steps are random. Take a larger eps, or compute the loss in float64"
    )
