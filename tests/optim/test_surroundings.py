"""What is around a step must not change what the step measures, and a step that measures nothing must say so."""

from __future__ import annotations

import contextlib
import copy
import random
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from zeroflow.optim import NonFiniteLoss, create_optimizer, list_optimizers

FORWARD_ONLY = [name for name in list_optimizers() if not name.startswith("fo-")]


def problem(kind: Callable[[], nn.Module] = nn.Tanh) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), kind(), nn.Linear(12, 3))
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    return model, lambda: F.cross_entropy(model(x).float(), y)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())])


def trained(
    name: str, around: Callable[[], AbstractContextManager], build: Callable = problem, steps: int = 3, **options
) -> Tensor:
    model, loss = build()
    optimizer = create_optimizer(name, model, lr=0.1, **options)
    for _ in range(steps):
        with around():
            optimizer.step(loss)
    return flat(model)


@pytest.mark.parametrize("name", [name for name in FORWARD_ONLY if name not in ("forward-grad", "zo-per-example")])
def test_autocasts_cast_weights_do_not_outlive_an_evaluation(name: str) -> None:
    """Evaluations in one autocast are those of an autocast for each, which has an empty cache every time."""
    model, loss = problem()
    optimizer = create_optimizer(name, model, lr=0.1, eps=2e-2)

    def own_cast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss()

    for _ in range(2):
        optimizer.step(own_cast)
    around = trained(name, lambda: torch.autocast("cpu", dtype=torch.bfloat16), eps=2e-2, steps=2)
    assert torch.equal(around, flat(model)) and not torch.equal(around, flat(problem()[0]))


@pytest.mark.parametrize("name", ["zo-muon", "zo-per-example"])
def test_autocast_does_not_round_an_optimizers_own_products(name: str) -> None:
    """A closure that leaves autocast takes the step that it takes without one, where the step multiplies matrices too."""

    def stepped(enabled: bool) -> Tensor:
        model, _ = problem()
        x, y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
        optimizer = create_optimizer(name, model, lr=0.1)

        def losses() -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return F.cross_entropy(model(x), y, reduction="none" if optimizer.per_example else "mean")

        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step(losses)
        return flat(model)

    assert torch.equal(stepped(True), stepped(False))


