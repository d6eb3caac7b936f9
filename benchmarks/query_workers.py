"""What workers that share a step gain and cost: steps per second, the exchange, the replay of a log, and a forecast.

``python benchmarks/query_workers.py measure`` starts processes of one thread each that meet over gloo, and times the trial's
own step (EASE's first task on the embedded backbone, the prefix once a step) with one worker, with workers that share the
queries, and with workers that share the mini-batch. The ways take turns, and medians are kept. Then one process
writes a log of its losses and makes the same steps again from it.

``python benchmarks/query_workers.py simulate`` says from the costs of a step's parts how many steps per second more workers
would make. It is arithmetic, not a measurement: the assumptions are printed with it.
"""

from __future__ import annotations

import functools
import io
import json
import math
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from candidates import new_method, seconds
from quality import drawings
from torch import distributed
from torch.multiprocessing.spawn import spawn

from zeroflow.methods import Method, MiniBatch
from zeroflow.models.factory import create_backbone
from zeroflow.optim import Executor, Journal, LocalExecutor, Slice, ThreeStepOptimizer, create_optimizer
from zeroflow.optim.parallel import DistributedExecutor
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.result import provenance

CPU = torch.device("cpu")
OUTPUT = Path("results/benchmarks/query_workers.json")
REPLAYED = ("zo-sgd", "zo-adam")
WORKERS = (1, 2, 4, 8, 16, 32, 64)
QUERIES = (1, 8, 32)
TASK_SAMPLES = 10 * 80
"""Training drawings of a task of QuickDraw-100 in ten."""


@dataclass
class Setting:
    """What a step is: its optimizer, queries, images, and how often it is measured."""

    optimizer: str
    queries: int
    batch: int
    rounds: int
    steps: int


@dataclass
class Training:
    """The trial's step on drawings of the first task, of which this process looks at its part."""

    setting: Setting
    executor: Executor
    method: Method
    optimizer: ThreeStepOptimizer

    @classmethod
    def make(cls, setting: Setting, executor: Executor, name: str | None = None) -> Training:
        method = new_method(create_backbone()).train()
        optimizer = create_optimizer(
            name or setting.optimizer,
            list(method.trainable().items()),
            lr=1e-3,
            queries=setting.queries,
            executor=executor,
        )
        return cls(setting, executor, method, optimizer)

    @functools.cached_property
    def part(self) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = drawings(self.method.backbone, self.setting.batch, 0)
        own = self.executor.slice(len(labels))
        return images[own], labels[own]

    def step(self) -> None:
        @functools.cache
        def inputs() -> Any:
            return self.method.prepare(MiniBatch(*self.part))

        if not (isinstance(self.executor, Journal) and self.executor.replaying):
            inputs()
        own, loss = self.executor.slice(self.setting.batch), self.method.loss
        if self.optimizer.per_example:
            loss = self.method.losses
        self.optimizer.step(Slice(lambda: loss(inputs()), own.start, own.stop, self.setting.batch))

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def worker(rank: int, workers: int, setting: Setting, folder: str) -> None:
    """One of the processes. All make every way's steps at the same time, but for the first, which one makes alone."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    executors: dict[str, Executor] = {
        "one": LocalExecutor(),
        "queries": DistributedExecutor(),
        "data": DistributedExecutor(shards=workers),
    }
    ways = {way: Training.make(setting, executor) for way, executor in executors.items() if way != "one" or rank == 0}
    for training in ways.values():
        training.steps(1)
    samples: dict[str, list[float]] = {way: [] for way in executors}
    exchanges: dict[str, list[float]] = {way: [] for way in executors}
    numbers = ways["queries"].optimizer.forwards  # evaluations of a step
    for _ in range(setting.rounds):
        for way, executor in executors.items():
            distributed.barrier()
            if way in ways:
                spent = seconds(functools.partial(ways[way].steps, setting.steps), CPU)
                samples[way].append(spent / setting.steps)
            if way != "one":
                distributed.barrier()
                exchange = functools.partial(executor.map, numbers, lambda index: (0.0,))
                exchanges[way].append(seconds(lambda: [exchange() for _ in range(50)], CPU) / 50)  # noqa: B023
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps({"samples": samples, "exchanges": exchanges}))
    distributed.destroy_process_group()


def measure_workers(setting: Setting, workers: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, (workers, setting, folder), nprocs=workers)  # type: ignore[no-untyped-call]
        found = json.loads(Path(folder, "found.json").read_text())
    alone, rows = statistics.median(found["samples"]["one"]), []
    for way, samples in found["samples"].items():
        step, exchanges = statistics.median(samples), found["exchanges"][way]
        exchange = statistics.median(exchanges) if exchanges else 0.0
        rows.append(
            {
                "way": way,
                "workers": 1 if way == "one" else workers,
                "step_seconds": step,
                "steps_per_second": 1 / step,
                "speedup": alone / step,
                "exchange_seconds": exchange,
                "exchange_share": exchange / step,
                "samples": samples,
            }
        )
    return rows


def measure_replay(setting: Setting, name: str) -> dict[str, Any]:
    """Seconds of a real and of a replayed step, and bytes of a task's log against those of a full checkpoint."""
    count = setting.rounds * setting.steps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "losses")
        journal = Journal(path)
        training = Training.make(setting, journal, name)
        real = seconds(lambda: training.steps(count), CPU) / count
        journal.close()
        log = path.stat().st_size / count
        journal = Journal(path)
        again = Training.make(setting, journal, name)
        replayed = seconds(lambda: again.steps(count), CPU) / count
        assert not journal.replaying and torch.equal(again.optimizer.flat.vector, training.optimizer.flat.vector)
        journal.close()
    content = io.BytesIO()
    parameters = {key: value.detach() for key, value in training.method.trainable().items()}
    state = {"parameters": parameters, "optimizer": training.optimizer.state_dict(), "method": training.method.state()}
    torch.save(state, content)
    config = TrialConfig()
    steps = math.ceil(TASK_SAMPLES / (config.batch_size or 1)) * (config.epochs or 0)
    return {
        "optimizer": name,
        "parameters": again.optimizer.flat.size,
        "step_seconds": real,
        "replayed_seconds": replayed,
        "ratio": replayed / real,
        "log_bytes_per_step": log,
        "steps_per_task": steps,
        "log_bytes_per_task": log * steps,
        "checkpoint_bytes": content.tell(),
    }


