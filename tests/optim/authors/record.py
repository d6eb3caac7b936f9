"""Record what the authors' own optimizer does: the class ``ZeroFlow`` of their Python package ``infty``.

It writes ``recorded.json`` beside itself: the directions that the package drew, the losses it saw, and the parameters after
every step, on a network of 20 parameters. The tests read that file alone, so the package is needed for recording only::

    pip install --no-deps --target PLACE infty==0.1.2
    PYTHONPATH=PLACE python tests/optim/authors/record.py
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = Path(__file__).parent / "recorded.json"
STEPS = 4
COMMAND = "PYTHONPATH=PLACE python tests/optim/authors/record.py"
PUBLISHED = {"momentum": 0.9, "weight_decay": 5e-4}
"""Of the base optimizer in the package's own example."""


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three inputs, three hidden units, two classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def loss_of(model: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """Cross-entropy on one fixed mini-batch of eight."""
    inputs = torch.linspace(-1, 1, 24, dtype=torch.float64).sin().roll(7).view(8, 3).to(dtype)
    return F.cross_entropy(model(inputs), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]))


def flat(of: Callable[[str, Tensor], Tensor], model: nn.Module) -> list[float]:
    """``of(name, parameter)`` of all parameters one after the other, sorted by name."""
    return torch.cat([of(n, p).detach().reshape(-1) for n, p in sorted(model.named_parameters())]).tolist()


def values(model: nn.Module) -> list[float]:
    return flat(lambda _, parameter: parameter, model)


class Recorder:
    """One run of the package.

    Args:
        name: the package's ``inftyopt``. base: class of its base optimizer. base_options: that one's.
        wrapper: hyper-parameters given to the package's own optimizer. dtype: of the network. args: as the package calls them.
    """

    def __init__(
        self,
        name: str,
        base: type[torch.optim.Optimizer] = torch.optim.SGD,
        base_options: dict[str, Any] | None = None,
        wrapper: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float64,
        model: nn.Module | None = None,
        **args: Any,
    ) -> None:
        from infty.optim import ZeroFlow  # type: ignore[import-not-found]

        np.random.seed(0)
        self.model = network(dtype) if model is None else model
        self.base = base(self.model.parameters(), **{"lr": 0.1, **(base_options or {})})
        args = {"inftyopt": name, "zo_eps": 1e-3, **args}
        self.optimizer = ZeroFlow(self.model.parameters(), self.base, self.model, args, **(wrapper or {}))
        self.forward = name == "forward_grad"
        self.loss = functools.partial(loss_of, dtype=dtype)
        self.settings = {
            "args": args,
            "base": base.__name__,
            "base_options": base_options or {},
            "wrapper": wrapper or {},
            "dtype": str(next(self.model.parameters()).dtype),
        }
        self.theta, self.directions, self.losses = [values(self.model)], [], []

    def step(self, loss: Callable[[Any], Tensor] | None = None) -> None:
        """One step, and what it did. Directions are read off the package's state while it evaluates."""
        loss = loss or self.loss
        drawn: list[list[float]] = []
        seen: list[float] = []

        def evaluate() -> tuple[None, list[Tensor]]:
            state, found = self.optimizer.state, loss(self.model)
            # A conservative step asks at theta first, before it has drawn.
            if all("z" in state[p] for p in self.model.parameters()):
                z = flat(lambda _, p: state[p]["z"], self.model)
                if z not in (*drawn, self.directions[-1][-1] if self.directions else None):
                    drawn.append(z)
            seen.append(float(found))
            return None, [found]

        if self.forward:
            self.optimizer.set_closure(differentiated, batch=loss)
        else:
            self.optimizer.set_closure(evaluate)
        _, returned = self.optimizer.step()
        if self.forward:  # its own draw, made again
            torch.manual_seed(self.optimizer.zo_random_seed)
            vs = {name: torch.randn_like(p) for name, p in self.model.named_parameters()}
            drawn.append(flat(lambda name, _: vs[name], self.model))
            seen.append(float(returned[0]))
        self.theta.append(values(self.model))
        self.directions.append(drawn)
        self.losses.append(seen)

    def record(self, steps: int = STEPS) -> dict[str, Any]:
        for _ in range(steps):
            self.step()
        return {
            "settings": self.settings,
            "theta": self.theta,
            "directions": self.directions,
            "losses": self.losses,
        }