def test_a_model_asked_after_a_step_in_the_same_autocast_has_the_new_weights() -> None:
    model, loss = problem()
    optimizer = create_optimizer("zo-sgd", model, lr=0.1, eps=2e-2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(loss)
        inside = float(loss())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert inside == float(loss())


@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam-conserve", "es-cma", "fo-sgd"])
def test_cached_parametrizations_do_not_outlive_an_evaluation(name: str) -> None:
    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        model, loss = problem()
        parametrizations.weight_norm(model[0])
        return model, loss

    def everything() -> AbstractContextManager:
        return parametrize.cached()

    assert torch.equal(trained(name, everything, build), trained(name, contextlib.nullcontext, build))


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


AROUND = {
    "inference": torch.inference_mode, "grad": torch.enable_grad, "no_grad": torch.no_grad, "dtype": default_dtype,
    "device": lambda: torch.device("meta"), "deterministic": deterministic,
}  # fmt: skip


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("name", [*FORWARD_ONLY, "fo-adam"])
@pytest.mark.filterwarnings("ignore:zo-per-example")
def test_modes_and_defaults_of_torch_do_not_matter(name: str, around: Callable[[], AbstractContextManager]) -> None:
    """Neither around all steps nor around every second one."""
    plain, alternating = trained(name, contextlib.nullcontext, steps=4), iter([around, contextlib.nullcontext] * 2)
    assert torch.equal(trained(name, around, steps=4), plain)
    assert torch.equal(trained(name, lambda: next(alternating)(), steps=4), plain)


@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam", "zo-svrg", "zo-adam-conserve", "es-cma", "fo-adam"])
def test_an_optimizer_made_in_inference_mode_works_outside_and_the_other_way_around(name: str) -> None:
    expected = trained(name, contextlib.nullcontext)
    for inside in ("optimizer", "model and optimizer"):
        if inside == "optimizer":
            model, loss = problem()
        with torch.inference_mode():
            if inside != "optimizer":
                model, loss = problem()
                if name == "fo-adam":
                    continue  # torch differentiates no such parameters
            optimizer = create_optimizer(name, model, lr=0.1)
            optimizer.step(loss)
        optimizer.step(loss)
        saved = optimizer.state_dict()
        with torch.inference_mode():
            optimizer.load_state_dict(saved)
        optimizer.step(loss)
        assert torch.equal(flat(model), expected)


def test_steps_of_two_threads_at_once_are_warned_of() -> None:
    """They share the generators that dropout masks come from."""
    both = threading.Barrier(2, timeout=60)

    def train(meets: bool) -> None:
        model, met = nn.Linear(2, 1), [not meets]
        optimizer = create_optimizer("zo-sgd", model, lr=0.1)

        def closure() -> Tensor:
            if not met[0]:
                met[0] = both.wait() >= 0
            return model(torch.ones(4, 2)).square().mean()

        optimizer.step(closure)

    with pytest.warns(UserWarning, match="two threads of this process make steps at the same time"):
        threads = [threading.Thread(target=train, args=(True,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(meets=False)


COMPILED = """
import sys
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from zeroflow.optim import create_optimizer

torch.manual_seed(0)
x, losses = torch.randn(16, 4), []

def step(forward, **options):
    losses.clear()
    optimizer = create_optimizer("zo-sgd", model, lr=0.0, eps=1e-9, queries=2, **options)

    def closure():
        losses.append(forward(x).square().mean())
        return losses[-1]

    optimizer.step(closure)
    assert optimizer.forwards == 4, "the one that is asked again counts once"
    torch.testing.assert_close(torch.stack(losses[-4:]), losses[-1].expand(4), rtol=1e-6, atol=0)
    return len(losses)

model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
compiled = torch.compile(model, backend=sys.argv[1])
assert step(compiled) == 5
assert step(compiled, check_precision=False) == 4
assert step(model) == 4, "what is not compiled itself is asked once"
q = torch.randn(1, 1, 16, 16)
assert step(lambda x: model(x) + flex_attention(q, q, q).mean()) >= 4, "operators of a higher order pass"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager_decomp_partition",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.long,
                pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ here"),
            ],
        ),
    ],
)
def test_a_compiled_model_has_one_dropout_mask_in_a_step_from_the_first_on(backend: str) -> None:
    run = subprocess.run([sys.executable, "-c", COMPILED, backend], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_a_closure_may_draw_from_numpys_and_pythons_generators() -> None:
    """All evaluations of a step get the same numbers, another step others, and the caller's own go on."""
    model, loss = problem()
    optimizer, drawn = create_optimizer("zo-sgd", model, lr=0.1, queries=3), []

    def closure() -> Tensor:
        drawn.append((float(np.random.random()), random.random()))
        return loss() * (1 + drawn[-1][0])

    for number in range(2):
        np.random.seed(number)
        random.seed(number)
        expected = float(np.random.random()), random.random()
        np.random.seed(number)
        random.seed(number)
        optimizer.step(closure)
        assert (float(np.random.random()), random.random()) == expected
    assert len(set(drawn[:6])) == len(set(drawn[6:])) == 1 and drawn[0] != drawn[6]


# What a step says


def said(name: str, closure: Callable, model: nn.Module, steps: int = 30, **options) -> list[str]:
    optimizer = create_optimizer(name, model, **{"lr": 1e-3, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(NonFiniteLoss):
            for _ in range(steps):
                optimizer.step(closure)
    ours = ("nothing is learnt", "rounding", "has grown")
    return [str(one.message) for one in caught if any(words in str(one.message) for words in ours)]


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_a_step_that_finds_no_difference_says_so_once(name: str) -> None:
    """Weights of which something has kept a copy, and a loss that has forgotten its parameters."""
    model, _ = problem()
    x = torch.randn(5, 6)
    frozen = copy.deepcopy(model)
    if name != "forward-grad":
        (message,) = said(name, lambda: frozen(x).square().mean(), model)
        for cause in ("cached", "eps=", "steps", "does not use"):
            assert cause in message
    unused = nn.Parameter(torch.ones(3))
    (message,) = said(name, lambda: model(x).detach().square().mean() + 0 * unused.sum(), unused_of(unused))
    assert "does not use" in message


def unused_of(parameter: nn.Parameter) -> nn.Module:
    module = nn.Module()
    module.parameter = parameter
    return module


@pytest.mark.parametrize("name", ["zo-sgd", "zo-rge", "zo-adam"])
def test_a_stepwise_loss_with_too_small_an_eps_is_told(name: str) -> None:
    model, _ = problem()
    x, y = torch.randn(40, 6), torch.randint(3, (40,))

    def errors() -> float:
        return float((model(x).argmax(1) != y).float().mean())

    (message,) = said(name, errors, model)
    assert "eps=0.001" in message and "larger eps" in message
    assert said(name, errors, model, eps=0.5) == []


@pytest.mark.parametrize("name", ["zo-sgd", "zo-per-example", "zo-fzoo"])
def test_differences_that_are_rounding_are_told_once(name: str) -> None:
    model, loss = problem()
    (message,) = said(name, loss, model, eps=2e-7, lr=1e-9, queries=2)
    assert "rounding" in message and "larger eps" in message
    model.double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    assert said(name, lambda: F.cross_entropy(model(x), y), model, eps=1e-6, lr=1e-9, queries=2) == []


@pytest.mark.parametrize("number", [float, Tensor.double, Tensor.numpy, lambda loss: loss.numpy().astype("float64")])
def test_rounding_is_that_of_the_computation_whatever_the_losss_type(
    number: Callable[[Tensor], float | Tensor],
) -> None:
    model, loss = problem()
    (message,) = said("zo-sgd", lambda: number(loss()), model, eps=1e-7, lr=1e-9)
    assert "rounding" in message and "larger eps" in message


def test_losses_that_are_told_may_be_rounding_too() -> None:
    model, loss = problem()
    optimizer = create_optimizer("zo-sgd", model, lr=1e-9, eps=1e-7)
    with pytest.warns(UserWarning, match="rounding"), torch.no_grad():
        for _ in range(12):
            losses = []
            for candidate in optimizer.ask():
                with candidate.shown():
                    losses.append(float(loss()))
            optimizer.tell(losses)


@pytest.mark.parametrize("number", [float, Tensor.double, Tensor.numpy])
def test_a_loss_in_float64_of_parameters_in_float32_is_not_called_rounded(
    number: Callable[[Tensor], float | Tensor],
) -> None:
    """A simulator's own precision is not that of the parameters it takes: its differences may be far smaller, and right."""
    model, _ = problem()

    def simulated() -> float | Tensor:
        return number(1e3 + sum(p.double().square().sum() for p in model.parameters()))

    assert said("zo-sgd", simulated, model, eps=1e-6, lr=1e-9) == []


@pytest.mark.parametrize("name", ["zo-sgd", "zo-per-example", "zo-adam", "fo-sgd"])
def test_a_run_that_diverges_is_told_once(name: str) -> None:
    model, _ = problem()
    x = torch.randn(40, 6)

    def loss() -> Tensor:
        return (model(x) - 1).square().mean(1) if name == "zo-per-example" else (model(x) - 1).square().mean()

    (message,) = said(name, loss, model, lr=30.0 if "adam" in name else 2.0, steps=60)
    assert "grown" in message and "lower lr" in message


@pytest.mark.parametrize("name", list_optimizers())
def test_a_run_that_goes_well_says_nothing(name: str) -> None:
    model, loss = problem()
    assert said(name, loss, model, lr=1.0 if name == "es-cma" else 1e-3, steps=25) == []
