"""How lr, eps and options are chosen, the ``search`` section of a grid file: the same budget of forward passes for every optimizer, on training data that is held out.

    search:
      forward_passes: 20000         # budget of each search, in forward-equivalents: an exact gradient is three
      validation: 0.25              # share of the first task's training data that is judged on
      seeds: [100]                  # of the candidates; none of the grid's own
      when: {dataset: quickdraw100} # only these cells; left out: all that train
      lr:                           # by optimizer, later lines win; one without a line is not searched
        fo-*: [0.03, 0.1, 0.3]      # tried in this order as far as the budget goes
        zo-*: {from: 1e-4, to: 1}   # middle, ends, then halfway between, on a log scale
      eps: [1e-3, 1e-2]             # likewise for all, or by optimizer; left out: the cells' own
      queries: each                 # a search for each number; left out: one, with the fewest queries of the cells
      options:                      # of the method, optimizer and classifier; each for the cells that know it
        optimizer_options.momentum: [0.0, 0.9]

A search is over cells of the grid that differ in nothing but seed, lr, eps, queries and these options. Its candidates are cells
like them that run the first task only. More budget means the same candidates and further ones. Test data is never looked at.

The first value of every option is tried first, with all lr of a list; then one option at a time takes its other values; then two.
A range of lr has no end to wait for: its middle and ends are tried with all options, then the points halfway between, and so on.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from zeroflow.errors import ConfigError, unknown
from zeroflow.grid.rules import check_when
from zeroflow.grid.shared_options import OPTION_SECTIONS, known_options
from zeroflow.optim import optimizers
from zeroflow.trial.config import TrialConfig

_KEYS = ("forward_passes", "validation", "seeds", "when", "lr", "eps", "queries", "options")

_AROUND = 100.0
"""How far a range that nobody named goes from an optimizer's default lr, to either side."""

_HALVINGS = 10
"""How often a range is divided at most."""


@dataclass(frozen=True)
class Listed:
    """Values to be tried in this order."""

    values: tuple[float, ...]

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)

    def rounds(self) -> Iterator[Sequence[float]]:
        """Values that belong together: all."""
        yield self.values


@dataclass(frozen=True)
class Between:
    """A range on a log scale: its middle, its ends, then always halfway between; inside it three digits of each value."""

    low: float
    high: float

    def __iter__(self) -> Iterator[float]:
        return itertools.chain.from_iterable(self.rounds())

    def rounds(self) -> Iterator[Sequence[float]]:
        """Values that belong together: the middle and the ends, then what each further halving adds."""
        seen: set[float] = set()
        halfway = (map(_mirrored, range(2**number, 2 ** (number + 1))) for number in range(1, _HALVINGS))
        for shares in itertools.chain([(0.5, 0.0, 1.0)], halfway):
            fresh = [value for value in dict.fromkeys(map(self._at, shares)) if value not in seen]
            seen.update(fresh)
            yield fresh

    def _at(self, share: float) -> float:
        ends = {0.0: self.low, 1.0: self.high}
        return ends.get(share, float(f"{self.low * (self.high / self.low) ** share:.3g}"))


def _mirrored(number: int) -> float:
    """The binary digits of a number behind the point, the last one first: 1/2 of 1, then 1/4, 3/4, 1/8, 5/8, ..."""
    return sum(int(digit) / 2 ** (place + 1) for place, digit in enumerate(reversed(f"{number:b}")))


Values = Listed | Between


@dataclass(frozen=True)
class SearchSettings:
    """The ``search`` section of a grid file, see the module.

    Attributes:
        lr: by pattern of optimizers; empty: two decades to either side of each one's default.
        eps: likewise; empty: not searched.
        queries: a number, ``"each"``, or None: the fewest of the cells.
        options: values to try by dotted name.
    """

    forward_passes: int
    validation: float = 0.25
    seeds: tuple[int, ...] = (100,)
    when: Mapping[str, Any] = field(default_factory=dict)
    lr: Mapping[str, Values] = field(default_factory=dict)
    eps: Mapping[str, Values] = field(default_factory=dict)
    queries: int | str | None = None
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def lr_of(self, optimizer: str) -> Values | None:
        """Learning rates to try; None: this optimizer is not searched."""
        if not self.lr:
            default = optimizers.get(optimizer).default_lr
            return Between(default / _AROUND, default * _AROUND)
        return _matching(self.lr, optimizer)

    def eps_of(self, optimizer: str) -> Values | None:
        """Perturbation sizes to try; None: the cells' own, or the optimizer has none."""
        return _matching(self.eps, optimizer) if optimizers.get(optimizer).estimator.uses_eps else None

    def options_of(self, config: TrialConfig) -> Mapping[str, tuple[Any, ...]]:
        """Values to try of the options that the cell's method, optimizer and classifier know, by dotted name."""
        if not self.options:
            return {}
        known = known_options(vars(config))
        return {name: values for name, values in self.options.items() if name in known}


def _matching(by_pattern: Mapping[str, Values], optimizer: str) -> Values | None:
    found = [values for pattern, values in by_pattern.items() if fnmatch.fnmatchcase(optimizer, pattern)]
    return found[-1] if found else None


