"""Sweeps whose processes are really killed, stopped, or short of room: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from places import ROOT
from real_sweeps import LONG_CELL, Sweep, assert_clean, expected, logged, rows_of, wait_for

import zeroflow.results
from zeroflow.cli import main
from zeroflow.grid.grid_file import load_grid
from zeroflow.results.store import Store
from zeroflow.results.sweeps import sweeps
from zeroflow.trial.result import provenance

CHAOS = """
name: chaos
base: {checkpoint: none, image_size: 14, tasks: 5, batch_size: 16, method: aper-adapter, lr: 1e-4, eps: 1e-2}
grid:
  - {optimizer: zo-adam, queries: 2, epochs: 2}
  - {optimizer: zo-sgd-conserve, epochs: 1}
  - {method: simplecil}
placement:
  gpus_per_worker: 0
  retries: 1000
  rules: [{when: {optimizer: zo-adam}, set: {workers_per_trial: 2}}]
"""


VICTIMS = ("ImplicitFunc", "TrainController", "RayTrainWorker", "Coordinator")
"""Trials, Ray Train's controllers and workers, the coordinator; as they call themselves."""


RAY_ITSELF = ("raylet/raylet", "gcs/gcs_server")
"""Programs of Ray without which nothing goes on."""


RAY_DIED = re.compile(r"the sweep was stopped: Ray's (GCS|raylet) died; the same command goes on from here")


