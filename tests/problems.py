"""A small problem to train on, the paper's optimizers, and their directions in NumPy alone, for the tests of optimizers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

PAPER = [
    "fo-adam", "fo-sgd", "forward-grad", "zo-adam", "zo-adam-conserve", "zo-adam-sign", "zo-sgd", "zo-sgd-conserve",
    "zo-sgd-sign",
]  # fmt: skip


def problem(dtype: torch.dtype = torch.float32, dropout: float = 0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3)).to(dtype)
    x, y = torch.randn(40, 6, dtype=dtype), torch.randint(3, (40,))

    def loss(other: nn.Module | None = None) -> torch.Tensor:
        return F.cross_entropy((other or model)(x), y)

    return model, loss


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())])


def reference_directions(seed: int, step: int, queries: int, size: int) -> np.ndarray:
    """The documented noise scheme, written with NumPy alone."""
    return np.stack(
        [
            np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, query, step])).standard_normal(size)
            for query in range(queries)
        ]
    )
