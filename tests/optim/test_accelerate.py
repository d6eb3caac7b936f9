"""A script as people write it: accelerate, autocast, OneCycleLR, save, resume; it trains as without them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from zeroflow.optim import create_optimizer

accelerate = pytest.importorskip("accelerate")
STEPS = 40


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def script(name: str, precision: str | None = None, folder: Path | None = None) -> list[float]:
    """Losses of all steps; halfway it is saved, spoilt and loaded where a folder is given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
    images, labels, losses = torch.randn(64, 8), torch.randint(3, (64,)), []
    optimizer: Any = create_optimizer(
        name, model, lr=0.01, eps=0.03, queries=8, **({"momentum": 0.9} if "sgd" in name else {})
    )
    schedule: Any = OneCycleLR(optimizer, 0.03, total_steps=STEPS + 5)
    if precision:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    def loss(of: slice) -> Tensor:
        return F.cross_entropy(model(images[of]).float(), labels[of])

    for step in range(STEPS):
        closure = functools.partial(loss, slice(32 * (step % 2), 32 * (step % 2) + 32))
        with torch.no_grad():
            losses.append(float(closure()))
        optimizer.step(closure)  # accelerate's gives nothing back
        schedule.step()
        if folder and step == STEPS // 2:
            accelerator.save_state(str(folder))
            with torch.no_grad():
                model[0].weight.mul_(3)
            optimizer.step(closure)
            schedule.step()
            accelerator.load_state(str(folder))
    return losses


@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam"])
def test_accelerate_changes_nothing_and_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    plain = script(name)
    assert plain[-2] < plain[0] and plain[-1] < plain[1]
    assert script(name, "no", tmp_path) == plain


@pytest.mark.slow
def test_autocast_rounds_the_losses_and_no_more(tmp_path: Path) -> None:
    rounded = script("zo-adam", "bf16", tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert rounded == script("zo-adam", "bf16")
    plain = script("zo-adam")
    assert rounded != plain
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(plain), rtol=0, atol=0.02)