EVERYTHING = ((*VICTIMS, "sweep", *RAY_ITSELF) * 15)[:100]
"""A hundred, of every kind fourteen or fifteen."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("planned", [VICTIMS, pytest.param(EVERYTHING, marks=pytest.mark.long, id="100")])
@pytest.mark.timeout(7200)
def test_random_kills_lose_no_cell_and_no_bit(planned: Sequence[str], tmp_path) -> None:
    kills, planned = set(planned), list(planned)
    file, out, chance = tmp_path / "chaos.yaml", tmp_path / "out", random.Random(len(planned))
    file.write_text(CHAOS if len(planned) > len(VICTIMS) else CHAOS.replace("tasks: 5", "tasks: 20, stop_after: 2"))
    chance.shuffle(planned)
    began = time.monotonic()
    killed: list[str] = []
    started: list[Sweep] = []
    number = len(planned)
    seeds = [0]
    while True:
        sweep = Sweep(file, out, "--set", f"seed={seeds}")
        started.append(sweep)
        while sweep.process.poll() is None:
            time.sleep(chance.uniform(0.5, 2.0))
            alive = {"sweep": [sweep.process.pid], **sweep.named(*VICTIMS, *RAY_ITSELF)}
            kind = next((kind for kind in planned if alive[kind]), None)
            # Something has begun: a sweep that is killed at once again and again gets nowhere.
            if kind is None or not alive["ImplicitFunc"] or sweep.process.poll() is not None:
                continue
            planned.remove(kind)
            killed.append(kind)
            os.kill(chance.choice(alive[kind]), signal.SIGKILL)
            if kind in RAY_ITSELF:
                sweep.wait(60)
        if sweep.process.returncode == 0:
            if not planned:
                break
            seeds.append(len(seeds))  # over before all were killed that should be: some more to do
            continue
        if killed[-1] in RAY_ITSELF:
            assert sweep.process.returncode == 1 and RAY_DIED.search(sweep.output()), sweep.output()
        else:
            assert sweep.process.returncode == -signal.SIGKILL, sweep.output()
    assert len(killed) == number and kills == set(killed)
    grid = load_grid(file, {"seed": seeds})
    found = rows_of(out)
    assert sorted(found) == sorted(config.cell_id for config in grid.cells)
    for config in grid.cells:
        assert found[config.cell_id] == expected(config), config.label()
    assert not zeroflow.results.load(out, "failures").num_rows
    whole = number > len(VICTIMS)
    assert all(sweep.gone(90, agents=whole) for sweep in started), "processes outlived their sweep"
    assert_clean(out)
    if where := os.environ.get("ZEROFLOW_KILLS"):
        counts = {"kills": dict(Counter(killed)), "sweeps": len(started), "cells": len(grid.cells)}
        facts = {"seconds": round(time.monotonic() - began), **provenance(torch.device("cpu"), {"threads": 1})}
        Path(where).write_text(json.dumps({**counts, **facts}, indent=1, default=str) + "\n")
    assert not [p for s in started for p in Path(tempfile.gettempdir()).glob(f"zeroflow-*-{s.process.pid}-*")]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("program", [RAY_ITSELF[0], pytest.param(RAY_ITSELF[1], marks=pytest.mark.long)])
def test_a_sweep_whose_ray_dies_ends_with_one_sentence(program: str, tmp_path) -> None:
    """Without a watch it waits for a minute, then is ended by Ray (GCS), or waits for ever (raylet)."""
    file, out = tmp_path / "long.yaml", tmp_path / "out"
    file.write_text(LONG_CELL)
    sweep = Sweep(file, out)
    wait_for(lambda: logged(out) >= 240 or sweep.process.poll() is not None)
    ((pid,),) = sweep.named(program).values()
    os.kill(pid, signal.SIGKILL)
    said = sweep.wait(30)
    assert sweep.process.returncode == 1 and len(RAY_DIED.findall(said)) == 1 and "Traceback" not in said, said
    assert sweep.gone() and logged(out) >= 240


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sweep_is_gone_on_with_from_its_log(tmp_path) -> None:
    file, out = tmp_path / "long.yaml", tmp_path / "out"
    # As many steps, of half as many images that are a quarter as large.
    less = "image_size: 7, tasks: 10, stop_after: 1, epochs: 2, batch_size: 8"
    file.write_text(LONG_CELL.replace("image_size: 14, tasks: 5, stop_after: 1, epochs: 2, batch_size: 16", less))
    sweep = Sweep(file, out)
    wait_for(lambda: logged(out) >= 2000 or sweep.process.poll() is not None)
    # Whoever kills all of it kills the cell's process too, which would else go on until Ray misses the sweep.
    everything = [sweep.process.pid, *sweep.named("ImplicitFunc")["ImplicitFunc"]]
    for pid in everything:
        os.kill(pid, signal.SIGKILL)
    sweep.wait()
    status = CliRunner().invoke(main, ["status", str(out)], catch_exceptions=False)
    assert "sweep long: killed" in status.stdout and "1 missing" in status.stdout, status.output
    assert logged(out) >= 2000
    again = Sweep(file, out)
    assert "1 of 1 cells done" in again.wait(), again.output()
    (config,) = load_grid(file).cells
    assert rows_of(out)[config.cell_id] == expected(config)
    steps = zeroflow.results.load(out, "steps")
    assert steps["seconds"].null_count >= 2000 // 32, "a replayed step takes no time: 32 bytes of the log are one"
    assert [s["state"] for s in sweeps(Store(out))] == ["killed", "finished"]
    assert_clean(out)
    assert sweep.gone(), "Ray outlived its driver"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long  # a signal to the whole group (tests/sweep/test_signals.py) is the harder case
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_ends_in_order_and_another_one_goes_on(stop: signal.Signals, tmp_path) -> None:
    file, out = tmp_path / "long.yaml", tmp_path / "out"
    # Longer than it takes a busy machine to look at it and to stop it.
    file.write_text(LONG_CELL.replace("{optimizer: zo-sgd}", "{optimizer: zo-sgd, queries: [8, 9]}"))
    sweep = Sweep(file, out, "--max-concurrent", "1")
    wait_for(lambda: logged(out) >= 2000 or sweep.process.poll() is not None)
    os.kill(sweep.process.pid, stop)
    said = sweep.wait(60)
    assert sweep.process.returncode == 1 and "the sweep was stopped: interrupted" in said, said
    assert "0 of 2 cells done, 0 failed, 2 missing" in said and "Traceback" not in said
    assert sweep.gone() and logged(out) >= 2000
    assert [s["state"] for s in sweeps(Store(out))] == ["interrupted"]


OUT_OF_MEMORY = """
import torch
from zeroflow.data import load_dataset
from zeroflow.methods.simplecil import SimpleCIL
from zeroflow.methods.method import register_method

class Hungry(SimpleCIL):
    def features(self, images, spaces):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return super().features(images, spaces)

@register_method("hungry", "needs small batches")
class Half(Hungry):
    room = 8

