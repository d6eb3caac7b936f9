"""Nodes that come and go during a sweep: real Ray nodes on one machine, one of them joining, one of them killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doors import listening, unknown_doors
from places import ROOT
from real_sweeps import Sweep, expected, wait_for

from zeroflow import run_trial
from zeroflow.grid.grid_file import load_grid
from zeroflow.results.store import Store
from zeroflow.sweep import checkpoint_sync
from zeroflow.sweep.nodes import nodes_to_come

NODES = """
import sys
from ray.cluster_utils import Cluster

cluster, nodes = Cluster(), {}
cluster.add_node(num_cpus=0, include_dashboard=False)
print(cluster.address, flush=True)
for line in sys.stdin:
    what, name, cache = line.split()
    if what == "add":
        # The disk of a node is nobody else's.
        nodes[name] = cluster.add_node(num_cpus=1, env_vars={"XDG_CACHE_HOME": cache})
    else:
        cluster.remove_node(nodes[name], allow_graceful=False)
    print(what, name, flush=True)
cluster.shutdown()
"""


class Nodes:
    """A Ray cluster whose head computes nothing, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.ray = tempfile.mkdtemp(prefix="zfr")
        environment = {
            **os.environ,
            "RAY_TMPDIR": self.ray,
            "PYTHONPATH": str(ROOT),
            "ZEROFLOW_COPY_EVERY": "1",
            "RAY_raylet_start_wait_time_s": "180",
            "RAY_agent_register_timeout_ms": "180000",
            "RAY_health_check_period_ms": "1000",  # a killed node is missed sooner
        }
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.folder, self.address = folder, self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if not (answer := self.process.stdout.readline().strip()):
            self.errors.seek(0)
            pytest.fail(f"no nodes: {self.errors.read()}")
        return answer

    def say(self, what: str, name: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {name} {self.folder / name}\n")
        self.process.stdin.flush()
        assert self._answer() == f"{what} {name}"

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.ray, ignore_errors=True)


@pytest.fixture
def nodes(tmp_path: Path, s3: str) -> Iterator[Nodes]:
    cluster = Nodes(tmp_path)
    yield cluster
    cluster.end()


GRID = """
base: {checkpoint: none, image_size: 7, tasks: 5, stop_after: 1, epochs: 3, batch_size: 8, method: aper-adapter, lr: 1e-4}
grid: [{optimizer: zo-sgd}, {method: simplecil}]
placement: {gpus_per_worker: 0}
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_joins_is_used_and_what_a_killed_one_was_at_goes_on_there(nodes: Nodes, tmp_path: Path) -> None:
    file, root = tmp_path / "elastic.yaml", "s3://bucket/elastic"
    file.write_text(GRID)
    store, (config, short) = Store(root), load_grid(file).cells
    nodes.say("add", "first")
    sweep = Sweep(file, root, "--ray-address", nodes.address)

    def copied() -> int:
        """Bytes of the cell's logs that are safe in the store."""
        assert sweep.process.poll() is None and not store.has(config.cell_id), sweep.output()
        names = [name for name in store.names("unfinished") if name.endswith(".losses")]
        assert all(name.startswith(config.cell_id) for name in names)
        return sum(len(store.storage.read(f"unfinished/{name}") or b"") for name in names)

    try:
        wait_for(lambda: copied() > 1000, every=0.3)
        nodes.say("add", "second")
        doors = listening(nodes.process.pid)
        assert {"gcs_server", "raylet"} <= {name for name, _ in doors}
        assert unknown_doors(doors, "a cluster of three nodes") == set()
        bytes_before = copied()
        nodes.say("remove", "first")
        assert not store.has(config.cell_id), "it was over before its node was"
        said = sweep.wait()
    finally:
        sweep.process.kill()
    assert "2 of 2 cells done, 0 failed" in said, said
    assert store.done() == {config.cell_id, short.cell_id}
    trial = store.row("trials", config.cell_id)
    steps = [s for s in store.load("steps").sort_by("step").to_pylist() if s["cell_id"] == config.cell_id]
    assert trial is not None
    assert ([s["loss"] for s in steps], trial["avg"], trial["last"], trial["forward_passes"]) == expected(config)
    # 32 bytes of the log are a step; one that is made again takes no time.
    assert sum(s["seconds"] is None for s in steps) >= bytes_before // 32
    assert not store.names("unfinished") and not store.load("failures").num_rows


LOST = """
import sys
from pathlib import Path
from zeroflow.results.store import Store
from zeroflow.grid.grid_file import load_grid
from zeroflow.sweep.checkpoint_sync import synchronised
from zeroflow import run_trial

config, folder = load_grid(sys.argv[1]).cells[0], Path(sys.argv[3])
with synchronised(Store(sys.argv[2]), folder):
    run_trial(config, folder=folder)
"""


