"""Step 1: a gradient estimate from function values, one estimator per file."""

from zeroflow.optim.estimators.backpropagation import Backpropagation
from zeroflow.optim.estimators.cars import CARS
from zeroflow.optim.estimators.cge import CGE
from zeroflow.optim.estimators.cma_es import CMAES
from zeroflow.optim.estimators.estimator import Estimate, Estimator, Slopes
from zeroflow.optim.estimators.forward_gradient import ForwardGradient
from zeroflow.optim.estimators.fzoo import FZOO
from zeroflow.optim.estimators.low_rank import LowRank
from zeroflow.optim.estimators.per_example import PerExample
from zeroflow.optim.estimators.rge import RGE
from zeroflow.optim.estimators.scd import SCD
from zeroflow.optim.estimators.spsa import SPSA

__all__ = [
    "CARS", "CGE", "CMAES", "FZOO", "RGE", "SCD", "SPSA", "Backpropagation", "Estimate", "Estimator", "ForwardGradient",
    "LowRank",     "PerExample", "Slopes",
]  # fmt: skip
