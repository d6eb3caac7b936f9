"""One direction for every example of the mini-batch, all in the same two forward passes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from zeroflow.optim import noise
from zeroflow.optim.closure import mean_finite, scalar
from zeroflow.optim.cost import Cost
from zeroflow.optim.estimators.estimator import Estimate, Estimator
from zeroflow.optim.executor import Numbers
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.objective import HERE, Objective, Shift


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
    Examples must not meet: no batch statistics. This is verified on one example for every new size of a mini-batch. A closure
    that returns a single number gets plain SPSA along signs, with a warning.

    With ``normalize`` the g_n of a repetition are divided by their standard deviation over n (about their mean, with 1/N), so that lr
    does not depend on the scale of the loss or of eps; of a single example the sign is left.
    Source: per-example directions of GRZO and EVA-0 (2026); ``normalize``: Tan et al. 2026 (GRZO, arXiv:2606.02857), whose lr is 2 eps
    times the one here. Cost: 2q forward passes, and 3 more to count and verify a
    mini-batch of a new size (1 more where the size has been seen).
    """

    per_example: ClassVar[bool] = True
    cost: ClassVar[Cost] = Cost(2)
    distribution: ClassVar[str] = "rademacher"  # type: ignore[misc]

    normalize: bool = False

    @property
    def unbiased(self) -> bool:
        return not self.normalize

    def estimate(self, objective: Objective, queries: int) -> Estimate:
        census = objective.memory.setdefault("census", Census())

        def evaluate(index: int) -> Numbers:
            extra = objective.forwards
            if not objective.share:
                return ()
            with torch.no_grad():
                losses = census.losses(objective, index // 2, (1.0, -1.0)[index % 2])
            return (objective.share * (objective.forwards - extra), *losses)

        before = objective.forwards
        answers = objective.run(2 * queries, evaluate, width=None)
        # From the answers alone, so that all processes and a replay count alike and know what has been verified.
        objective.forwards = before + 2 * queries + round(max(answer[0] for answer in answers))
        losses = torch.tensor([answer[1:] for answer in answers], dtype=torch.float64)
        census.examples = losses.shape[1]
        census.verified.add(census.examples)
        slopes = (losses[::2] - losses[1::2]) / 2
        return ExampleSlopes(mean_finite(losses.flatten().tolist()), objective, slopes, self.normalize)


@dataclass
class Census:
    """How many losses the closure gives, and for which numbers of them displaced evaluation has been verified.

    Attributes:
        examples: of the last mini-batch, also where this process looks at a slice of it; 1 where the closure gives a single
            number; None before the first.
        verified: sizes of mini-batches.
    """

    examples: int | None = None
    verified: set[int] = field(default_factory=set)
    _warned: bool = False

    def losses(self, objective: Objective, query: int, scale: float) -> Numbers:
        """Losses of all examples at theta + scale * eps * z_n, or the one loss of a mini-batch that has only one.

        Of the slice that this process looks at, so that the sum over shards has all: zero for other examples, and the one
        loss weighted.
        """
        counted = False
        for _ in range(2):
            if self.examples is None:
                self._count(objective)
                counted = True
            assert self.examples is not None
            try:
                if self.examples == 1:
                    objective.move(Shift(scale, query))
                    return (objective.share * scalar(_several(objective, objective.call(), 1)),)
                if self.examples not in self.verified:
                    self._verify(objective, query)
                return _displaced(objective, query, scale, self.examples)
            except _OtherSize as error:
                found, self.examples = error, None
            except (TypeError, RuntimeError, ValueError, IndexError):
                if counted:
                    raise
                self.examples = None  # a mini-batch of another size than the last one can show in any layer
        raise TypeError(
            f"zo-per-example: the closure gives one number of losses, a layer's input has shape {found}; dimension 0 of every "
            "activation must be the example"
        )

    def _count(self, objective: Objective) -> None:
        objective.move(HERE)
        answer = objective.call()
        objective.forwards += 1
        self.examples = objective.whole(len(answer)) if isinstance(answer, Tensor) and answer.ndim == 1 else 1
        if not (isinstance(answer, Tensor) and answer.ndim == 1) and not self._warned:
            scalar(answer)
            self._warned = True
            warnings.warn(
                "zo-per-example: the closure returns one loss for the whole mini-batch, so there is one direction for all "
                'of it (plain SPSA); return a loss for each example, such as cross_entropy(..., reduction="none")',
                stacklevel=2,
            )

    def _verify(self, objective: Objective, query: int) -> None:
        """Compare the last own example's loss with that of the mini-batch at this example's own place.

        Far from theta, so that a difference shows: they are the same function unless examples meet, or something that only
        happens to have the batch's size was taken for it.
        """
        examples, far = self.examples or 1, 30.0
        last = objective.own(examples).stop - 1
        fast = _displaced(objective, query, far, examples)[last]
        signs, place = signs_of(objective, query, examples), objective.direction(query).clone()
        for parameter, part in objective.flat.slices():
            place[part] *= signs.full(parameter)[last].reshape(-1)
        objective.move(Shift(far, vector=place * objective.eps))
        slow = float(_several(objective, objective.call(), examples)[-1])
        objective.forwards += 2
        tolerance = 1e-3 if objective.flat.half is None else 5e-2
        if math.isfinite(fast) and math.isfinite(slow) and abs(fast - slow) > tolerance * (1 + abs(slow)):
            raise TypeError(
                f"zo-per-example: with a direction of its own the last example's loss is {fast:.6g}, evaluated alone "
                f"{slow:.6g}. Examples meet (batch statistics, attention over dimension 0), or a tensor that is no "
                f"activation has the length of the mini-batch ({examples}); take zo-sgd or another batch size"
            )
        self.verified.add(examples)


@dataclass
class ExampleSlopes(Estimate):
    """Slopes by query and example, and the mean of slope times direction.

    Attributes:
        loss: see ``Estimate``. objective: regenerates the directions. slopes: times eps, ``[q, N]``; N = 1 where the closure
            returns a single number. Non-finite ones are left out of the mean.
        normalize: whether the slopes of a query are divided by their standard deviation.
    """

    loss: float
    objective: Objective
    slopes: Tensor
    normalize: bool = False

    @property
    def usable(self) -> bool:
        return bool(self.slopes.isfinite().any())

    def differences(self) -> list[float]:
        return list(self.slopes[self.slopes.isfinite()].tolist())

    def vector(self) -> Tensor:
        if self.normalize:
            return self._combine(self.slopes / self._spread())
        return self._combine(self.slopes).div_(self.objective.eps)

    def _spread(self) -> Tensor:
        """Standard deviation of each query's finite slopes ``[q, 1]``; of a single one its size; infinite where it is zero."""
        kept = self.slopes.isfinite()
        count = kept.sum(1, keepdim=True)
        mean = torch.where(kept, self.slopes, 0.0).sum(1, keepdim=True) / count
        about = torch.where(count > 1, mean, 0.0)
        spread = torch.where(kept, self.slopes - about, 0.0).square().sum(1, keepdim=True).div(count).sqrt()
        return torch.where(spread > 0, spread, math.inf)

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
            signs = signs_of(self.objective, query, examples)
            for parameter, place in self.objective.flat.slices():
                mean = signs.weighted(parameter, on)
                total[place] += base[place] * mean.reshape(-1)
        return total


@dataclass
class Signs:
    """The signs that tell the examples' directions apart: for a matrix those of its rows and columns, else all.

    Attributes:
        flat: the parameters. seed, step, query: key. examples: N.
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
        """Those of some of the examples."""
        other = copy.copy(self)
        other.examples = examples.stop - examples.start
        other._drawn = {key: drawn[examples] for key, drawn in self._drawn.items()}
        return other

    def weighted(self, parameter: Tensor, weights: Tensor) -> Tensor:
        """Sum over examples of ``weights`` ``[N]`` times signs, in the parameter's shape."""
        if parameter.ndim == 2:
            rows, columns = self.matrix(parameter)
            return (rows * weights[:, None]).T @ columns
        return (weights @ self._drawn[id(parameter)]).view(parameter.shape)


def signs_of(objective: Objective, query: int, examples: int) -> Signs:
    """The signs of a query's examples; the last ones stay for the step: for both sides of a query and its part of the sum."""
    key = (query, examples)
    kept = objective.cache.get("signs")
    if kept is None or kept[0] != key:
        directions = objective.directions
        kept = key, Signs(objective.flat, directions.seed, objective.step, query, examples)
        objective.cache["signs"] = kept
    signs: Signs = kept[1]
    return signs


class _OtherSize(Exception):
    """The mini-batch has another number of examples than the last one; the argument is the shape that shows it."""


def _several(objective: Objective, answer: Tensor | float, examples: int) -> Tensor:
    """A closure's answer as losses of its part of a mini-batch of so many examples; of one it may be a number."""
    if examples == 1 and not (isinstance(answer, Tensor) and answer.ndim):
        return torch.tensor([scalar(answer)], dtype=torch.float64)
    if not isinstance(answer, Tensor) or answer.ndim != 1:
        found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise TypeError(f"closure: expected one loss per example, [{examples}], got {found}")
    own = objective.own(examples)
    if len(answer) != own.stop - own.start or objective.whole(len(answer)) != examples:
        raise _OtherSize(tuple(answer.shape))
    return answer


def _displaced(objective: Objective, query: int, scale: float, examples: int) -> Numbers:
    """Losses of all examples, each at its own place: theta + scale * eps * z_n; zero for those of other processes."""
    own = objective.own(examples)
    if objective.whole(own.stop - own.start) != examples:
        raise _OtherSize((objective.whole(own.stop - own.start),))
    objective.move(HERE)
    with _Displaced(objective, query, scale, examples):
        answer = objective.call()
    losses = torch.zeros(examples, dtype=torch.float64)
    losses[own] = _several(objective, answer, examples).as_subclass(Tensor).to(losses)
    return tuple(losses.tolist())


class _PerExampleTensor(Tensor):
    """A tensor that depends on parameters alone, one version for each example: dimension 0 is the example."""


class _Displaced(TorchFunctionMode):
    """While active, each example sees its own displaced parameters.

    A linear layer's weight costs one more product for all examples. Any other function of a parameter is evaluated by
    ``torch.vmap`` with a displaced copy for each example.
    """

    def __init__(self, objective: Objective, query: int, scale: float, examples: int) -> None:
        super().__init__()
        flat, base = objective.flat, objective.direction(query) * objective.eps
        base.mul_(scale)
        self.signs = signs_of(objective, query, examples).only(objective.own(examples))
        self.examples = self.signs.examples
        # Each parameter and its displacement before signs.
        self.parameters = {
            id(p): (p, part.to(p.dtype)) for p, part in zip(flat.parameters, flat.views(base), strict=True)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and self._is_parameter(args[1]):
            return self._linear(*args, **kwargs)
        if func is torch.addmm and not kwargs and (rows := self._rows(*args)) is not None:
            return rows
        if not self._concerned(args) and not (kwargs and self._concerned(tuple(kwargs.values()))):
            return func(*args, **kwargs)
        inputs = list(_tensors((args, kwargs)))
        if func in _ASKS_ONLY:
            first = [t.as_subclass(Tensor)[0] if isinstance(t, _PerExampleTensor) else t for t in inputs]
            return func(*_replaced(args, iter(first)), **_replaced(kwargs, iter(first)))
        try:
            return self._mapped(func, args, kwargs, inputs)
        except _OtherSize:
            raise
        except Exception as error:
            raise TypeError(
                f"zo-per-example: {getattr(func, '__name__', func)} of a trainable parameter cannot be evaluated for each "
                f"example ({error}); take zo-sgd, or train other layers"
            ) from error

    def _is_parameter(self, value: Any) -> bool:
        return id(value) in self.parameters

    def _concerned(self, values: Any) -> bool:
        """Whether any of the values is a parameter or made of parameters alone; most calls have none, so this is quick."""
        for value in values:
            if id(value) in self.parameters or type(value) is _PerExampleTensor:
                return True
            if isinstance(value, list | tuple | dict) and self._concerned(
                value.values() if isinstance(value, dict) else value
            ):
                return True
        return False

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(input, _PerExampleTensor) or isinstance(bias, _PerExampleTensor):
            inputs = [t for t in (input, weight, bias) if t is not None]
            return cast(Tensor, self._mapped(F.linear, (input, weight, bias), {}, inputs))
        if input.ndim < 2 or len(input) != self.examples:
            raise _OtherSize(tuple(input.shape))
        weight, displacement = self.parameters[id(weight)]
        rows, columns = (s.to(input.dtype) for s in self.signs.matrix(weight))
        shape = (self.examples, *(1,) * (input.ndim - 2), -1)
        moved = F.linear(input * columns.view(shape), displacement).mul_(rows.view(shape))
        if bias is not None and self._is_parameter(bias):
            _, shift = self.parameters[id(bias)]
            moved += (shift * self.signs.full(bias).to(input.dtype)).view(shape)
        return moved.add_(F.linear(input, weight, bias))

    def _rows(self, bias: Tensor, input: Tensor, weight: Tensor) -> Tensor | None:
        """``addmm`` with a weight ``[in, out]``, rows being the positions of one example after the other; None: it is not that.

        So is Hugging Face's Conv1D, a linear layer with its weight the other way around.
        """
        if not self._is_parameter(weight) or self._concerned((input,)) or type(bias) is _PerExampleTensor:
            return None
        if len(input) == self.examples or len(input) % self.examples:
            return None
        weight, displacement = self.parameters[id(weight)]
        rows, columns = (s.to(input.dtype)[:, None] for s in self.signs.matrix(weight))
        moved = ((input.view(self.examples, -1, len(weight)) * rows) @ displacement).mul_(columns)
        if self._is_parameter(bias):
            bias, shift = self.parameters[id(bias)]
            moved += (shift * self.signs.full(bias).to(input.dtype))[:, None]
        return moved.view(len(input), -1).add_(torch.addmm(bias, input, weight))

    def _mapped(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """``func`` for every example by ``torch.vmap``: over displaced parameters and over activations.

        An activation goes in as a batch of one, so that ``func`` finds the dimensions it expects.
        """
        dims: list[int | None] = []
        values: list[Tensor] = []
        single: list[bool] = []
        for tensor in inputs:
            activation = False
            if self._is_parameter(tensor):
                parameter, displacement = self.parameters[id(tensor)]
                tensor = parameter + displacement * self.signs.full(parameter).to(parameter.dtype)
                dims.append(0)
            elif isinstance(tensor, _PerExampleTensor):
                tensor = tensor.as_subclass(Tensor)
                dims.append(0)
            elif not isinstance(tensor, nn.Parameter) and tensor.ndim and len(tensor) == self.examples:
                activation = True
                dims.append(0)
            else:
                dims.append(None)
            values.append(tensor)
            single.append(activation)
        meets = any(single)

        def one(*given: Tensor) -> Any:
            rest = iter([t.unsqueeze(0) if alone else t for t, alone in zip(given, single, strict=True)])
            result = func(*_replaced(args, rest), **_replaced(kwargs, rest))
            return (
                tree_map(lambda t: t.squeeze(0) if isinstance(t, Tensor) and t.ndim else t, result) if meets else result
            )

        result = torch.vmap(one, in_dims=tuple(dims), randomness="same")(*values)
        return result if meets or not isinstance(result, Tensor) else result.as_subclass(_PerExampleTensor)


_ASKS_ONLY = {
    *(getattr(Tensor, name).__get__ for name in dir(Tensor) if name in (
        "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "is_sparse", "is_cuda",
        "is_cpu", "is_nested", "is_quantized", "is_meta", "is_mkldnn",
    )),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous,
    Tensor.stride, Tensor.element_size, Tensor.__len__, Tensor.type, torch.is_floating_point,
}  # fmt: skip
"""Functions that ask for a property of a tensor, which displacement does not change."""


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
