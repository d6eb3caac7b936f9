"""The ask-and-tell interface: losses are computed elsewhere, by devices, people, a simulator or other machines."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from zeroflow.optim.closure import Closure, scalar
from zeroflow.optim.composition import Composition
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.objective import Elsewhere, Objective, Shift
from zeroflow.optim.precision import rounding
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
    """Parameters whose loss is requested.

    Attributes:
        number: index among the candidates of one ``ask``; the key of its loss in ``tell``.
    """

    number: int
    _objective: Objective = field(repr=False)
    _shift: Shift = field(repr=False)
    _names: Sequence[str] = field(repr=False)

    @property
    def seed(self) -> Seed | None:
        """What another machine with the same parameters rebuilds it from; None: it is not a displacement along one direction."""
        if self._shift.vector is not None or self._objective.theta is not self._objective.flat.vector:
            return None
        number = 0 if self._shift.query is None else self._shift.query
        return Seed(self._objective.directions.seed, self._objective.step, number, float(self._shift.scale))

    def parameters(self) -> dict[str, Tensor]:
        """Copies of its parameters by name (by number, where the optimizer was given none), in the model's precision."""
        with nullcontext() if self._told.showing is self else self.shown():
            found = zip(self._names, self._objective.flat.parameters, strict=True)
            return {name: parameter.detach().clone() for name, parameter in found}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model itself has these parameters inside, and draws the dropout masks of this step.

        Raises:
            RuntimeError: the step has been made, so the parameters have moved; or another candidate is shown.
        """
        told = self._told
        if told.over:
            raise RuntimeError(f"candidate {self.number} of step {self._objective.step}: the step is over, ask again")
        if told.showing is not None:
            raise RuntimeError(
                f"candidate {self.number}: candidate {told.showing.number} is shown, leave its block first"
            )
        with self._objective.shown(self._shift):
            told.showing = self
            try:
                yield
            finally:
                told.showing = None

    @property
    def _told(self) -> ToldLosses:
        assert isinstance(self._objective.closure, ToldLosses)
        return self._objective.closure


class Asked(Exception):
    """A step cannot continue without the losses of these candidates."""

    def __init__(self, candidates: list[Candidate]) -> None:
        super().__init__(f"the losses of {len(candidates)} candidates are awaited: tell them first")
        self.candidates = candidates


class ToldLosses(Elsewhere):
    """The losses passed to ``tell`` so far, by round: most steps have one round, those that try a step have two.

    Args:
        rounds: losses by round.
        names: of the parameters.

    Attributes:
        over: whether the step has been made.
        showing: the candidate whose parameters the model has now.
    """

    showing: Candidate | None = None

    def __init__(self, rounds: Sequence[Sequence[float]], names: Sequence[str]) -> None:
        self.rounds, self.names, self.over = [list(losses) for losses in rounds], list(names), False
        self._answered = 0

    def begin(self) -> None:
        """Restart the step from its beginning."""
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
    _rounding: float
    _told: ToldLosses | None
    """Losses of the current step; None: no step is in progress."""
    _candidates: list[Candidate]
    """Candidates whose losses are awaited."""
    _asked_with: dict[str, Any]
    """Settings that they were made with."""
    seed: int
    queries: int
    param_groups: list[dict[str, Any]]
    step: Callable[..., Tensor]
    _make_step: Callable[[Closure], Tensor]
    _names: Callable[[], list[str]]

    @undisturbed
    def ask(self) -> list[Candidate]:
        """Candidates whose losses the next step needs; the same ones until ``tell`` is called.

        ``tell`` makes the same step as ``step(closure)``, bit for bit, if the losses are those of the closure. Batch statistics
        do not move. A state dict saved in between contains the losses passed to ``tell`` so far.

        Raises:
            TypeError: the optimizer needs derivatives, or a loss of each example.
            ConfigError: as in ``step``.
        """
        estimator = self.composition.estimator
        if estimator.differentiates or estimator.per_example or self.steps < self.composition.first_order_steps:
            raise TypeError(
                "ask: this optimizer needs more than losses of candidates (derivatives, or a loss of each example); "
                "use step(closure), or zo-sgd, zo-adam, es-cma, ..."
            )
        if not self._candidates:
            self._asked_with = self._settings()
            self._told = self._told or ToldLosses([], self._names())
            try:
                self._attempt(self._told, self._make_step)
            except Asked as asked:
                self._candidates = asked.candidates
            assert self._candidates, "a step without a loss"
        return list(self._candidates)

    @undisturbed
    def tell(self, losses: Sequence[Any] | Mapping[int, Any] | Tensor) -> Tensor | None:
        """Make the step from the losses of all candidates of ``ask``.

        Args:
            losses: in the candidates' order, or by ``Candidate.number``. A loss that is None, NaN or left out counts as not
                finite.

        Returns:
            As ``step``; None where the step needs more losses, as -conserve and zo-svrg do: ``ask`` then gives the next
            candidates.

        Raises:
            RuntimeError: ``ask`` was not called before.
            ValueError: losses that do not belong to the candidates; nothing happens.
            TypeError: a loss that is not a real number; nothing happens.
            NonFiniteLoss: as in ``step``.
        """
        if not self._candidates or self._told is None:
            raise RuntimeError("tell: call ask first, candidates = optimizer.ask()")
        if self._told.showing is not None:
            raise RuntimeError(f"tell: candidate {self._told.showing.number} is shown, leave its block first")
        changed = [name for name, value in self._settings().items() if value != self._asked_with[name]]
        changed += ["the parameters"] if self.flat.refresh() else []
        if changed:
            self._told.over, self._told, self._candidates = True, None, []
            raise RuntimeError(f"tell: {changed[0]} changed after ask, so the losses are outdated; ask again")
        self._told.rounds.append(listed(losses, len(self._candidates)))
        self._rounding = rounding(self._told.rounds[-1][-1])
        self._candidates = []
        try:
            return self._attempt(self._told, self.step)
        except Asked as asked:
            self._candidates = asked.candidates
            return None

    def _settings(self) -> dict[str, Any]:
        """What candidates depend on beside the parameters' values."""
        groups = [(group["eps_zo"], len(group["params"])) for group in self.param_groups]
        return {"seed": self.seed, "queries": self.queries, "eps or the parameters of a group": groups}

    def _attempt(self, told: ToldLosses, step: Callable[[Closure], Tensor]) -> Tensor:
        """Make the step from the losses so far; if more are needed, restore the state before it."""
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
        ValueError: their number differs from that of the candidates, or a number is no candidate's.
        TypeError: a loss is not a real number.
    """
    if isinstance(losses, Mapping):
        unknown = [number for number in losses if number not in range(candidates)]
        if unknown:
            raise ValueError(f"tell: loss of candidate {unknown[0]!r}, expected numbers from 0 to {candidates - 1}")
        return [_number(losses.get(number)) for number in range(candidates)]
    if not isinstance(losses, Tensor | Iterable):
        raise TypeError(f"tell: {losses!r}, expected a loss for each of {candidates} candidates")
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
