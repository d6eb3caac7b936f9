"""The base class of directions, step 2 of an optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from zeroflow.optim.closure import Closure
from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.estimator import Estimate, Estimator
from zeroflow.optim.objective import Objective

FULL_FORWARDS = "full_forwards"
"""Key of a direction's memory: the forward passes that it made on closures of ``Step.full``."""


@dataclass
class Step:
    """Context of one optimizer step.

    Attributes:
        objective: evaluates further losses.
        estimator: made the estimate.
        queries: number of directions of the estimate.
        estimate: the gradient estimate of this step.
        memory: the direction's own state, kept from step to step and saved; plain numbers and tensors.
        full: closures of mini-batches that together are the whole training data; may be empty.
    """

    objective: Objective
    estimator: Estimator
    queries: int
    estimate: Estimate
    memory: dict[str, Any] = field(default_factory=dict)
    full: Sequence[Closure] = ()


class Direction(ABC):
    """Turns the estimate into the vector that the update treats as the gradient. Its dataclass fields are options."""

    before_history: ClassVar[bool] = False
    """Whether it needs the estimate as it was measured, before it is mixed with earlier ones."""
    needs: ClassVar[tuple[type[Estimator], ...]] = ()
    """Supported estimators; empty: all."""
    cost: ClassVar[Cost] = Cost()
    """Forward passes of one step besides the estimator's."""
    kept: ClassVar[int] = 0
    """Number of vectors ``[d]`` that it keeps from step to step."""
    keeps_mean: ClassVar[bool] = True
    """Whether it preserves the mean of the estimates."""
    keeps_span: ClassVar[bool] = True
    """Whether it maps linear combinations of the step's directions to such combinations."""

    snapshot_every: int = 0
    """Steps from one snapshot of the parameters to the next; 0: it takes none."""

    def snapshot_forwards(self, queries: int, steps: int, batches: int) -> int:
        """Further forward passes in a number of steps, for training data of a number of mini-batches."""
        return 0

    @abstractmethod
    def __call__(self, vector: Tensor, step: Step) -> Tensor:
        """The new vector ``[d]`` from ``vector`` ``[d]``, which may be modified in place."""


@dataclass(frozen=True)
class Identity(Direction):
    """The estimate itself (ZO-SGD, ZO-Adam). Cost: no forward pass."""

    def __call__(self, vector: Tensor, step: Step) -> Tensor:
        return vector
