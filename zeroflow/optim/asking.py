"""Ask and tell: the losses of a step are made elsewhere, by devices, people, a simulator, other machines."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from zeroflow.optim.closure import Closure, scalar
from zeroflow.optim.composition import Composition
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.objective import Elsewhere, Objective, Shift
from zeroflow.optim.surroundings import undisturbed
from zeroflow.optim.symptoms import Symptoms


class Seed(NamedTuple):
    """A candidate as a few numbers: theta + scale * eps * z.

    z is the direction of ``query`` in ``step`` under ``seed``, as ``composition.estimator.directions`` makes it (of most names
    ``zeroflow.optim.noise.Directions``); scale 0 is theta.
    """

    seed: int
    step: int
    query: int
    scale: float


@dataclass(frozen=True)
class Candidate:
    """Parameters whose loss is asked for.

    Attributes:
        number: among the candidates of one ``ask``; what its loss is told under.
    """

    number: int
    _objective: Objective = field(repr=False)
    _shift: Shift = field(repr=False)
    _names: Sequence[str] = field(repr=False)

    @property
    def seed(self) -> Seed | None:
        """What another machine with the same parameters makes it from; None where it is no displacement along one direction."""
        if self._shift.vector is not None or self._objective.theta is not self._objective.flat.vector:
            return None
        number = 0 if self._shift.query is None else self._shift.query
        return Seed(self._objective.directions.seed, self._objective.step, number, float(self._shift.scale))

    def parameters(self) -> dict[str, Tensor]:
        """Copies of its parameters by name (by number, where the optimizer was given none), in the model's precision."""
        with self.shown():
            found = zip(self._names, self._objective.flat.parameters, strict=True)
            return {name: parameter.detach().clone() for name, parameter in found}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model itself has these parameters inside, and draws the dropout masks of this step.

        Raises:
            RuntimeError: its loss was told already, and the parameters have moved.
        """
        assert isinstance(self._objective.closure, Told)
        if self._objective.closure.over:
            raise RuntimeError(f"candidate {self.number} of step {self._objective.step}: the step is over, ask again")
        with self._objective.shown(self._shift):
            yield


class Asked(Exception):
    """A step cannot go on without the losses of these candidates."""

    def __init__(self, candidates: list[Candidate]) -> None:
        super().__init__(f"the losses of {len(candidates)} candidates are awaited: tell them first")
        self.candidates = candidates


class Told(Elsewhere):
    """The losses of a step told so far, round after round: most steps have one round, those that try a step two.

    Args:
        rounds: losses by round. names: of the parameters.

    Attributes:
        over: whether the step has been made.
    """

    def __init__(self, rounds: Sequence[Sequence[float]], names: Sequence[str]) -> None:
        self.rounds, self.names, self.over = [list(losses) for losses in rounds], list(names), False
        self._answered = 0

    def begin(self) -> None:
        """The step is made from its beginning."""
        self._answered = 0

    def losses(self, objective: Objective, shifts: Sequence[Shift]) -> list[float]:
        if self._answered == len(self.rounds):
            # Of its own: what asks may change the objective before it asks again.
            around = objective.at(objective.theta)
            raise Asked([Candidate(number, around, shift, self.names) for number, shift in enumerate(shifts)])
        self._answered += 1
        return list(self.rounds[self._answered - 1])


class AskTell:
    """An optimizer's ``ask`` and ``tell``."""

    composition: Composition
    flat: FlatParameters
    steps: int
    skipped: int
    _memory: dict[str, Any]
    _adapted: dict[str, Any]
    _symptoms: Symptoms
    _told: Told | None
    """Of the step whose losses are made elsewhere."""
    _candidates: list[Candidate]
    """Those that are awaited."""
    step: Callable[..., Tensor]
    _made: Callable[[Closure], Tensor]
    _names: Callable[[], list[str]]

    @undisturbed
    def ask(self) -> list[Candidate]:
        """Places whose losses the next step needs, where losses are made elsewhere; the same ones until these are told.

        ``tell`` makes the step that ``step(closure)`` would make, to the bit, if the losses are those that the closure gives.
        Batch statistics do not move. A state dict between the two remembers what was told.

        Raises:
            TypeError: the optimizer wants derivatives, or looks into single examples. ConfigError: as ``step``.
        """
        estimator = self.composition.estimator
        if estimator.differentiates or estimator.per_example or self.steps < self.composition.first_order_steps:
            raise TypeError(
                "ask: this optimizer wants more than losses of whole places (derivatives, or a loss of each example); "
                "use step(closure), or zo-sgd, zo-adam, es-cma, ..."
            )
        if not self._candidates:
            self._told = self._told or Told([], self._names())
            try:
                self._attempt(self._told, self._made)
            except Asked as asked:
                self._candidates = asked.candidates
            assert self._candidates, "a step without a loss"
        return list(self._candidates)

    @undisturbed
    def tell(self, losses: Sequence[Any] | Mapping[int, Any] | Tensor) -> Tensor | None:
        """Make the step from the losses of all candidates that ``ask`` gave.

        Args:
            losses: in the candidates' order, or by ``Candidate.number`` in any order. None, NaN, or none at all: it is missing,
                and counts like a loss that is not finite.

        Returns:
            As ``step``; None where the step needs more, as -conserve and zo-svrg do: ``ask`` then gives its next candidates.

        Raises:
            RuntimeError: nothing was asked. ValueError, TypeError: losses that do not belong to the candidates; nothing happens.
            NonFiniteLoss: as ``step``.
        """
        if not self._candidates or self._told is None:
            raise RuntimeError("tell: nothing was asked; candidates = optimizer.ask() first")
        if self.flat.refresh():
            self._told.over, self._told, self._candidates = True, None, []
            raise RuntimeError(
                "tell: the parameters have been changed since ask, and the losses are of others; ask again"
            )
        self._told.rounds.append(listed(losses, len(self._candidates)))
        self._candidates = []
        try:
            return self._attempt(self._told, self.step)
        except Asked as asked:
            self._candidates = asked.candidates
            return None

    def _attempt(self, told: Told, step: Callable[[Closure], Tensor]) -> Tensor:
        """A step from what was told; where that is not enough, nothing has happened."""
        kept = copy.deepcopy((self._memory, self._adapted, self._symptoms)) if told.rounds else None
        skipped = self.skipped
        told.begin()
        try:
            loss = step(told)
        except Asked:
            if kept is not None:
                self._memory, self._adapted, self._symptoms = kept
            self.skipped = skipped
            raise
        except Exception:
            told.over, self._told = True, None
            raise
        told.over, self._told = True, None
        return loss


def listed(losses: Any, candidates: int) -> list[float]:
    """Losses in the candidates' order, NaN where one is missing.

    Raises:
        ValueError: not as many as candidates, or of a candidate that there is not. TypeError: one is no real number.
    """
    if isinstance(losses, Mapping):
        unknown = [number for number in losses if number not in range(candidates)]
        if unknown:
            raise ValueError(f"tell: loss of candidate {unknown[0]!r}, expected numbers from 0 to {candidates - 1}")
        return [_number(losses.get(number)) for number in range(candidates)]
    values = list(losses.tolist() if isinstance(losses, Tensor) else losses)
    if len(values) != candidates:
        raise ValueError(
            f"tell: {len(values)} losses of {candidates} candidates; None, or a mapping by number, tells which are missing"
        )
    return [_number(loss) for loss in values]


def _number(loss: Any) -> float:
    try:
        return math.nan if loss is None else scalar(loss.detach() if isinstance(loss, Tensor) else loss)
    except TypeError as error:
        raise TypeError(str(error).replace("closure:", "tell:")) from None
