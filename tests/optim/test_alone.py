"""``zeroflow.optim`` alone: torch and numpy are enough, as after ``pip install --no-deps``."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import importlib.abc
import sys

absent = {"click", "cmaes", "plotly", "pyarrow", "ray", "safetensors", "scipy", "threadpoolctl", "timm", "torchvision", "yaml"}


class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Refusing())
import torch
import zeroflow.optim

inputs = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


def moved(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    before = torch.cat([value.detach().flatten() for value in model.parameters()])
    optimizer = zeroflow.optim.create_optimizer(name, model, lr=0.01)
    assert float(optimizer.step(lambda: (model(inputs) - 1).square().mean())) > 0
    return bool((torch.cat([value.flatten() for value in model.parameters()]) != before).any())


for name in zeroflow.optim.list_optimizers():
    try:
        print(name, moved(name))
    except ImportError as error:
        assert "pip install cmaes threadpoolctl" in str(error)
        absent -= {"cmaes", "threadpoolctl"}
        print(name, moved(name), "with cmaes")
        absent |= {"cmaes", "threadpoolctl"}
assert not [name for name in absent - {"cmaes", "threadpoolctl"} if name in sys.modules]
"""


@pytest.mark.slow
def test_every_optimizer_steps_with_torch_and_numpy_alone() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    outcomes = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    assert outcomes.pop("es-cma") == "True with cmaes", "it alone needs one more package, and says which"
    assert {"fo-sgd", "fo-sgd-checkpoint", "zo-sgd", "zo-adam", "zo-muon", "forward-grad"} <= outcomes.keys()
    assert set(outcomes.values()) == {"True"}, outcomes
