"""Inside Ray: a Tune trial for one cell, which runs a Ray Train loop over the cell's workers.

With one worker per trial the loop runs in the Tune trial's own process (Ray Train's local mode), which Tune then hands to
the next cell: no process starts, nothing is imported again. With more, a group of Ray Train workers shares the work of each
step, and is kept from cell to cell likewise (``WorkerGroup``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray import tune

from zeroflow.errors import ConfigError
from zeroflow.models.named import find_modules_in
from zeroflow.optim import Executor, NonFiniteLoss
from zeroflow.results import records
from zeroflow.results.store import Store
from zeroflow.secrets import without_secrets
from zeroflow.sweep.group import GroupDied, WorkerGroup
from zeroflow.sweep.placement import CellPlacement
from zeroflow.sweep.travel import forget, travelling
from zeroflow.trial.config import TrialConfig

_FALSE_STARTS = 3
"""How many groups of workers may end before they begin with a cell, beyond its retries."""

_NO_ROOM = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


def run_cell(setting: Mapping[str, Any], desk: Any) -> None:
    """A Tune trial: run one cell, and have it written before Tune hears of it.

    Args:
        setting: ``cell`` (canonical configuration), ``placement`` (of ``CellPlacement``), ``root`` (of the store),
            ``data_dir``, ``commit``, ``code`` (tells versions of the code apart), ``scratch`` (a folder), ``retries``.
        desk: see ``Desk``.
    """
    started = time.monotonic()
    config, placement = TrialConfig(**setting["cell"]), CellPlacement(**setting["placement"])
    # Of a trial that died after its cell was written, and was started again.
    if (done := ray.get(desk.done.remote(config.cell_id))) is not None:
        outcome: Mapping[str, Any] = {"ok": True, **done}
    elif placement.workers_per_trial == 1:
        outcome = _alone(setting, placement, desk)
    else:
        outcome = _shared(setting, placement, desk)
    tune.report({**outcome, "cell_seconds": time.monotonic() - started})


def _alone(setting: Mapping[str, Any], placement: CellPlacement, desk: Any) -> Mapping[str, Any]:
    trainer = ray.train.torch.TorchTrainer(
        lambda: compute(setting, desk),
        scaling_config=ray.train.ScalingConfig(
            num_workers=0, use_gpu=bool(placement.gpus_per_worker), resources_per_worker=placement.worker
        ),
        run_config=ray.train.RunConfig(name=TrialConfig(**setting["cell"]).cell_id, storage_path=setting["scratch"]),
    )
    return dict(trainer.fit().return_value)


def _shared(setting: Mapping[str, Any], placement: CellPlacement, desk: Any) -> Mapping[str, Any]:
    deaths, groups, retries = 0, 0, setting["retries"]
    while True:
        group = WorkerGroup.of(placement, work, desk, retries, setting["scratch"])
        try:
            return group.run(setting)
        except GroupDied as death:
            # Only what happened while this cell was in work counts, and none of the preemptions, which wear no group out.
            begun = ray.get(desk.begins.remote(group.name, group.number))
            deaths += min(begun, retries + 1 if group.worn_out else 1)
            groups += 1
            if deaths > retries or groups > retries + _FALSE_STARTS:
                return failure(_cause(death))


def work(task: Mapping[str, Any]) -> None:
    """The Ray Train loop of a group: one cell after the other, until an empty one comes."""
    from zeroflow.optim.executor import PeerError
    from zeroflow.optim.parallel import DistributedExecutor

    desk, group, executor = task["desk"], task["group"], DistributedExecutor(shards=task["shards"])
    while True:
        found = _next(desk, group) if executor.rank == 0 else None
        number, setting = json.loads(executor.broadcast(json.dumps(found).encode() if found else b""))
        if not setting:
            return
        broken: Exception | None = None
        if executor.rank == 0:
            ray.get(desk.begin.remote(group, number))
        try:
            outcome = compute(setting, desk, executor)
        except PeerError:
            raise  # another worker says what it was, or is dead: then this cell is worked on again
        except Exception as error:
            outcome, broken = failure(error), error
        if broken or executor.rank == 0:
            ray.get(desk.answer.remote(group, number, outcome))
        if broken:
            raise broken  # the others may wait for this one in the middle of a step: all begin anew


def _next(desk: Any, group: str) -> tuple[int, Mapping[str, Any]]:
    """The next cell of a group. One that is done already (the desk was killed before it told) is answered at once."""
    while True:
        number, setting = ray.get(desk.next.remote(group))
        done = setting and ray.get(desk.done.remote(TrialConfig(**setting["cell"]).cell_id))
        if not done:
            return number, setting
        ray.get(desk.answer.remote(group, number, {"ok": True, **done}))


def compute(setting: Mapping[str, Any], desk: Any, executor: Executor | None = None) -> dict[str, Any]:
    """Compute one cell, the whole stream, in this process or together with others; process 0 has the result written.

    Returns:
        ``{"ok": True, "avg", "last", "fgt"}``, or what ``failure`` gives. Together with others only an error that all of them
        have alike is returned, any other one is raised.
    """
    from zeroflow import Placement, run_trial

    if commit := setting["commit"]:
        os.environ["ZEROFLOW_GIT_COMMIT"] = commit
    if folder := setting["folder"]:
        find_modules_in(folder)
    config, placement = TrialConfig(**setting["cell"]), CellPlacement(**setting["placement"])
    device = "cpu"
    if placement.gpus_per_worker:
        # Alone in its process a trial sees its own GPU as the only one.
        device = str(ray.train.torch.get_device()) if executor else "cuda"
    place = Placement(
        setting["data_dir"], device, placement.cpus_per_worker, placement.evaluation_batch, placement.loader_threads,
        placement.cache_bytes, placement.endpoint, placement.endpoint_timeout, placement.price_per_1000_images,
        results=setting["root"],
    )  # fmt: skip
    everything = unfinished(setting["root"])
    # Other code might not make the same steps of the same losses; nor do slices, to the last bit.
    sliced = f"-{placement.data_shards}" if placement.data_shards > 1 else ""
    folder = everything / f"{config.cell_id}-{setting['code']}{sliced}"
    first = executor is None or executor.rank == 0
    # Only where no folder beside the results is everybody's.
    store = None
    if first and "://" in setting["root"]:
        with suppress(ConfigError):  # the desk writes results; a node that reaches no store still computes
            store = Store(setting["root"])
    try:
        with travelling(store, folder) if store else nullcontext():
            result = run_trial(config, place, executor=executor, folder=folder)
        if first:
            tables = records.tables(
                result, workers=placement.workers_per_trial, shards=placement.data_shards, ray_version=ray.__version__
            )
            ray.get(desk.write.remote(tables))
    except Exception as error:
        if executor is not None and not isinstance(error, NonFiniteLoss):
            raise
        if isinstance(error, NonFiniteLoss):
            shutil.rmtree(folder, ignore_errors=True)
            if store:
                forget(store, config.cell_id)
        return failure(error)
    finally:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # a neighbour on the same GPU may need it
    if first:
        if store:
            forget(store, config.cell_id)
        for old in everything.glob(f"{config.cell_id}-*"):
            shutil.rmtree(old, ignore_errors=True)
    return {"ok": True, **{key: float(result.summary[key]) for key in ("avg", "last", "fgt")}}


def failure(error: BaseException) -> dict[str, Any]:
    """What went wrong: ``kind`` is ``memory`` (more of it may help), ``disk`` (no cell can be written) or ``error``."""
    cause, kind = _cause(error), "error"
    if is_out_of_memory(cause):
        kind = "memory"
    elif isinstance(cause, OSError) and cause.errno in _NO_ROOM:
        kind = "disk"
    text = without_secrets("".join(traceback.format_exception(error)))
    return {
        "ok": False, "kind": kind, "type": type(cause).__name__, "message": without_secrets(str(cause)), "traceback": text,
    }  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short: torch's, CUDA's, Python's, or Ray's when it killed a process for it."""
    text = f"{type(error).__name__}: {error}".lower()
    said = any(words in text for words in ("outofmemory", "out of memory", "can't allocate memory", "alloc_failed"))
    return said or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def unfinished(root: str) -> Path:
    """The folder of unfinished cells: beside the results, or of this machine where they are in an object store.

    There a log that grows by a few bytes has no place; copies of it go there, see ``travel``. Of this machine too if it has no
    such folder for results.
    """
    if "://" not in root:
        folder = Path(root) / "unfinished"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "zeroflow" / "unfinished" / hashlib.sha256(root.encode()).hexdigest()[:16]


def _cause(error: BaseException) -> BaseException:
    """The error a worker raised, out of the wrappers it came in."""
    workers = getattr(error, "worker_failures", None)
    inner = next(iter(workers.values())) if workers else getattr(error, "cause", None)
    if inner is None and isinstance(error, GroupDied):
        inner = error.__cause__
    return _cause(inner) if isinstance(inner, BaseException) else error
