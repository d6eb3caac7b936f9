"""Inside Ray: a Tune trial for one cell, which runs a Ray Train loop over the cell's workers.

With one worker per trial the loop runs in the Tune trial's own process (Ray Train's local mode), which Tune then hands to
the next cell: no process starts, nothing is imported again. With more, Ray Train starts a group of workers that share the
trial's queries.
"""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray import tune

from zeroflow.optim import NonFiniteLoss
from zeroflow.results import records
from zeroflow.sweep.grid import SweepPlacement
from zeroflow.trial.config import TrialConfig


def run_cell(setting: Mapping[str, Any]) -> None:
    """A Tune trial: run one cell and have it written before Tune hears of it. An error becomes a row of ``failures``."""
    started = time.monotonic()
    config = TrialConfig(**setting["cell"])
    placement = SweepPlacement(**setting["placement"])
    try:
        report: dict[str, Any] = {"ok": True, **_fit(config, placement, setting)}
    except Exception as error:
        table = records.failure(config, _cause(error), traceback.format_exc(), 1)
        ray.get(setting["store"].write_failure.remote(table))
        report = {"ok": False, "error": f"{type(_cause(error)).__name__}: {_cause(error)}"}
    tune.report({**report, "cell_seconds": time.monotonic() - started})


def _fit(config: TrialConfig, placement: SweepPlacement, setting: Mapping[str, Any]) -> Mapping[str, Any]:
    workers = placement.workers_per_trial
    resources: dict[str, float] = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker:
        resources["GPU"] = placement.gpus_per_worker
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={**setting, "workers": workers},
        # A few numbers a step are all that workers exchange, also where they share a GPU, which nccl refuses.
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=0 if workers == 1 else workers,
            use_gpu=bool(placement.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=config.cell_id,
            storage_path=setting["scratch"],
            failure_config=ray.train.FailureConfig(max_failures=placement.retries if workers > 1 else 0),
        ),
    )
    outcome = trainer.fit().return_value
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def train_loop(setting: Mapping[str, Any]) -> dict[str, float] | NonFiniteLoss:
    """A Ray Train loop: the whole stream of one cell. Worker 0 has the result written; its summary is returned.

    Which worker this is comes from torch: Ray Train's own context is refused in local mode inside a Tune trial. A cell that
    diverges does so in all workers alike, and would again: that error is returned, so that Ray Train does not retry it.
    """
    from zeroflow.optim.parallel import DistributedExecutor
    from zeroflow.trial.loop import Placement, run_trial

    if commit := setting["commit"]:
        os.environ["ZEROFLOW_GIT_COMMIT"] = commit
    config = TrialConfig(**setting["cell"])
    device = "cpu"
    if setting["placement"]["gpus_per_worker"]:
        # Alone in its process a trial sees its own GPU as the only one.
        device = str(ray.train.torch.get_device()) if setting["workers"] > 1 else "cuda"
    place = Placement(setting["data_dir"], device, threads=setting["placement"]["cpus_per_worker"])
    executor = DistributedExecutor() if setting["workers"] > 1 else None
    # By commit: other code might not make the same steps of the same losses.
    folder = Path(setting["unfinished"]) / f"{config.cell_id}-{(commit or 'unknown')[:12]}"
    try:
        result = run_trial(config, place, executor=executor, folder=folder)
    except NonFiniteLoss as error:
        shutil.rmtree(folder, ignore_errors=True)
        return error
    if executor is None or executor.rank == 0:
        tables = records.tables(result, workers=setting["workers"], ray_version=ray.__version__)
        ray.get(setting["store"].write.remote(tables))
        shutil.rmtree(folder, ignore_errors=True)
    return {key: float(result.summary[key]) for key in ("avg", "last", "fgt")}


def _cause(error: BaseException) -> BaseException:
    """The error a worker raised, out of the wrappers it came in."""
    workers = getattr(error, "worker_failures", None)
    inner = next(iter(workers.values())) if workers else getattr(error, "cause", None)
    return _cause(inner) if isinstance(inner, BaseException) else error