def parse_search(content: Any, where: str) -> SearchSettings:
    """The ``search`` section of a grid file.

    Raises:
        ConfigError: it is wrong; the message names everything that is.
    """
    place = f"{where}: search"
    if not isinstance(content, Mapping):
        raise ConfigError(f"{place}: expected a mapping, got {content!r}")
    for key in content:
        if key not in _KEYS:
            raise unknown("key", key, _KEYS, where=place)
    seeds, share, queries = content.get("seeds", [100]), content.get("validation", 0.25), content.get("queries")
    checks = [
        ("forward_passes", "an integer >= 1", _whole(content.get("forward_passes"))),
        ("validation", "a share between 0 and 1", _positive(share) and share < 1),
        ("seeds", "a list of different integers >= 0", _are_seeds(seeds)),
        ("queries", "an integer >= 1, or 'each'", queries in (None, "each") or _whole(queries)),
    ]
    problems = [
        f"{place}: {key}={content.get(key)!r}: expected {expected}" for key, expected, right in checks if not right
    ]
    parsed: dict[str, Any] = {}
    for key, read in (
        ("lr", partial(_by_optimizer, read=_values)),
        ("eps", partial(_by_optimizer, read=_list_of_values)),
        ("options", _lists_of_options),
    ):
        try:
            parsed[key] = read(content.get(key), f"{place}: {key}")
        except ConfigError as error:
            problems.append(str(error))
    try:
        check_when(content.get("when", {}), place)
        searched = ["lr", *(["eps"] if parsed.get("eps") else []), *parsed.get("options", {})]
        _check_apart(content.get("when", {}), searched, f"{place}: when")
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return SearchSettings(
        content["forward_passes"],
        float(share),
        tuple(seeds),
        content.get("when", {}),
        parsed["lr"],
        parsed["eps"],
        queries,
        parsed["options"],
    )


def _by_optimizer(content: Any, where: str, read: Callable[[Any, str], Values]) -> dict[str, Values]:
    """Values by pattern of optimizers; what stands without any pattern is for all."""
    if content is None:
        return {}
    if not isinstance(content, Mapping) or set(content) & {"from", "to"}:
        return {"*": read(content, where)}
    found, problems = {}, []
    for pattern, values in content.items():
        try:
            if not optimizers.names(pattern):
                raise unknown("optimizer", pattern, optimizers.names(), where=where)
            found[pattern] = read(values, f"{where}: {pattern}")
        except ConfigError as error:
            problems.append(str(error))
    if problems or not found:
        raise ConfigError("\n".join(problems) or f"{where}: expected values, or optimizers with their values")
    return found


def _lists_of_options(content: Any, where: str) -> dict[str, tuple[Any, ...]]:
    """Values by dotted name; whether any cell knows it is seen with the cells."""
    if content is None:
        return {}
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"{where}: expected names such as optimizer_options.momentum with lists, got {content!r}")
    found, problems = {}, []
    for name, values in content.items():
        section, _, option = str(name).partition(".")
        if not option:
            expected = " or ".join(f"{known}.NAME" for known in OPTION_SECTIONS)
            problems.append(f"{where}: {name!r}: expected {expected}")
        elif section not in OPTION_SECTIONS:
            problems.append(str(unknown("section", section, OPTION_SECTIONS, where=f"{where}: {name}")))
        elif not isinstance(values, list) or not values or not all(map(_scalar, values)):
            problems.append(f"{where}: {name}: expected a list of numbers, strings or truth values, got {values!r}")
        else:
            found[name] = tuple(values)
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _check_apart(when: Mapping[str, Any], searched: Sequence[str], where: str) -> None:
    """Refuse a condition on what is searched: once it is chosen, other cells meet the condition."""
    for name in searched:
        if name in when or name.partition(".")[0] in when:
            raise ConfigError(
                f"{where}: {name} is searched, so no condition can be on it; take it out of one of the two"
            )


def _list_of_values(content: Any, where: str) -> Listed:
    if not isinstance(content, list) or not content or not all(map(_positive, content)):
        raise ConfigError(f"{where}: expected a list of numbers > 0, got {content!r}")
    return Listed(tuple(dict.fromkeys(map(float, content))))


def _values(content: Any, where: str) -> Values:
    if not isinstance(content, Mapping):
        if not isinstance(content, list) or not content or not all(map(_positive, content)):
            raise ConfigError(f"{where}: expected {{from: LOW, to: HIGH}} or a list of numbers > 0, got {content!r}")
        return _list_of_values(content, where)
    if set(content) != {"from", "to"} or not all(map(_positive, content.values())):
        raise ConfigError(f"{where}: expected {{from: LOW, to: HIGH}}, two numbers > 0, got {dict(content)!r}")
    low, high = float(content["from"]), float(content["to"])
    if low >= high:
        raise ConfigError(
            f"{where}: from={low:g} is not below to={high:g}"
            + (f"; did you mean {{from: {high:g}, to: {low:g}}}?" if low > high else "")
        )
    return Between(low, high)


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_seeds(values: Any) -> bool:
    return (
        isinstance(values, list) and all(_whole(value, 0) for value in values) and 0 < len(values) == len(set(values))
    )


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
