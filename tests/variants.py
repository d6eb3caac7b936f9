"""Somebody else's optimizer: right in everything, and made wrong by one change at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from references import DIRECTIONS, stream
from torch import nn

from zeroflow.optim.testing import Subject


class Mezo:
    """Two-sided SPSA with SGD on a module: perturbs in place, restores from a copy, regenerates its noise."""

    eps, sides = 1e-3, (1, -1)

    def __init__(self, model: nn.Module, seed: int, lr: float = 0.05, queries: int = 1, executor: Any = None) -> None:
        self.model, self.seed, self.lr, self.queries, self.executor = model, seed, lr, queries, executor
        self.parameters = [p for _, p in sorted(model.named_parameters())]
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        sizes = [p.numel() for p in self.parameters]
        drawn = torch.tensor(stream(self.seed, self.steps, query, DIRECTIONS).standard_normal(sum(sizes)))
        return [z.view(p.shape).to(p) for z, p in zip(drawn.split(sizes), self.parameters, strict=True)]

    def prepare(self, side: int) -> None:
        torch.manual_seed(self.seed * 1000 + self.steps)

    def restore(self, copies: list[torch.Tensor], z: list[torch.Tensor], scale: float) -> None:
        for p, copied in zip(self.parameters, copies, strict=True):
            p.copy_(copied)

    def slope(self, closure: Callable, query: int) -> tuple[float]:
        copies, z, losses = [p.clone() for p in self.parameters], self.z(query), []
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        for side in self.sides:
            for p, part in zip(self.parameters, z, strict=True):
                p.add_(part, alpha=side * self.eps)
            self.prepare(side)
            try:
                losses.append(float(closure().mean()))
            finally:
                self.restore(copies, z, side * self.eps)
                for buffer, before in buffers:
                    buffer.copy_(before)
        return ((losses[0] - losses[1]) / (self.eps * (self.sides[0] - self.sides[1])),)

    def combined(self, slopes: list[float]) -> list[torch.Tensor]:
        """The estimate, tensor by tensor; one direction in memory at a time."""
        total = [torch.zeros_like(p) for p in self.parameters]
        for query, slope in enumerate(slopes):
            for one, z in zip(total, self.z(query, "update"), strict=True):
                one.add_(z, alpha=slope / self.queries)
        return total

    def update(self, slopes: list[float]) -> None:
        for p, g in zip(self.parameters, self.combined(slopes), strict=True):
            p.sub_(g, alpha=self.lr)

    def step(self, closure: Callable) -> None:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if self.executor is None:
                slopes = [self.slope(closure, query)[0] for query in range(self.queries)]
            else:
                slopes = [g for (g,) in self.executor.map(self.queries, lambda query: self.slope(closure, query))]
            if any(True for _ in self.model.buffers()):
                self.prepare(1)
                closure()
            if all(np.isfinite(slopes)):
                self.update(slopes)
            self.steps += 1


class OtherNoiseForEachTensor(Mezo):
    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        if use == "perturbation":
            return super().z(query)
        seed = self.seed * 1000 + self.steps
        return [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p) for p in self.parameters]


class NoiseInOrderOfRegistration(Mezo):
    def __init__(self, model: nn.Module, seed: int, lr: float = 0.05) -> None:
        super().__init__(model, seed, lr)
        self.parameters = list(model.parameters())


class ForgetsToDivideByQueries(Mezo):
    def update(self, slopes: list[float]) -> None:
        super().update([slope * self.queries for slope in slopes])


class StrayFactorMu(Mezo):
    def update(self, slopes: list[float]) -> None:
        super().update([slope * self.eps for slope in slopes])


class RestoresByArithmetic(Mezo):
    def restore(self, copies: list[torch.Tensor], z: list[torch.Tensor], scale: float) -> None:
        for p, part in zip(self.parameters, z, strict=True):
            p.sub_(part, alpha=scale)


class RestoresOnlyWhenAllGoesWell(Mezo):
    def restore(self, copies: list[torch.Tensor], z: list[torch.Tensor], scale: float) -> None:
        if sys.exc_info()[0] is None:
            super().restore(copies, z, scale)


class MovesOnNaN(Mezo):
    def step(self, closure: Callable) -> None:
        with torch.no_grad():
            self.update([self.slope(closure, query)[0] for query in range(self.queries)])


class FreshDropoutMasks(Mezo):
    def prepare(self, side: int) -> None:
        pass


class AnotherMiniBatchForEachSide(Mezo):
    def prepare(self, side: int) -> None:
        torch.manual_seed(self.seed * 1000 + self.steps + side)


class OneDropoutMaskForEver(Mezo):
    def prepare(self, side: int) -> None:
        torch.manual_seed(self.seed)


class SeedsTheCallersGenerator(Mezo):
    def step(self, closure: Callable) -> None:
        super().step(closure)
        torch.manual_seed(self.seed)


class BatchNormSeesEveryEvaluation(Mezo):
    def slope(self, closure: Callable, query: int) -> tuple[float]:
        slope = super().slope(closure, query)
        closure()
        return slope


class StatisticsNeverMove(Mezo):
    def step(self, closure: Callable) -> None:
        before = [buffer.clone() for buffer in self.model.buffers()]
        super().step(closure)
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)


class BatchNormUndoesTheStep(Mezo):
    def update(self, slopes: list[float]) -> None:
        if not any(True for _ in self.model.buffers()):
            super().update(slopes)


class SeedsFromBaseAndWorker(Mezo):
    def __init__(self, model: nn.Module, seed: int, queries: int = 1, executor: Any = None) -> None:
        super().__init__(model, seed + getattr(executor, "rank", 0), queries=queries, executor=executor)


class SeedStandsStill(Mezo):
    """The same directions in every step."""

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        steps, self.steps = self.steps, 0
        try:
            return super().z(query, use)
        finally:
            self.steps = steps


class OneDirectionForAllQueries(Mezo):
    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        return super().z(0, use)


class SeedsAreSums(Mezo):
    """The next step has the direction that the next seed has now."""

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        seed = self.seed + self.steps + query
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in self.parameters]


class SeedsInOrderOfEvaluation(Mezo):
    def __init__(self, model: nn.Module, seed: int, queries: int = 1, executor: Any = None) -> None:
        super().__init__(model, seed, queries=queries, executor=executor)
        self.stream = torch.Generator().manual_seed(seed)

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        if use == "perturbation":
            self.drawn = [torch.randn(p.shape, generator=self.stream, dtype=p.dtype) for p in self.parameters]
        return self.drawn


class StoresItsNoise(Mezo):
    def __init__(self, model: nn.Module, seed: int, queries: int = 1) -> None:
        super().__init__(model, seed, queries=queries)
        self.stored: dict[int, list[torch.Tensor]] = {}

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        return self.stored.setdefault(query, super().z(query))


class HoldsTheNoiseOfAStep(StoresItsNoise):
    def step(self, closure: Callable) -> None:
        super().step(closure)
        self.stored.clear()


class BuildsAGraph(Mezo):
    def slope(self, closure: Callable, query: int) -> tuple[float]:
        def with_gradients() -> torch.Tensor:
            with torch.enable_grad():
                return closure().detach()

        return super().slope(with_gradients, query)


class LeavesGradients(Mezo):
    def update(self, slopes: list[float]) -> None:
        super().update(slopes)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)


class ForgetsItsCounter(Mezo):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Masked(Mezo):
    """Right: one random mask, multiplied into all noise."""

    def __init__(self, model: nn.Module, seed: int, sparsity: float = 0.1) -> None:
        super().__init__(model, seed)
        generator = torch.Generator().manual_seed(seed)
        self.masks = [self.kept(torch.rand, torch.randn, p.shape, generator, sparsity) for p in self.parameters]

    @staticmethod
    def kept(uniform: Callable, normal: Callable, shape: tuple, generator: torch.Generator, s: float) -> torch.Tensor:
        return uniform(shape, generator=generator) >= s

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        return [z * kept for z, kept in zip(super().z(query), self.masks, strict=True)]


class MaskFromNormals(Masked):
    @staticmethod
    def kept(uniform: Callable, normal: Callable, shape: tuple, generator: torch.Generator, s: float) -> torch.Tensor:
        return ~(normal(shape, generator=generator) < s)


class MaskOnPerturbationOnly(Masked):
    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        return super().z(query) if use == "perturbation" else Mezo.z(self, query)


class MaskOnUpdateOnly(Masked):
    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        return super().z(query) if use == "update" else Mezo.z(self, query)


class DecaysWhatIsMasked(Masked):
    def update(self, slopes: list[float]) -> None:
        super().update(slopes)
        for p in self.parameters:
            p.mul_(0.99)


def mezo(kind: type[Mezo] | partial[Mezo], **claims: Any) -> Subject:
    claims = {"lr": 0.05, "eps": 1e-3, "unbiased": True, "along": True, "resumes": True, **claims}
    return Subject(kind, name=(kind.func if isinstance(kind, partial) else kind).__name__, **claims)


class Sphere(Mezo):
    """Right: one-sided differences along directions of length 1, times d."""

    sides = (1, 0)

    def z(self, query: int, use: str = "perturbation") -> list[torch.Tensor]:
        drawn = super().z(query)
        length = torch.stack([z.square().sum() for z in drawn]).sum().sqrt()
        return [z / length for z in drawn]

    def update(self, slopes: list[float]) -> None:
        super().update([slope * sum(p.numel() for p in self.parameters) for slope in slopes])


class SphereWithoutItsFactor(Sphere):
    def update(self, slopes: list[float]) -> None:
        Mezo.update(self, slopes)
