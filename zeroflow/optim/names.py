"""The named optimizers and their three steps. Learning rates are starting points for adapters of the embedded backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zeroflow.optim.directions import SVRG, Orthogonal, Sign
from zeroflow.optim.estimators import (
    CARS,
    CGE,
    CMAES,
    FZOO,
    RGE,
    SCD,
    SPSA,
    Backpropagation,
    ForwardGradient,
    LowRank,
    PerExample,
)
from zeroflow.optim.factory import OptimizerInfo as Info
from zeroflow.optim.factory import register_optimizer
from zeroflow.optim.updates import AdaMM, Conserve, KeepBest, RAdaZO

SGD = torch.optim.SGD


class Adam(torch.optim.Adam):
    """Adam whose own epsilon is the option ``eps_adam``, since ``eps`` is the perturbation size everywhere here."""

    def __init__(self, params: Any, *, eps_adam: float = 1e-8, **options: Any) -> None:
        super().__init__(params, eps=eps_adam, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = dict(param_group)
        if "eps_adam" in group:
            group["eps"] = group.pop("eps_adam")
        super().add_param_group(group)


OF_SGD: Mapping[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
OF_ADAM: Mapping[str, Any] = {"betas": (0.9, 0.999), "eps_adam": 1e-8, "weight_decay": 0.0}

_GRADIENT = "the gradient by backpropagation (the first-order reference)"
_SPSA = "the two-sided SPSA estimate"
_BEST = "keeping the best of theta and theta -+ step"

for _info in (
    Info("fo-sgd", f"SGD on {_GRADIENT}", Backpropagation(), SGD, OF_SGD, 0.1),
    Info("fo-adam", f"Adam on {_GRADIENT}", Backpropagation(), Adam, OF_ADAM, 1e-4),
    Info(
        "fo-sgd-checkpoint",
        f"SGD on {_GRADIENT}, activations recomputed instead of stored",
        Backpropagation(checkpoint=True),
        SGD,
        OF_SGD,
        0.1,
    ),
    Info("zo-sgd", f"SGD on {_SPSA} (MeZO)", SPSA(), SGD, OF_SGD, 3e-3),
    Info("zo-sgd-sign", f"SGD on the sign of {_SPSA}", SPSA(), SGD, OF_SGD, 1e-4, direction=Sign()),
    Info("zo-sgd-conserve", f"SGD on {_SPSA}, {_BEST}", SPSA(), SGD, OF_SGD, 1e-3, update=Conserve()),
    Info("zo-adam", f"Adam on {_SPSA}", SPSA(), Adam, OF_ADAM, 1e-3),
    Info("zo-adam-sign", f"Adam on the sign of {_SPSA}", SPSA(), Adam, OF_ADAM, 1e-4, direction=Sign()),
    Info("zo-adam-conserve", f"Adam on {_SPSA}, {_BEST}", SPSA(), Adam, OF_ADAM, 1e-4, update=Conserve()),
    Info("forward-grad", "SGD on forward-mode directional derivatives, no eps", ForwardGradient(), SGD, OF_SGD, 1e-3),
    Info(
        "zo-svrg", f"SGD on {_SPSA} with SVRG's correction at a snapshot", SPSA(), SGD, OF_SGD, 1e-3, direction=SVRG()
    ),
    Info("zo-rge", "SGD on the one-sided random gradient estimate", RGE(), SGD, OF_SGD, 1e-3),
    Info("zo-cge", "SGD on one-sided differences along q coordinates", CGE(), SGD, OF_SGD, 1e-1),
    Info("zo-scd", "SGD on two-sided differences along q coordinates, unbiased", SCD(), SGD, OF_SGD, 1e-4),
    Info(
        "zo-cars",
        "Newton step along one random line, keeping the best place seen",
        CARS(),
        SGD,
        {},
        0.5,
        update=KeepBest(),
        default_eps=0.5,
    ),
    Info("zo-adamm", f"AMSGrad-Adam on {_SPSA}", SPSA(), AdaMM, OF_ADAM, 1e-3),
    Info(
        "zo-fzoo",
        "SGD on one-sided differences in units of their standard deviation",
        FZOO(),
        SGD,
        OF_SGD,
        1e-3,
        default_eps=1e-4,
        default_queries=8,
    ),
    Info("zo-radazo", f"Adam with the second moment of the first on {_SPSA}", SPSA(), RAdaZO, OF_ADAM, 1e-3),
    Info(
        "zo-per-example",
        "SGD on two-sided differences with a direction for each example",
        PerExample(),
        SGD,
        OF_SGD,
        3e-2,
    ),
    Info(
        "zo-muon",
        "SGD on the orthogonalised one-sided estimate along directions of low rank",
        LowRank(),
        SGD,
        OF_SGD,
        1e-1,
        direction=Orthogonal(),
        default_queries=16,
    ),
    Info(
        "es-cma",
        "CMA-ES: the mean of a population that adapts its size and shape",
        CMAES(),
        SGD,
        {},
        1.0,
        default_eps=0.1,
        default_queries=16,
    ),
):
    register_optimizer(_info)