def differentiated(
    parameters: Any, names: Any, buffers: Any, model: nn.Module, batch: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss as a function of the parameters, as the package's forward gradient calls it."""
    values = dict(zip(names, parameters, strict=True))
    found = batch(lambda inputs: torch.func.functional_call(model, values, (inputs,)))
    return found.detach(), [found]


def runs() -> dict[str, dict[str, Any]]:
    """All trajectories by name."""
    adam = {"base": torch.optim.Adam, "base_options": {"lr": 0.02}}
    return {
        "zo-sgd": Recorder("zo_sgd").record(),
        "zo-sgd q=3": Recorder("zo_sgd", q=3).record(),
        "zo-sgd published": Recorder("zo_sgd", base_options=PUBLISHED).record(),
        "zo-sgd one-sided": Recorder("zo_sgd", perturbation_mode="one_side").record(),
        "zo-sgd float32": Recorder("zo_sgd", base_options={"lr": 1e-3}, dtype=torch.float32).record(),
        "zo-sgd-sign": Recorder("zo_sgd_sign", base_options={"lr": 0.01}).record(),
        "zo-sgd-sign q=3": Recorder("zo_sgd_sign", q=3, base_options={"lr": 0.01}).record(),
        "zo-adam": Recorder("zo_adam", **adam).record(),
        "zo-adam q=3": Recorder("zo_adam", q=3, **adam).record(),
        "zo-adam-sign": Recorder("zo_adam_sign", **adam).record(),
        "forward-grad": Recorder("forward_grad", wrapper={"lr": 0.1}).record(),
        "sparsity": Recorder("zo_sgd", gradient_sparsity=0.3).record(),
        "sparsity q=3": Recorder("zo_adam", gradient_sparsity=0.3, q=3, **adam).record(),
        "conserve": Recorder("zo_sgd_conserve", base_options={"lr": 10.0}).record(8),
        "history": Recorder("zo_sgd", use_history_grad=True).record(),
        "history q=3": Recorder("zo_sgd", use_history_grad=True, q=3, alpha=0.6).record(),
        "history sign": Recorder("zo_sgd_sign", use_history_grad=True, q=3, base_options={"lr": 0.01}).record(),
        "history adam": Recorder("zo_adam", use_history_grad=True, gradient_sparsity=0.3, **adam).record(),
        # Where it deviates.
        "conserve momentum": Recorder("zo_sgd_conserve", base_options={"lr": 10.0, **PUBLISHED}).record(8),
        "conserve adam": Recorder("zo_adam_conserve", **{**adam, "base_options": {"lr": 0.3}}).record(8),
        "conserve history": Recorder("zo_sgd_conserve", use_history_grad=True, base_options={"lr": 10.0}).record(8),
        "forward-grad base": Recorder(
            "forward_grad", base_options={"lr": 0.5, "momentum": 0.9}, wrapper={"lr": 0.1, "weight_decay": 0.2}, q=3
        ).record(),
        "sparsity weight decay": Recorder("zo_sgd", gradient_sparsity=0.3, base_options={"weight_decay": 0.5}).record(),
        "schedule of the wrapper": scheduled("optimizer"),
        "schedule of the base": scheduled("base"),
        "lr 0 float32": Recorder("zo_sgd", base_options={"lr": 0.0}, dtype=torch.float32).record(),
    }


def scheduled(which: str) -> dict[str, Any]:
    """A learning rate that is halved after every step, by a scheduler of the package's optimizer or of its base."""
    recorder = Recorder("zo_sgd")
    scheduler = torch.optim.lr_scheduler.StepLR(getattr(recorder, which), 1, 0.5)
    for _ in range(STEPS):
        recorder.step()
        scheduler.step()
    return recorder.record(0)


def facts() -> dict[str, Any]:
    """What else can be noticed of a step."""
    shares = {}
    for ratio in (0.1, 0.5, 0.9):
        recorder = Recorder("zo_sgd", gradient_sparsity=ratio, model=nn.Linear(100, 100).double())
        recorder.step(lambda model: model(torch.ones(1, 100, dtype=torch.float64)).square().mean())
        shares[str(ratio)] = float(np.mean(np.array(recorder.directions[0][0]) == 0))
    training = Recorder("zo_sgd", model=nn.Sequential(network(), nn.Dropout(0.5)).train())
    training.step()
    nan = Recorder("zo_sgd")
    nan.step(lambda model: loss_of(model) * torch.nan)
    drawing = Recorder("zo_sgd")
    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    torch.manual_seed(5)
    drawing.step()
    try:
        Recorder("zo_sgd_conserve", q=2).step()
    except AssertionError as error:
        conserve = type(error).__name__
    return {
        "a conservative step of two queries": conserve,
        "share that sparsity holds still": shares,
        "training mode after a step": training.model.training,
        "losses of a step in training mode with dropout": training.losses[0],
        "parameters that are not a number after a NaN": int(np.isnan(nan.theta[-1]).sum()),
        "the caller's numbers": expected,
        "the caller's numbers after a step": torch.rand(3).tolist(),
        **resumed(),
    }


def resumed() -> dict[str, Any]:
    """Four steps with momentum and sparsity, and two with a second optimizer that loads all that the first one can save."""
    options = {"base_options": PUBLISHED, "gradient_sparsity": 0.3}
    whole = Recorder("zo_sgd", **options).record(STEPS)
    first = Recorder("zo_sgd", **options)
    first.record(2)
    saved = first.optimizer.state_dict(), first.base.state_dict(), first.model.state_dict(), np.random.get_state()
    second = Recorder("zo_sgd", **options)
    second.optimizer.sparse_grad_random_seed = np.random.randint(
        1_000_000_000
    )  # drawn when it is made, as in a new process
    for part, state in zip((second.optimizer, second.base, second.model), saved[:3], strict=True):
        part.load_state_dict(state)
    np.random.set_state(saved[3])
    second.record(2)
    return {"uninterrupted": whole["theta"][-1], "resumed": second.theta[-1]}


def main() -> None:
    torch.set_num_threads(1)
    found = {
        "package": f"infty {importlib.metadata.version('infty')}",
        "command": COMMAND,
        "torch": torch.__version__,
        "parameters": [name for name, _ in sorted(network().named_parameters())],
        "runs": runs(),
        "facts": facts(),
    }
    FILE.write_text(compact(found) + "\n")


def compact(found: dict[str, Any]) -> str:
    """JSON with a line for each run."""
    parts = []
    for key, value in found.items():
        inner = (
            [f" {json.dumps(name)}: {json.dumps(of)}" for name, of in value.items()] if isinstance(value, dict) else []
        )
        parts.append(f"{json.dumps(key)}: " + ("{\n" + ",\n".join(inner) + "\n}" if inner else json.dumps(value)))
    return "{" + ",\n".join(parts) + "}"


if __name__ == "__main__":
    main()