@register_method("starving", "needs smaller ones than there will be")
class Quarter(Hungry):
    room = 4
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_cell_that_runs_out_of_memory_is_tried_again_with_what_the_grid_allows(tmp_path, monkeypatch) -> None:
    """An outside package, found by its entry point as an installed one would be, brings methods that need small batches."""
    package, out = tmp_path / "packages", tmp_path / "out"
    (package / "hungry-1.dist-info").mkdir(parents=True)
    (package / "hungry.py").write_text(OUT_OF_MEMORY)
    (package / "hungry-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: hungry\nVersion: 1\n")
    (package / "hungry-1.dist-info" / "entry_points.txt").write_text(
        "[zeroflow.methods]\nhungry = hungry\nstarving = hungry\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package))
    file = tmp_path / "grid.yaml"
    file.write_text(
        "base: {checkpoint: none, image_size: 7, tasks: 20, stop_after: 2}\n"
        "grid: [{method: [hungry, starving, simplecil], batch_size: 8}]\n"
        "placement: {gpus_per_worker: 0, max_concurrent: 1, out_of_memory: [{evaluation_batch: 16}, {evaluation_batch: 8}]}\n"
    )
    sweep = Sweep(file, out)
    said = sweep.wait()
    assert sweep.process.returncode == 1 and "2 of 3 cells done, 1 failed" in said, said
    assert said.count("out of memory, to be tried again") == 4, said
    done = {row["method"] for row in zeroflow.results.load(out, "trials").to_pylist()}
    assert done == {"hungry", "simplecil"}
    failures = zeroflow.results.load(out, "failures").to_pylist()
    assert [(f["error"], f["attempts"]) for f in failures] == [("OutOfMemoryError", 3)]


HOARDER = """
import os
import numpy as np
from zeroflow.methods.method import register_method
from zeroflow.methods.simplecil import SimpleCIL

@register_method("hoarder", "fills the memory, unless it gets small batches")
class Hoarder(SimpleCIL):
    def features(self, images, spaces):
        kept = [np.ones(2**25) for _ in range(40)] if len(images) > 8 else []
        with open(os.environ["DEATHS"], "a") as log:
            log.write(f"{len(images)} {len(kept)}\\n")
        return super().features(images, spaces)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_a_process_that_ray_kills_for_its_memory_does_not_end_the_sweep(tmp_path, monkeypatch) -> None:
    """Ray's own monitor does, before the kernel: four GiB above what is in use now, of which the cell wants ten."""
    file, out, method = tmp_path / "grid.yaml", tmp_path / "out", tmp_path / "hoarder.py"
    method.write_text(HOARDER)
    memory = psutil.virtual_memory()
    monkeypatch.setenv("RAY_memory_usage_threshold", str((memory.total - memory.available + 2**32) / memory.total))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "50")
    monkeypatch.setenv("DEATHS", str(tmp_path / "deaths"))
    file.write_text(
        "imports: [hoarder.py]\n"
        "base: {checkpoint: none, image_size: 7, tasks: 5, class_order_seed: [1, 2]}\n"
        "grid: [{method: [hoarder, simplecil]}]\n"
        "placement: {gpus_per_worker: 0, retries: 1, out_of_memory: [{evaluation_batch: 8}]}\n"
    )
    sweep = Sweep(file, out, "--import", str(method))
    said = sweep.wait()
    assert sweep.process.returncode == 0 and "4 of 4 cells done, 0 failed" in said, said
    assert said.count("out of memory, to be tried again with more") == 2, said
    assert "kill" not in str(zeroflow.results.load(out, "failures").to_pylist())
    began = (tmp_path / "deaths").read_text().splitlines() if (tmp_path / "deaths").exists() else []
    assert all(line.endswith(" 0") for line in began), "whoever filled the memory was killed before it went on"


FULL = """
mount -t tmpfs -o size={size}k tmpfs {out} || exit 77
(for _ in $(seq 2000); do ls {out}/trials/*.parquet && break; sleep 0.05; done; cat /dev/zero > {out}/others) > {out}.log 2>&1 &
{python} {root}/sweeps/full_grid.py --grid {file} --results {out} --no-report; echo "exit $?"
mount -o remount,size=90m {out}
{python} -m zeroflow plan --grid {file} --results {out}
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_full_disk_ends_the_sweep_with_one_message_and_loses_nothing(tmp_path) -> None:
    file, out = tmp_path / "grid.yaml", tmp_path / "out"
    file.write_text(
        "base: {checkpoint: none, image_size: 7, tasks: 5}\n"
        "grid: [{method: simplecil, class_order_seed: [1, 2, 3, 4]}]\n"
        "placement: {gpus_per_worker: 0, max_concurrent: 1}\n"
    )
    out.mkdir()
    script = FULL.format(size=2048, out=out, file=file, python=sys.executable, root=ROOT)
    run = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip("no file system of a given size may be made here")
    first, _, then = run.stdout.partition("exit 1")
    assert "NOT WRITTEN, the sweep ends: " in first and "No space left on device" in first, run.stdout + run.stderr
    assert "the sweep was stopped: " in run.stderr and "Traceback" not in run.stderr
    done = int(re.findall(r"(\d+) of 4 cells done", first)[0])
    assert 1 <= done < 4 and f"4 cells: {done} done, 0 failed, {4 - done} to run" in then, run.stdout


def test_the_record_of_a_sweep_says_how_it_ended(tmp_path) -> None:
    (tmp_path / "sweeps").mkdir()
    record = {
        "grid": "g",
        "state": "running",
        "host": "elsewhere",
        "pid": 1,
        "started_at": "2020-01-01T00:00:00+00:00",
        "written_at": "2020-01-01T00:00:00+00:00",
    }
    (tmp_path / "sweeps" / "a.json").write_text(json.dumps(record))
    (tmp_path / "sweeps" / "b.json").write_text("{not whole")
    assert [(s["file"], s["state"]) for s in sweeps(Store(tmp_path))] == [("a.json", "killed")]