@dataclass(frozen=True)
class Costs:
    """Seconds of a step's parts. See the options of ``simulate``."""

    forward: float
    start: float
    hop: float
    update: float
    batch: int

    def step(self, workers: int, queries: int) -> tuple[float, int]:
        """Seconds of a step, and the number of slices of the mini-batch that is fastest."""

        def spent(shards: int) -> float:
            evaluations = math.ceil(2 * queries / (workers // shards))
            images = math.ceil(self.batch / shards) / self.batch
            forward = self.start + (self.forward - self.start) * images
            return evaluations * forward + self.hop * (workers - 1) + queries * self.update

        return min((spent(shards), shards) for shards in range(1, self.batch + 1) if workers % shards == 0)


def forecast(costs: Costs) -> list[dict[str, Any]]:
    rows = []
    for queries in QUERIES:
        alone, _ = costs.step(1, queries)
        for workers in WORKERS:
            step, shards = costs.step(workers, queries)
            rows.append(
                {
                    "queries": queries,
                    "workers": workers,
                    "shards": shards,
                    "steps_per_second": 1 / step,
                    "speedup": alone / step,
                }
            )
    return rows


def save(result: Mapping[str, Any], output: Path | None) -> None:
    """Put the result beside what is there of the other command."""
    if output is not None:
        known = json.loads(output.read_text()) if output.exists() else {}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**known, **result}, indent=1) + "\n")


