"""What processes that share the queries of a step, its mini-batch, or both are asked, and find."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F

from zeroflow import Placement, TrialConfig, run_trial
from zeroflow.models.factory import create_backbone
from zeroflow.optim import Executor, Journal, LocalExecutor, Slice, create_optimizer, list_optimizers
from zeroflow.optim.parallel import DistributedExecutor

NAMES = list_optimizers()
FORWARD_PASS = [name for name in NAMES if not name.startswith("fo-")]
SIZES = (6, 5, 1, 6, 5)
"""Mini-batches: one that divides, one that does not, one smaller than the number of shards."""
TOLERANCE = 1e-11
"""Largest difference of a float64 parameter after these steps: a loss's rounding, 1e-16, divided by eps (1e-4 and more), and
what Adam's and its like's divisions by small numbers make of it. Most differ by less than 1e-13."""
TRIAL = {
    "dataset": "some-drawings", "tasks": 2, "epochs": 1, "batch_size": 25, "method": "aper-adapter", "image_size": 14,
}  # fmt: skip
TRIALS = {
    "zo-sgd": {"queries": 2}, "zo-per-example": {}, "zo-svrg": {}, "fo-sgd": {"lr": 0.1},
}  # fmt: skip


def network(hidden: int = 5, *between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), *between, nn.Tanh(), nn.Linear(hidden, 3)).double()


def examples(size: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def closure_of(model: nn.Module, executor: Executor, size: int, number: int, reduction: str = "mean") -> Slice:
    x, y = examples(size, number)
    own = executor.slice(size)

    def loss() -> torch.Tensor:
        assert own.stop > own.start, "a closure without examples is never called"
        return F.cross_entropy(model(x[own]), y[own], reduction=reduction)

    return Slice(loss, own.start, own.stop, size)


def train(
    name: str, executor: Executor, model: nn.Module, sizes: Sequence[int] = SIZES, named: bool = True, **options: Any
) -> dict[str, Any]:
    """A few steps; what is left: parameters and buffers, losses, the count of forward passes."""
    options = {"lr": 0.5 if name == "zo-cars" else 0.01, **options}
    options |= {"snapshot_every": 2} if name == "zo-svrg" else {}
    params = list(model.named_parameters()) if named else model
    optimizer = create_optimizer(name, params, queries=5, seed=3, executor=executor, **options)
    reduction = "none" if optimizer.per_example else "mean"
    losses = []
    for number, size in enumerate(sizes):
        full = [closure_of(model, executor, 5, 100), closure_of(model, executor, min(sizes), 101)]
        losses.append(float(optimizer.step(closure_of(model, executor, size, number, reduction), full)))
    return {"state": model.state_dict(), "losses": losses, "forwards": optimizer.forwards}


def vector(found: dict[str, Any]) -> torch.Tensor:
    return torch.cat([value.double().reshape(-1) for value in found["state"].values()])


def all_names(executor: Executor) -> dict[str, Any]:
    return {name: train(name, executor, network()) for name in NAMES}


def with_buffers(executor: Executor) -> dict[str, Any]:
    """With batch norm and dropout: they see other examples than in one process, but all processes end up alike."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="zo-per-example")
        return {
            name: train(name, executor, network(5, nn.BatchNorm1d(5), nn.Dropout(0.3)), (6, 7, 4), named=False)
            for name in NAMES
            if name != "zo-per-example"
        }


