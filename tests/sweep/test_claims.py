"""Sweeps that share a store, in a folder or an object store: a cell has one claimant, and is taken over from a dead one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from pyarrow import fs
from real_sweeps import Sweep, wait_for

from zeroflow.cli import main
from zeroflow.grid.grid_file import load_grid
from zeroflow.results.claims import FolderClaims, ObjectClaims
from zeroflow.results.store import Store
from zeroflow.results.sweeps import sweeps


@pytest.mark.ray
@pytest.mark.slow
def test_two_sweeps_on_one_store_run_no_cell_twice(tmp_path) -> None:
    file, out = tmp_path / "grid.yaml", tmp_path / "out"
    file.write_text(
        "base: {checkpoint: none, image_size: 7, tasks: 5, stop_after: 1, epochs: 1, batch_size: 100, method: aper-adapter, lr: 1e-4}\n"
        "grid: [{optimizer: zo-sgd, seed: [0, 1, 2, 3]}]\nplacement: {gpus_per_worker: 0, max_concurrent: 1}\n"
    )
    pair = [Sweep(file, out), Sweep(file, out)]
    said = [sweep.wait() for sweep in pair]
    assert [sweep.process.returncode for sweep in pair] == [0, 0], said
    lines = [line for text in said for line in text.splitlines() if line.startswith("[")]
    ran = [seed for seed in range(4) for line in lines if f"seed={seed} " in line]
    assert sorted(ran) == [0, 1, 2, 3], said
    assert all("4 of 4 cells done" in text for text in said)


@pytest.mark.ray
@pytest.mark.slow
def test_a_cell_that_its_claimant_never_finishes_is_taken_over(tmp_path) -> None:
    """And a process that dies between two cells takes none of them along."""
    file, out = tmp_path / "grid.yaml", tmp_path / "out"
    file.write_text(
        "base: {checkpoint: none, image_size: 7, tasks: 20, stop_after: 2, method: simplecil}\ngrid: [{class_order_seed: [1, 2]}]\n"
        "placement: {gpus_per_worker: 0, max_concurrent: 1, retries: 0}\n"
    )
    out.mkdir()
    first, second = load_grid(file).cells
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), second.cell_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout and holder.stdout.readline() == b"True\n"
    sweep = Sweep(file, out)
    wait_for(lambda: any(s.get("elsewhere") == 1 and s["done"] == 1 for s in sweeps(Store(out))))
    assert Store(out).done() == {first.cell_id}
    ((idle,),) = sweep.named("ImplicitFunc").values()
    os.kill(idle, signal.SIGKILL)
    holder.kill()
    said = sweep.wait()
    assert "2 of 2 cells done, 0 failed" in said, said


HOLD = """
import sys
from zeroflow.results.claims import FolderClaims, ObjectClaims
claims = FolderClaims(sys.argv[1])
print(claims.take(sys.argv[2]), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_claim_in_a_folder_excludes_other_processes_and_dies_with_its_holder(tmp_path) -> None:
    mine = FolderClaims(tmp_path)
    cells = ["0" * 16, "f" * 16, "0123456789abcdef"]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), cells[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout and holder.stdout.readline() == b"True\n"
    assert [mine.take(cell) for cell in cells] == [True, False, True]
    assert mine.take(cells[0]), "what one has one keeps"
    holder.kill()
    holder.wait()
    assert mine.take(cells[1])
    other = subprocess.run(
        [sys.executable, "-c", HOLD, str(tmp_path), cells[0]], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert other.stdout == "False\n"
    mine.release(cells[0])
    other = subprocess.run(
        [sys.executable, "-c", HOLD, str(tmp_path), cells[0]], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert other.stdout == "True\n"
    mine.close()


@pytest.mark.slow
def test_a_claim_in_an_object_store_excludes_others_and_is_void_when_it_is_not_renewed(s3: str) -> None:
    def claims(lease: float) -> ObjectClaims:
        return ObjectClaims(*fs.FileSystem.from_uri("s3://bucket/claimed"), lease=lease)

    # Times in an object store are whole seconds.
    first, second = claims(6.0), claims(6.0)
    assert first.take("a") and first.take("a") and not second.take("a") and second.take("b")
    time.sleep(8.0)
    assert not second.take("a"), "renewed meanwhile"
    first.release("a")
    assert second.take("a") and not first.take("a")
    # One that stops without a word: its claims are void after a while.
    second._ended.set()
    second._thread.join()
    assert not first.take("b")
    wait_for(lambda: first.take("b"), 20)
    first.close()
    listing = fs.FileSelector("bucket/claimed/claims/b", allow_not_found=True)
    assert not fs.FileSystem.from_uri("s3://bucket/claimed")[0].get_file_info(listing)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_into_an_object_store(s3: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "grid.yaml"
    file.write_text(
        "base: {checkpoint: none, image_size: 7, tasks: 20, stop_after: 2, epochs: 1, batch_size: 100}\n"
        "grid: [{method: simplecil}, {method: aper-adapter, optimizer: zo-sgd}]\n"
        "placement: {gpus_per_worker: 0, max_concurrent: 1}\n"
    )
    sweep = Sweep(file, "s3://bucket/swept")
    assert "2 of 2 cells done" in sweep.wait(), sweep.output()
    store = Store("s3://bucket/swept")
    grid = load_grid(file)
    assert store.done() == {config.cell_id for config in grid.cells}
    assert [record["state"] for record in sweeps(store)] == ["finished"]
    filesystem, base = fs.FileSystem.from_uri("s3://bucket/swept")
    names = [i.path for i in filesystem.get_file_info(fs.FileSelector(base, recursive=True)) if i.is_file]
    assert not [name for name in names if "/claims/" in name or name.endswith(".cells.json")], names
    left = {path.relative_to(tmp_path / "cache").parts[1] for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert left == {"features"}, "nothing unfinished is left"
    again = CliRunner().invoke(main, ["sweep", "--grid", str(file), "--results", "s3://bucket/swept", "--no-report"])
    assert again.exit_code == 0 and "2 done, 0 failed, 0 to run" in again.output
