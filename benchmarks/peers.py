"""Others' ways to make a step, beside which ours are measured: the published loop, and the authors' own package if it is there.

``mezo-loop`` is MeZO as it is usually written. ``infty-*`` is the class ``ZeroFlow`` of the Python package ``infty`` with torch's
SGD or Adam as its base optimizer. It is no dependency: it is measured where it can be imported, e.g. after
``pip install --no-deps --target PLACE infty==0.1.2`` with ``PYTHONPATH=PLACE``. It evaluates in evaluation mode, without
dropout; all peers make whole forward passes.
"""

from __future__ import annotations

import importlib.metadata
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

PAIRS = {
    "mezo-loop": "zo-sgd", "infty-zo-sgd": "zo-sgd", "infty-zo-adam": "zo-adam", "infty-zo-sgd-conserve": "zo-sgd-conserve",
}  # fmt: skip
"""Peers, and which of ours does the same."""
FASTER = {1: 1.15, 4: 1.25}
"""How many times faster than the authors' package a step of so many queries should be."""


class Peer(ABC):
    """Somebody else's optimizer on a module's trainable parameters."""

    cost = (2, 0)
    """Forward passes of a step: for each query, and besides."""
    one_query = False
    """Whether it refuses more than one query."""

    def forwards(self, queries: int) -> int:
        each, besides = self.cost
        return each * queries + besides

    @abstractmethod
    def step(self, loss: Callable[[], Tensor], queries: int) -> float:
        """One step; ``loss()`` makes a whole forward pass."""

    def held(self) -> list[Tensor]:
        """What is kept from step to step."""
        return []


class MezoLoop(Peer):
    """MeZO (Malladi et al. 2023, Algorithm 1 and its extension to n queries), in place and tensor by tensor."""

    def __init__(self, model: nn.Module, lr: float, eps: float = 1e-3) -> None:
        self.parameters, self.lr, self.eps = trained(model), lr, eps

    @torch.no_grad()
    def step(self, loss: Callable[[], Tensor], queries: int) -> float:
        slopes = {}
        value = math.nan
        for seed in np.random.randint(1_000_000_000, size=queries).tolist():
            shift_per_tensor(self.parameters, seed, self.eps)
            value = float(loss())
            shift_per_tensor(self.parameters, seed, -2 * self.eps)
            slopes[seed] = (value - float(loss())) / (2 * self.eps)
            shift_per_tensor(self.parameters, seed, self.eps)
        for seed, slope in slopes.items():
            shift_per_tensor(self.parameters, seed, -self.lr / queries * slope)
        return value


class Infty(Peer):
    """The authors' optimizer, by its own name of a method; settings are the package's defaults."""

    def __init__(self, model: nn.Module, lr: float, name: str = "zo_sgd", eps: float = 1e-3) -> None:
        from infty.optim import ZeroFlow  # type: ignore[import-not-found]

        self.one_query = name.endswith("conserve")
        self.cost = (2, 3) if self.one_query else (2, 0)
        self.parameters = trained(model)
        rule = torch.optim.Adam if "adam" in name else torch.optim.SGD
        self.base = rule(self.parameters, lr=lr)
        self.optimizer = ZeroFlow(self.parameters, self.base, model, {"inftyopt": name, "zo_eps": eps})

    def step(self, loss: Callable[[], Tensor], queries: int) -> float:
        def evaluate() -> tuple[None, list[Tensor]]:
            return None, [loss()]

        self.optimizer.q = queries
        self.optimizer.set_closure(evaluate)
        _, (value,) = self.optimizer.step()
        return float(value)

    def held(self) -> list[Tensor]:
        states = [*self.optimizer.state.values(), *self.base.state.values()]
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def peers() -> list[str]:
    """Those that can be measured here."""
    return [name for name in PAIRS if not name.startswith("infty-") or infty_version()]


def infty_version() -> str | None:
    """Of the authors' package; None where it is absent."""
    try:
        return importlib.metadata.version("infty")
    except importlib.metadata.PackageNotFoundError:
        return None


def make_peer(name: str, model: nn.Module, lr: float) -> Peer:
    """A peer by its name in ``PAIRS``."""
    if name == "mezo-loop":
        return MezoLoop(model, lr)
    return Infty(model, lr, name.removeprefix("infty-").replace("-", "_"))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def shift_per_tensor(parameters: Sequence[Tensor], seed: int, scale: float) -> None:
    """theta + scale * z, drawn and added tensor by tensor."""
    torch.manual_seed(seed)
    for p in parameters:
        z = torch.normal(mean=0.0, std=1.0, size=p.size(), device=p.device, dtype=p.dtype)
        p.data.add_(z, alpha=scale)
