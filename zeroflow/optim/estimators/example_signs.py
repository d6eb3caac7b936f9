"""The signs that make one direction per example out of the direction of a query."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zeroflow.optim import noise
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.objective import Objective


@dataclass
class Signs:
    """Signs that make the examples' directions different: for a matrix of its rows and columns, else of all components.

    Attributes:
        flat: the parameters.
        seed: first part of the key.
        step: second part of the key.
        query: third part of the key.
        examples: number of examples, N.
    """

    flat: FlatParameters
    seed: int
    step: int
    query: int
    examples: int
    _drawn: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        flat = self.flat
        widths = [self._width(parameter) for parameter in flat.parameters]
        drawn = flat.vector.new_empty(self.examples * sum(widths))
        noise.example_signs_(drawn, self.seed, self.step, self.query)
        parts = torch.split(drawn.view(self.examples, -1), widths, dim=1)
        self._drawn = {id(p): part for p, part in zip(flat.parameters, parts, strict=True)}

    @staticmethod
    def _width(parameter: Tensor) -> int:
        return sum(parameter.shape) if parameter.ndim == 2 else parameter.numel()

    def matrix(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Row signs ``[N, out]`` and column signs ``[N, in]`` of a matrix."""
        rows, columns = torch.split(self._drawn[id(parameter)], list(parameter.shape), dim=1)
        return rows, columns

    def full(self, parameter: Tensor) -> Tensor:
        """Signs of each component ``[N, *shape]``."""
        if parameter.ndim == 2:
            rows, columns = self.matrix(parameter)
            return rows[:, :, None] * columns[:, None, :]
        return self._drawn[id(parameter)].view(self.examples, *parameter.shape)

    def only(self, examples: slice) -> Signs:
        """The signs of some of the examples."""
        other = copy.copy(self)
        other.examples = examples.stop - examples.start
        other._drawn = {key: drawn[examples] for key, drawn in self._drawn.items()}
        return other

    def turned(self, sides: Tensor) -> Signs:
        """The same with each example's displacements times its factor ``[N]``."""
        other = copy.copy(self)
        other._drawn = {}
        for parameter in self.flat.parameters:
            drawn = self._drawn[id(parameter)].clone()
            rows = len(parameter) if parameter.ndim == 2 else None  # of a matrix: its columns' signs stay
            drawn[:, :rows] *= sides.to(drawn)[:, None]
            other._drawn[id(parameter)] = drawn
        return other

    def weighted(self, parameter: Tensor, weights: Tensor) -> Tensor:
        """Sum over examples of ``weights`` ``[N]`` times signs, in the parameter's shape."""
        if parameter.ndim == 2:
            rows, columns = self.matrix(parameter)
            return (rows * weights[:, None]).T @ columns
        return (weights @ self._drawn[id(parameter)]).view(parameter.shape)


def signs_of(objective: Objective, query: int, examples: int) -> Signs:
    """The signs of a query's examples; the last ones are cached, for both sides of a query and its part of the sum."""
    key = (query, examples)
    kept = objective.cache.get("signs")
    if kept is None or kept[0] != key:
        directions = objective.directions
        kept = key, Signs(objective.flat, directions.seed, objective.step, query, examples)
        objective.cache["signs"] = kept
    signs: Signs = kept[1]
    return signs