@pytest.mark.slow
def test_a_cell_goes_on_from_the_store_on_a_machine_that_has_never_seen_it(s3: str, tmp_path: Path) -> None:
    """The same without Ray: one process is killed with all that its machine had, another one makes the same bits."""
    file, root = tmp_path / "grid.yaml", "s3://bucket/lost"
    file.write_text(GRID.replace("epochs: 3", "epochs: 1"))
    store, config = Store(root), load_grid(file).cells[0]
    name = f"{config.cell_id}-code"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ZEROFLOW_COPY_EVERY": "0.2"}
    lost = subprocess.Popen(
        [sys.executable, "-c", LOST, str(file), root, str(tmp_path / "lost" / name)], env=environment
    )

    def copied() -> int:
        files = store.files(f"unfinished/{name}")
        return sum(len(data) for file_name, data in files if file_name.endswith(".losses"))

    wait_for(lambda: lost.poll() is not None or copied() > 1000, every=0.3)
    lost.kill()
    lost.wait()
    logged = copied()
    with checkpoint_sync.synchronised(store, tmp_path / "other" / name):
        found = run_trial(config, folder=tmp_path / "other" / name)
    assert (
        [s.loss for s in found.steps],
        *(found.summary[key] for key in ("avg", "last", "forward_passes")),
    ) == expected(config)
    assert sum(step.seconds is None for step in found.steps) >= logged // 32 > 30, "32 bytes of the log are a step"


def test_copies_of_unfinished_work_go_both_ways_and_the_longer_log_wins(s3: str, tmp_path: Path) -> None:
    store, here, there = Store("s3://bucket/synchronised"), tmp_path / "a" / "0123-code", tmp_path / "b" / "0123-code"
    with checkpoint_sync.synchronised(store, here):
        here.mkdir(parents=True)
        (here / "task-0.losses").write_bytes(bytes(48))
        (here / "tasks.pt").write_bytes(b"one")
        (here / ".lock").touch()
        copies = checkpoint_sync.Copies(store, here)
        copies.copy()
    assert store.names("unfinished") == ["0123-code/task-0.losses", "0123-code/tasks.pt"]
    there.mkdir(parents=True)
    (there / "task-0.losses").write_bytes(bytes(24))
    (there / "task-1.losses").write_bytes(bytes(8))
    with checkpoint_sync.synchronised(store, there):
        assert {p.name: p.stat().st_size for p in there.iterdir()} == {
            "task-0.losses": 48,
            "task-1.losses": 8,
            "tasks.pt": 3,
        }
    (here / "task-0.losses").write_bytes(bytes(72))
    checkpoint_sync.Copies(store, here).fetch()
    assert (here / "task-0.losses").stat().st_size == 72, "this node is further than its copy"
    checkpoint_sync.remove_copies(store, "0123")
    assert not store.names("unfinished")


def test_a_store_out_of_reach_stops_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.setattr(checkpoint_sync, "INTERVAL", 0.01)
    folder = tmp_path / "0123-code"
    folder.mkdir()
    (folder / "task-0.losses").write_bytes(bytes(8))
    with checkpoint_sync.synchronised(Store("s3://no-such-bucket/x"), folder):
        assert (folder / "task-0.losses").exists()
    checkpoint_sync.remove_copies(Store("s3://no-such-bucket/x"), "0123")


class Group:
    def __init__(self, resources: dict[str, float], most: int) -> None:
        self.resources, self.max_count = resources, most


@pytest.mark.parametrize(
    ("groups", "here", "come"),
    [
        ([], [{"CPU": 2.0}], []),
        # Spot and on-demand ones stand for one another; the head's kind has none to come.
        (
            [Group({"CPU": 4, "GPU": 1}, 3), Group({"CPU": 4, "GPU": 1, "accelerator_type:L4": 1}, 3), Group({}, 0)],
            [{"memory": 1.0}, {"CPU": 4.0, "GPU": 1.0, "memory": 9.0}],
            [{"CPU": 4.0, "GPU": 1.0}] * 2,
        ),
        ([Group({"CPU": 4}, 1)], [{"CPU": 4.0}, {"CPU": 4.0}], []),
    ],
)
def test_nodes_that_the_autoscaler_may_start_are_reckoned_with(
    groups: list[Any], here: list[Any], come: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.state import state

    config = type("Config", (), {"node_group_configs": groups})()
    monkeypatch.setattr(state, "get_cluster_config", lambda: config if groups else None)
    assert nodes_to_come(here) == come
