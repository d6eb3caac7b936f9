"""Small problems with known solutions: a network that records its evaluations, and a quadratic."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

Loss = Callable[[], Tensor]


class Net(nn.Module):
    """Two linear layers with something between them.

    Args:
        between: a layer.
        inputs: width of the input.
        hidden: width of the hidden layer.
        turned: whether the layers are registered the other way around, which changes nothing that the network computes.
    """

    def __init__(self, between: nn.Module, *, inputs: int = 4, hidden: int = 5, turned: bool = False) -> None:
        super().__init__()
        layers = {"first": nn.Linear(inputs, hidden), "between": between, "last": nn.Linear(hidden, 1)}
        for name in reversed(layers) if turned else layers:
            self.add_module(name, layers[name])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in sorted(self.named_parameters()):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("last")(torch.tanh(self.get_submodule("between")(self.get_submodule("first")(x))))


class Dropout(nn.Module):
    """Dropout that records its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = F.dropout(torch.ones(x.shape, dtype=x.dtype), 0.5, self.training)
        self.masks.append(mask)
        return x * mask


def regression(
    between: nn.Module | None = None,
    *,
    per_example: bool = False,
    dtype: torch.dtype = torch.float64,
    inputs: int = 4,
    hidden: int = 5,
    turned: bool = False,
) -> tuple[nn.Module, Loss]:
    """A network and its squared error on eight examples; ``per_example``: one error per example."""
    model = Net(between or nn.Identity(), inputs=inputs, hidden=hidden, turned=turned).to(dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, inputs, generator=generator).to(dtype)
    y = torch.randn(8, 1, generator=generator).to(dtype)

    def loss() -> Tensor:
        errors = (model(x) - y).square()[:, 0]
        return errors if per_example else errors.mean()

    return model, loss


class Quadratic(nn.Module):
    """L(theta) = theta . A theta / 2 - b . theta + c in float64, theta of two tensors; d = 40. NumPy knows it too."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        generator = np.random.default_rng(seed)
        root = generator.normal(size=(40, 40))
        self.a, self.b = root @ root.T / 40 + 0.1 * np.eye(40), generator.normal(size=40)
        start = generator.normal(size=40)
        self.bias, self.weight = (
            nn.Parameter(torch.tensor(start[:8])),
            nn.Parameter(torch.tensor(start[8:].reshape(4, 8))),
        )
        self._a, self._b = torch.tensor(self.a), torch.tensor(self.b)

    def forward(self) -> Tensor:
        theta = torch.cat([self.bias, self.weight.reshape(-1)])
        return theta @ (self._a @ theta) / 2 - self._b @ theta + 20

    def value(self, theta: np.ndarray) -> float:
        """L at ``theta`` ``[40]``."""
        return float(theta @ self.a @ theta / 2 - self.b @ theta + 20)

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """A theta - b."""
        return self.a @ theta - self.b


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by name, whatever the order of registration."""
    yield from sorted(model.named_parameters())


def theta(model: nn.Module) -> Tensor:
    """A copy of all parameters as one vector ``[d]``, in the order of their names."""
    return torch.cat([p.detach().reshape(-1) for _, p in named(model)]).clone()


def true_gradient(model: nn.Module, loss: Loss) -> Tensor:
    """By backpropagation, ``[d]``."""
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss().mean(), [p for _, p in named(model)])])


class Places:
    """A closure that records the parameters of its evaluations.

    Attributes:
        model: whose parameters are watched.
        loss: whose evaluations are watched.
        displacements: of the parameters from where they were at ``watch()``, ``[d]`` for each evaluation; in
            forward-mode differentiation the tangent.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self.loss = model, loss
        self.watch()

    def watch(self) -> None:
        """Clear the records; displacements are relative to the current parameters from now on."""
        self.displacements: list[Tensor] = []
        self.origin = theta(self.model)

    def __call__(self) -> Tensor:
        tangents = [forward_ad.unpack_dual(p).tangent for _, p in named(self.model)]  # type: ignore[no-untyped-call]
        if all(tangent is not None for tangent in tangents):
            self.displacements.append(torch.cat([tangent.reshape(-1) for tangent in tangents]).clone())
        else:
            self.displacements.append(theta(self.model) - self.origin)
        return self.loss()

    def matrix(self) -> Tensor:
        """Displacements other than zero, ``[m, d]``."""
        moved = [displacement for displacement in self.displacements if displacement.any()]
        return torch.stack(moved) if moved else self.origin.new_zeros(0, len(self.origin))
