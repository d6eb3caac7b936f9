"""Step 2 of a step: what a direction is."""

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


@dataclass
class Step:
    """What is known while a step is made.

    Attributes:
        objective: may be asked for more. estimator, queries: made the estimate. estimate: of this step.
        memory: of the direction, kept from step to step and part of the optimizer's state; plain numbers and tensors.
        full: closures of mini-batches that are the whole training data together; empty where there are none.
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
    """Estimators it works with; empty: all."""
    cost: ClassVar[Cost] = Cost()
    """Forward passes of one step besides the estimator's."""
    kept: ClassVar[int] = 0
    """Vectors ``[d]`` that it keeps from step to step."""
    keeps_mean: ClassVar[bool] = True
    """Whether it leaves the mean of the estimates where it is."""
    keeps_span: ClassVar[bool] = True
    """Whether what it makes of a combination of the step's directions is still one."""

    snapshot_every: int = 0
    """Steps from one snapshot of the parameters to the next; 0: it takes none."""

    def snapshot_forwards(self, queries: int, steps: int, batches: int) -> int:
        """Further forward passes in so many steps, where the training data is so many mini-batches."""
        return 0

    @abstractmethod
    def __call__(self, vector: Tensor, step: Step) -> Tensor:
        """The new vector ``[d]`` from ``vector`` ``[d]``, which it may work on in place."""


@dataclass(frozen=True)
class Identity(Direction):
    """The estimate itself (ZO-SGD, ZO-Adam). Cost: no forward pass."""

    def __call__(self, vector: Tensor, step: Step) -> Tensor:
        return vector
