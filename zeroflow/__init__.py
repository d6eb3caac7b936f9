"""zeroflow: learning a stream of tasks without backpropagation and without forgetting.

``zeroflow.run_trial(TrialConfig.from_dict({...}))`` runs one cell; ``zeroflow.optim`` holds the forward-pass optimizers.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# The memory meter uses torch's profiler, which otherwise reports the absence of a GPU on the terminal at every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

if TYPE_CHECKING:
    from zeroflow.errors import ConfigError
    from zeroflow.imports import import_file
    from zeroflow.optim.ban import GradientBanned, gradient_ban
    from zeroflow.trial.config import TrialConfig
    from zeroflow.trial.placement import Placement
    from zeroflow.trial.result import TrialResult
    from zeroflow.trial.trial import run_trial

__all__ = [
    "ConfigError", "GradientBanned", "Placement", "TrialConfig", "TrialResult", "gradient_ban", "import_file", "run_trial",
]  # fmt: skip

_HOME = {
    "ConfigError": "zeroflow.errors",
    "GradientBanned": "zeroflow.optim.ban",
    "gradient_ban": "zeroflow.optim.ban",
    "import_file": "zeroflow.imports",
    "TrialConfig": "zeroflow.trial.config",
    "Placement": "zeroflow.trial.placement",
    "run_trial": "zeroflow.trial.trial",
    "TrialResult": "zeroflow.trial.result",
}


def __getattr__(name: str) -> Any:
    # Late, so that ``import zeroflow.optim`` needs torch alone, and help texts need nothing.
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("zeroflow")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
