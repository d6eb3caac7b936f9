"""Forward-pass optimizers for any ``nn.Module`` and any loss: estimator x direction x update. Needs only torch.

optimizer = zeroflow.optim.create_optimizer("zo-sgd", model, lr=1e-3, queries=4)
loss = optimizer.step(lambda: criterion(model(x), y))
"""

from zeroflow.optim import names as _names  # registers them
from zeroflow.optim.ban import GradientBanned, gradient_ban
from zeroflow.optim.closure import Slice
from zeroflow.optim.composition import Composition
from zeroflow.optim.executor import Executor, LocalExecutor
from zeroflow.optim.factory import (
    ENHANCEMENTS,
    OptimizerInfo,
    create_optimizer,
    list_optimizers,
    optimizers,
    register_optimizer,
)
from zeroflow.optim.journal import Journal
from zeroflow.optim.objective import NonFiniteLoss
from zeroflow.optim.optimizer import ThreeStepOptimizer
from zeroflow.optim.tuning import Tuned, tune

del _names

__all__ = [
    "ENHANCEMENTS", "Composition", "Executor", "GradientBanned", "Journal", "LocalExecutor", "NonFiniteLoss", "OptimizerInfo",
    "Slice", "ThreeStepOptimizer", "Tuned", "create_optimizer", "gradient_ban", "list_optimizers", "optimizers", "register_optimizer", "tune",
]  # fmt: skip
