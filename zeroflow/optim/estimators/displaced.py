"""Evaluate a model with displaced parameters of its own for each example of a mini-batch, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from zeroflow.optim.estimators.example_signs import signs_of
from zeroflow.optim.objective import Objective


class OtherSize(Exception):
    """The mini-batch has another number of examples than the last one; the argument is the shape that reveals it."""


class _PerExampleTensor(Tensor):
    """A tensor that depends on parameters only, with one version per example: dimension 0 is the example."""


class Displaced(TorchFunctionMode):
    """While active, each example sees its own displaced parameters.

    A linear layer's weight costs one more product for all examples. Any other function of a parameter is evaluated by
    ``torch.vmap`` with a displaced copy for each example.

    Args:
        objective: of the step.
        query: whose direction.
        scale: of the displacement, in eps.
        examples: of the whole mini-batch.
        sides: a factor of the displacement of each example of this process's slice.

    Attributes:
        program: changes with the functions of torch that were called while it was active, in their order, and with what they were
            told besides tensors and sizes: it tells one loss from another, and batch norm's modes.
    """

    def __init__(
        self, objective: Objective, query: int, scale: float, examples: int, sides: Tensor | None = None
    ) -> None:
        super().__init__()
        self.program = 0
        flat, base = objective.flat, objective.direction(query) * objective.eps
        base.mul_(scale)
        self.signs = signs_of(objective, query, examples).only(objective.own(examples))
        self.signs = self.signs if sides is None else self.signs.turned(sides)
        self.examples = self.signs.examples
        # Each parameter and its displacement before signs.
        self.parameters = {
            id(p): (p, part.to(p.dtype)) for p, part in zip(flat.parameters, flat.views(base), strict=True)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.program = hash((self.program, func, *_switches(func, args), *_switches(func, kwargs.values())))
        if func is F.linear and self._is_parameter(args[1] if len(args) > 1 else kwargs.get("weight")):
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
        except OtherSize:
            raise
        except Exception as error:
            raise TypeError(
                f"zo-per-example: {getattr(func, '__name__', func)} of a trainable parameter cannot be evaluated for each "
                f"example ({error}); take zo-sgd, or train other layers"
            ) from error

    def _is_parameter(self, value: Any) -> bool:
        return id(value) in self.parameters

    def _concerned(self, values: Any) -> bool:
        """Whether any value is a parameter or computed from parameters only; most calls have none, so this is quick."""
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
            raise OtherSize(tuple(input.shape))
        weight, displacement = self.parameters[id(weight)]
        rows, columns = (s.to(input.dtype) for s in self.signs.matrix(weight))
        shape = (self.examples, *(1,) * (input.ndim - 2), -1)
        moved = F.linear(input * columns.view(shape), displacement).mul_(rows.view(shape))
        if bias is not None and self._is_parameter(bias):
            _, shift = self.parameters[id(bias)]
            moved += (shift * self.signs.full(bias).to(input.dtype)).view(shape)
        return moved.add_(F.linear(input, weight, bias))

    def _rows(self, bias: Tensor, input: Tensor, weight: Tensor) -> Tensor | None:
        """``addmm`` with a weight ``[in, out]`` whose rows are the positions of all examples in turn; None: it is not that.

        Hugging Face's Conv1D, a linear layer with its weight transposed, is one.
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
        """``func`` for every example by ``torch.vmap``, over displaced parameters and activations.

        An activation is passed as a batch of one, so that ``func`` gets the dimensions it expects.
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
"""Functions that return a property of a tensor that displacement does not change."""


def _switches(func: Any, values: Iterable[Any]) -> Iterator[Any]:
    """What of a function's arguments says how it computes: flags, names, dimensions, and whether a factor is 0.

    Indices and other numbers change with the data.
    """
    for value in values:
        if isinstance(value, float | np.floating):
            yield bool(value == 0.0)  # the weight of a term that begins later
        small = isinstance(value, int) and -8 <= value <= 8 and func is not Tensor.__getitem__
        if small or value is None or isinstance(value, bool | str):
            yield value


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
