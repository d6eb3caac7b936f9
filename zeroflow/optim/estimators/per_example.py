"""One direction for every example of the mini-batch, all in the same two forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zeroflow.optim import noise
from zeroflow.optim.estimators.estimator import Estimate, Estimator
from zeroflow.optim.objective import HERE, Numbers, Objective, Shift, mean_finite, scalar


@dataclass(frozen=True)
class PerExample(Estimator):
    """Two-sided differences with a direction of its own for each of the batch's N examples.

    g_n = (l_n(theta + eps z_n) - l_n(theta - eps z_n)) / 2 eps with l_n the loss of example n;
    estimate = mean over n (and over q repetitions) of g_n z_n.

    The directions of a weight ``[out, in]`` are z_n = Z * (r_n s_n^T), elementwise, with Z, r_n and s_n random signs: any two
    are uncorrelated, and one more matrix product per layer evaluates all of them (Wen et al. 2018, Flipout, Eq. 4). Other
    parameters get a sign for each component and example. N slopes instead of one make the estimate better for the same
    forward passes, by up to sqrt(N) in its cosine to the gradient.

    The closure returns the losses ``[N]`` (``reduction="none"``), and dimension 0 of the model's activations is the example.
    Examples must not meet: no batch statistics. A closure that returns a single number gets plain SPSA along signs, with a
    warning. Source: per-example directions of GRZO and EVA-0 (2026). Cost: 2q forward passes; at most one more where the
    size of the mini-batch changes.
    """

    per_example: ClassVar[bool] = True
    cost: ClassVar[str] = "2q"
    distribution: ClassVar[str] = "rademacher"  # type: ignore[misc]

    def forwards(self, queries: int) -> int:
        return 2 * queries

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        census = objective.memory.setdefault("examples", Census())

        def evaluate(index: int) -> Numbers:
            query, scale = index // 2, (1.0, -1.0)[index % 2]
            with torch.no_grad():
                if census.examples is None:
                    census.count(objective)
                if census.examples == 0:
                    objective.move(Shift(scale, query))
                    return (scalar(objective.call()),)
                try:
                    return _losses(objective, query, scale, census.examples)
                except _OtherSize:
                    census.count(objective)
                try:
                    return _losses(objective, query, scale, census.examples)
                except _OtherSize as error:
                    raise TypeError(
                        f"zo-per-example: {census.examples} losses, but a layer saw an input of shape {error}; dimension 0 of "
                        "every activation must be the example"
                    ) from None

        answers = objective.run(2 * queries, evaluate, width=None)
        losses = torch.tensor(answers, dtype=torch.float64)
        slopes = (losses[::2] - losses[1::2]) / 2
        return ExampleSlopes(mean_finite(losses.flatten().tolist()), objective, slopes)


@dataclass
class Census:
    """How many examples the last mini-batch had: 0 where the closure returns a single number, None before the first."""

    examples: int | None = None

    def count(self, objective: Objective) -> None:
        """Ask the closure at theta, one more forward pass."""
        objective.move(HERE)
        answer = objective.call()
        objective.forwards += 1
        if isinstance(answer, Tensor) and answer.ndim == 1:
            self.examples = len(answer) if len(answer) > 1 else 0
        else:
            self.examples = 0
            scalar(answer)
            warnings.warn(
                "zo-per-example: the closure returns one loss for the whole mini-batch, so there is one direction for all "
                'of it (plain SPSA); return a loss for each example, such as cross_entropy(..., reduction="none")',
                stacklevel=2,
            )


@dataclass
class ExampleSlopes(Estimate):
    """Slopes by query and example, and the mean of slope times direction.

    Attributes:
        loss: see ``Estimate``. objective: regenerates the directions. slopes: times eps, ``[q, N]``; N = 1 where the closure
            returns a single number. Non-finite ones are left out of the mean.
    """

    loss: float
    objective: Objective
    slopes: Tensor

    @property
    def usable(self) -> bool:
        return bool(self.slopes.isfinite().any())

    def vector(self) -> Tensor:
        return self._combine(self.slopes).div_(self.objective.eps)

    def scalar_sign(self) -> Tensor:
        return self._combine(self.slopes.sign())

    def _combine(self, weights: Tensor) -> Tensor:
        kept = self.slopes.isfinite()
        weights = torch.where(kept, weights, 0.0) / kept.sum()
        examples = weights.shape[1]
        total = torch.zeros_like(self.objective.flat.vector)
        for query, row in enumerate(weights):
            base = self.objective.direction(query)
            if examples == 1:
                total.add_(base, alpha=float(row[0]))
                continue
            on = row.to(base)
            signs = Signs(self.objective, query, examples)
            for parameter, place in self.objective.flat.slices():
                mean = signs.weighted(parameter, on)
                total[place] += base[place] * mean.reshape(-1)
        return total


@dataclass
class Signs:
    """The signs that tell the examples' directions apart: for a matrix those of its rows and columns, else all.

    Attributes:
        objective: has the key. query: number of the direction. examples: N.
    """

    objective: Objective
    query: int
    examples: int
    _drawn: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        flat = self.objective.flat
        widths = [self._width(parameter) for parameter in flat.parameters]
        drawn = flat.vector.new_empty(self.examples * sum(widths))
        noise.example_signs_(drawn, self.objective.directions.seed, self.objective.step, self.query)
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

    def weighted(self, parameter: Tensor, weights: Tensor) -> Tensor:
        """Sum over examples of ``weights`` ``[N]`` times signs, in the parameter's shape."""
        if parameter.ndim == 2:
            rows, columns = self.matrix(parameter)
            return (rows * weights[:, None]).T @ columns
        return (weights @ self._drawn[id(parameter)]).view(parameter.shape)