def facts(command: str) -> dict[str, Any]:
    return {"command": command, **{k: v for k, v in provenance(CPU, {"threads": 1}).items() if k != "finished_at"}}


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option("--optimizer", default="zo-sgd", show_default=True)
@click.option("--queries", default=8, show_default=True)
@click.option("--batch", default=48, show_default=True, help="Images of a step.")
@click.option("--workers", default=2, show_default=True, help="Processes that share a step.")
@click.option("--rounds", default=7, show_default=True, help="How often each way has its turn.")
@click.option("--steps", default=3, show_default=True, help="Steps of one turn.")
@click.option("--output", type=click.Path(path_type=Path), help=f"A JSON file, such as {OUTPUT}.")
def measure(
    optimizer: str, queries: int, batch: int, workers: int, rounds: int, steps: int, output: Path | None
) -> None:
    """Time the steps of workers, the exchange between them, and the replay of a log."""
    setting = Setting(optimizer, queries, batch, rounds, steps)
    torch.set_num_threads(1)
    command = "python benchmarks/query_workers.py measure " + " ".join(f"--{k} {v}" for k, v in asdict(setting).items())
    rows = measure_workers(setting, workers)
    replays = [measure_replay(setting, name) for name in REPLAYED]
    click.echo(f"{optimizer}, q = {queries}, {batch} images, processes of one thread\n")
    click.echo("way       workers   ms a step  steps per s  speed-up  exchange ms   share")
    for row in rows:
        click.echo(
            f"{row['way']:8}  {row['workers']:7}  {row['step_seconds'] * 1e3:10.1f}  {row['steps_per_second']:11.3f}  "
            f"{row['speedup']:8.2f}  {row['exchange_seconds'] * 1e3:11.3f}  {row['exchange_share']:6.2%}"
        )
    for row in replays:
        click.echo(
            f"\n{row['optimizer']}: a replayed step takes {row['replayed_seconds'] * 1e3:.2f} ms, a real one "
            f"{row['step_seconds'] * 1e3:.1f} ms ({row['ratio']:.2%}); a task's log of {row['steps_per_task']} steps has "
            f"{row['log_bytes_per_task']:.0f} bytes, one checkpoint {row['checkpoint_bytes']}"
        )
    save({**facts(f"{command} --workers {workers}"), **asdict(setting), "workers": rows, "replay": replays}, output)


@main.command()
@click.option("--forward-ms", default=42.0, show_default=True, help="One evaluation: a forward pass of a mini-batch.")
@click.option("--start-ms", default=5.0, show_default=True, help="What of it does not shrink with the images.")
@click.option("--hop-ms", default=0.1, show_default=True, help="The exchange, for each worker beyond the first.")
@click.option("--update-ms", default=1.0, show_default=True, help="To regenerate and add one direction.")
@click.option("--batch", default=48, show_default=True, help="Images of a mini-batch.")
@click.option(
    "--measured", type=click.Path(exists=True, path_type=Path), help="Take hop and update from this file of `measure`."
)
@click.option("--output", type=click.Path(path_type=Path), help=f"A JSON file, such as {OUTPUT}.")
def simulate(
    forward_ms: float,
    start_ms: float,
    hop_ms: float,
    update_ms: float,
    batch: int,
    measured: Path | None,
    output: Path | None,
) -> None:
    """Say how fast more workers would be.

    The default of --forward-ms is ViT-B/16 at 224 pixels: 48 images of 35 GFLOP each at 40 TFLOP/s of float32.
    """
    source = "given"
    if measured:
        known = json.loads(measured.read_text())
        shared, (replay, *_) = known["workers"][1], known["replay"]
        hop_ms = 1e3 * shared["exchange_seconds"] / max(shared["workers"] - 1, 1)
        update_ms = 1e3 * replay["replayed_seconds"] / known["queries"]
        source = "measured on the embedded backbone's adapters"
    costs = Costs(forward_ms / 1e3, start_ms / 1e3, hop_ms / 1e3, update_ms / 1e3, batch)
    assumptions = [
        f"two-sided differences: 2q evaluations of {forward_ms:g} ms, {batch} images each",
        f"an evaluation of fewer images takes {start_ms:g} ms and a share of the rest",
        f"the exchange is a ring: {hop_ms:.3g} ms for each worker beyond the first ({source})",
        f"every worker regenerates all q directions for the update: {update_ms:.3g} ms each ({source})",
        "workers are equally fast, one GPU each; the prefix, and the making of images, are left out",
        "workers share evaluations first; slices of the mini-batch where that is faster",
    ]
    rows = forecast(costs)
    for assumption in assumptions:
        click.echo(f"assumed: {assumption}")
    click.echo("\n  q  workers = queries x data   steps per s  speed-up")
    for row in rows:
        groups = row["workers"] // row["shards"]
        click.echo(
            f"{row['queries']:3}  {row['workers']:7} = {groups:7} x {row['shards']:4}  {row['steps_per_second']:12.2f}  "
            f"{row['speedup']:8.2f}"
        )
    save({"forecast": {"assumptions": assumptions, "costs": asdict(costs), "rows": rows}}, output)


if __name__ == "__main__":
    main()