class Counting(nn.Module):
    """Counts the examples it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return x


def statistics(executor: Executor) -> dict[str, Any]:
    return {
        name: train(name, executor, network(5, nn.BatchNorm1d(5), Counting()), (7, 7), named=False, lr=0.0)
        for name in ("zo-sgd", "fo-sgd")
    }


def traffic(executor: Executor) -> dict[str, Any]:
    """Numbers sent in a step, by kind of exchange, for two sizes of a network."""
    found: dict[str, Any] = {}
    for hidden, name in itertools.product((5, 500), ("zo-sgd", "zo-adam", "forward-grad", "fo-sgd")):
        counts: dict[str, list[int]] = {"all_gather": [], "all_reduce": []}
        originals = {kind: getattr(distributed, kind) for kind in counts}

        def counted(kind: str, place: int, counts=counts, originals=originals) -> Callable[..., Any]:
            def exchange(*args: Any, **kwargs: Any) -> Any:
                counts[kind].append(args[place].numel())
                return originals[kind](*args, **kwargs)

            return exchange

        distributed.all_gather, distributed.all_reduce = counted("all_gather", 1), counted("all_reduce", 0)
        try:
            train(name, executor, network(hidden), (6,))
        finally:
            for kind, original in originals.items():
                setattr(distributed, kind, original)
        found[f"{name} {hidden}"] = counts
    return found


def failures(executor: Executor) -> dict[str, str]:
    """What each process sees of a closure that fails in the last one."""
    found = {}
    # An exact gradient of whole mini-batches is nobody else's business.
    for name in ("zo-sgd", "zo-per-example", "forward-grad", *(("fo-sgd",) if executor.shards > 1 else ())):
        model = network()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()

        def closure(model: nn.Module = model, name: str = name) -> torch.Tensor:
            if executor.rank == distributed.get_world_size() - 1:
                raise KeyError("simulator failed")
            x, y = examples(6, 0)
            return F.cross_entropy(model(x), y, reduction="none" if name == "zo-per-example" else "mean")

        optimizer = create_optimizer(name, model, lr=0.1, queries=4, executor=executor)
        try:
            optimizer.step(closure)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)
    return found


def equal_parts(executor: Executor) -> dict[str, Any]:
    """Closures that do not say which part they look at: every process brings one as large."""
    found = {}
    for name in ("zo-sgd", "fo-sgd", "zo-per-example"):
        model, (x, y) = network(), examples(6, 0)
        own = executor.slice(6)
        optimizer = create_optimizer(name, list(model.named_parameters()), lr=0.01, executor=executor)
        reduction = "none" if optimizer.per_example else "mean"
        for _ in range(3):
            optimizer.step(lambda: F.cross_entropy(model(x[own]), y[own], reduction=reduction))  # noqa: B023
        found[name] = {"state": model.state_dict(), "forwards": optimizer.forwards}
    return found


def parts_in_use(executor: Executor) -> dict[str, Any]:
    """A parameter that is in the graph of one shard only, and one that is in none, under weight decay."""
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(3, dtype=torch.float64)) for name in "abc"})
    optimizer = create_optimizer("fo-sgd", list(model.items()), lr=0.1, weight_decay=0.5, executor=executor)
    used = "ab"[: 2 - executor.shard]
    optimizer.step(lambda: sum(model[name].sum() for name in used))
    return {name: p.detach() for name, p in model.items()}


def logged(executor: Executor, folder: Path) -> dict[str, Any]:
    """Steps whose evaluations are written down."""
    found = {}
    for name in FORWARD_PASS:
        journal = Journal(folder / f"{name}.losses", executor)
        found[name] = train(name, journal, network())
        journal.close()
    return found


def trials(executor: Executor) -> dict[str, Any]:
    import conftest

    conftest.some_drawings.__wrapped__()
    found = {}
    for name, more in TRIALS.items():
        config = TrialConfig.from_dict({**TRIAL, "optimizer": name, "method_options": {"dropout": 0.0}, **more})
        result = run_trial(config, executor=executor)
        found[name] = {
            "losses": [step.loss for step in result.steps],
            "accuracy": result.accuracy_matrix,
            "forwards": result.summary["forward_passes"],
        }
    return found


def black_box(executor: Executor) -> dict[str, Any]:
    """What a result says that a black box was asked, and what this process alone asked it."""
    import conftest

    conftest.some_drawings.__wrapped__()
    backbone, own = create_backbone(image_size=14), []

    def ask(images: torch.Tensor) -> torch.Tensor:
        own.append(len(images))
        return backbone(images)

    more = {"access": "black-box", "method": "finetune", "method_options": {"tune": "input-prompt"}}
    config = TrialConfig.from_dict({**TRIAL, "optimizer": "zo-sgd", "queries": 2, "lr": 1e-3, **more})
    summary = run_trial(config, Placement(endpoint=ask), executor=executor).summary
    del own[:2]  # to see how wide its answers are, and that they are alike
    return {"said": (summary["requests"], summary["queried_images"]), "own": (len(own), sum(own))}


def refused(rank: int) -> dict[str, str]:
    """What is said where processes would drift apart."""
    module, found = nn.Linear(5, 3), {}

    def attempt(what: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except (TypeError, ValueError, RuntimeError) as error:
            found[what] = f"{type(error).__name__}: {error}"

    wrapped = nn.parallel.DistributedDataParallel(module)
    attempt("wrapped", lambda: create_optimizer("fo-sgd", wrapped, lr=0.1, executor=DistributedExecutor()))
    sharded, copied = (
        FullyShardedDataParallel(nn.Linear(5, 3), device_id=torch.device("cpu")),
        replicate(nn.Linear(5, 3)),
    )
    attempt("sharded", lambda: create_optimizer("zo-sgd", sharded, lr=0.1, executor=DistributedExecutor()))
    attempt("copied", lambda: create_optimizer("zo-sgd", copied, lr=0.1, executor=DistributedExecutor()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        create_optimizer("zo-sgd", module, lr=0.1)
    found["alone"] = str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_optimizer("zo-sgd", module, lr=0.1, executor=LocalExecutor())
    for what, number, seed in (("parameters", rank, 0), ("seed", 0, rank), ("nothing", 0, 0)):
        torch.manual_seed(number)
        model = nn.Linear(5, 3)
        optimizer = create_optimizer("zo-sgd", model, lr=0.1, seed=seed, executor=DistributedExecutor())
        # The first process goes on to its first exchange, where the other one is missing: it makes that up here.
        attempt(what, lambda: optimizer.step(lambda: model(torch.ones(2, 5)).sum()))  # noqa: B023
        if what in found:
            DistributedExecutor().map(2, lambda index: (0.0,))
    found["late"] = str(warned_at_the_first_step().message)
    # Forward passes alone keep processes alike whatever they look at; exact gradients of other mini-batches do not.
    for what, number in (("mini-batches", rank), ("one mini-batch", 0)):
        torch.manual_seed(0)
        model, own = nn.Linear(5, 3), torch.full((2, 5), 1.0 + number)
        optimizer = create_optimizer("zo-sgd", model, lr=0.1, hybrid=1, executor=DistributedExecutor())
        attempt(what, lambda: optimizer.step(lambda: model(own).sum()))  # noqa: B023
    return found


def warned_at_the_first_step() -> warnings.WarningMessage:
    """Of an optimizer that was there before the processes knew each other, as with accelerate."""
    module = nn.Linear(5, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "is_initialized", lambda: False)
            optimizer = create_optimizer("zo-sgd", module, lr=0.1)
        for _ in range(2):
            optimizer.step(lambda: module(torch.ones(2, 5)).sum())
    (warning,) = caught
    return warning


def process(rank: int, size: int, folder: str) -> None:
    """Everything that is asked of ``size`` processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    queries = DistributedExecutor()
    found["queries"], found["queries, buffers"] = all_names(queries), with_buffers(queries)
    if size == 2:
        shards = DistributedExecutor(shards=2)
        found |= {
            "traffic": traffic(shards),
            "failures of queries": failures(queries),
            "failures": failures(shards),
            "equal parts": equal_parts(shards),
            "logged": logged(shards, Path(folder)),
            "trials": trials(shards),
            "parts in use": parts_in_use(shards),
            "statistics": statistics(shards),
            "black box": [black_box(queries), black_box(shards)],
            "refused": refused(rank),
        }
    if size == 4:
        shards = DistributedExecutor(shards=4)
        found["sums"] = shards.map(2, lambda index: ((1.0, 1e16, -1e16, 0.0)[shards.shard], float(index)), width=2)
        with pytest.raises(ValueError, match=r"shards=3: .* 4"):
            DistributedExecutor(shards=3)
    if size % 2 == 0:
        shards = DistributedExecutor(shards=2)
        found["data"], found["data, buffers"] = all_names(shards), with_buffers(shards)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