class _OtherSize(Exception):
    """The mini-batch has another number of examples than the last one; the argument is the shape that shows it."""


def _losses(objective: Objective, query: int, scale: float, examples: int) -> Numbers:
    """Losses of all examples, each at its own place: theta + scale * eps * z_n."""
    objective.move(HERE)
    with _Displaced(objective, query, scale, examples):
        answer = objective.call()
    if not isinstance(answer, Tensor) or answer.ndim != 1:
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise TypeError(f"closure: expected one loss per example, [{examples}], got {shape}")
    if len(answer) != examples:
        raise _OtherSize(tuple(answer.shape))
    return tuple(answer.as_subclass(Tensor).double().tolist())


class _PerExampleTensor(Tensor):
    """A tensor that depends on parameters alone, one version for each example: dimension 0 is the example."""


class _Displaced(TorchFunctionMode):
    """While active, each example sees its own displaced parameters.

    A linear layer's weight costs one more product for all examples. Any other function of a parameter is evaluated by
    ``torch.vmap`` with a displaced copy for each example.
    """

    def __init__(self, objective: Objective, query: int, scale: float, examples: int) -> None:
        super().__init__()
        flat, base = objective.flat, objective.direction(query).clone()
        base.mul_(objective.eps).mul_(scale)
        self.examples, self.signs = examples, Signs(objective, query, examples)
        self.parameters = {
            id(p): (p, base[place].view(p.shape).to(p.dtype)) for p, place in flat.slices()
        }  # parameter and displacement before signs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and self._is_parameter(args[1]):
            return self._linear(*args, **kwargs)
        inputs = list(_tensors((args, kwargs)))
        if _asks_only(func):
            first = [t.as_subclass(Tensor)[0] if isinstance(t, _PerExampleTensor) else t for t in inputs]
            return func(*_replaced(args, iter(first)), **kwargs)
        if not any(self._is_parameter(t) or isinstance(t, _PerExampleTensor) for t in inputs):
            return func(*args, **kwargs)
        return self._mapped(func, args, kwargs, inputs)

    def _is_parameter(self, value: Any) -> bool:
        return id(value) in self.parameters

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(x, _PerExampleTensor):
            return self._mapped(F.linear, (x, weight, bias), {}, [t for t in (x, weight, bias) if t is not None])
        self._check(x)
        weight, displacement = self.parameters[id(weight)]
        rows, columns = (s.to(x.dtype) for s in self.signs.matrix(weight))
        middle = (1,) * (x.ndim - 2)
        moved = F.linear(x * columns.view(self.examples, *middle, -1), displacement)
        moved = moved.mul_(rows.view(self.examples, *middle, -1))
        if bias is not None and self._is_parameter(bias):
            _, shift = self.parameters[id(bias)]
            moved += (shift * self.signs.full(bias).to(x.dtype)).view(self.examples, *middle, -1)
        elif isinstance(bias, _PerExampleTensor):
            moved, bias = moved + bias.as_subclass(Tensor).view(self.examples, *middle, -1), None
        return moved.add_(F.linear(x, weight, bias))

    def _mapped(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """``func`` for every example by ``torch.vmap``: over displaced parameters and over activations."""
        dims: list[int | None] = []
        values: list[Tensor] = []
        meets = False
        for tensor in inputs:
            if self._is_parameter(tensor):
                parameter, displacement = self.parameters[id(tensor)]
                tensor = parameter + displacement * self.signs.full(parameter).to(parameter.dtype)
                dims.append(0)
            elif isinstance(tensor, _PerExampleTensor):
                tensor = tensor.as_subclass(Tensor)
                dims.append(0)
            elif not isinstance(tensor, nn.Parameter) and tensor.ndim and len(tensor) == self.examples:
                meets = True  # an activation: dimension 0 is the example
                dims.append(0)
            else:
                dims.append(None)
            values.append(tensor)

        def one(*given: Tensor) -> Any:
            rest = iter(given)
            return func(*_replaced(args, rest), **_replaced(kwargs, rest))

        result = torch.vmap(one, in_dims=tuple(dims), randomness="same")(*values)
        return result if meets or not isinstance(result, Tensor) else result.as_subclass(_PerExampleTensor)

    def _check(self, x: Tensor) -> None:
        if x.ndim < 2 or len(x) != self.examples:
            raise _OtherSize(tuple(x.shape))


def _asks_only(func: Any) -> bool:
    """Whether a function asks for a property of a tensor (shape, dtype...), which displacement does not change."""
    return getattr(func, "__name__", "") == "__get__" or func in (Tensor.size, Tensor.dim, Tensor.numel)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _replaced(value: Any, rest: Iterator[Tensor]) -> Any:
    """``value`` with its tensors replaced by the next ones, in the order of ``_tensors``."""
    if isinstance(value, Tensor):
        return next(rest)
    if isinstance(value, list | tuple):
        return type(value)(_replaced(part, rest) for part in value)
    if isinstance(value, dict):
        return {key: _replaced(part, rest) for key, part in value.items()}
    return value
