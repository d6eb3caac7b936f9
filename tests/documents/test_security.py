"""Files from strangers, open doors, secrets: what must not happen, tried."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from doors import listening, open_to_the_network, unknown_doors
from everything import everything
from places import ROOT

import zeroflow.results
from zeroflow.cli import main
from zeroflow.clusters.data_sync import synchronise
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import load_grid, parse_override
from zeroflow.models.factory import create_backbone
from zeroflow.results.store import Store
from zeroflow.secrets import without_secrets
from zeroflow.sweep.failures import failed
from zeroflow.trial.checkpoint import Checkpoints


class Trap:
    """Leaves a file behind when a pickle of it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What appears if code of a stranger has run."""
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap works"
    sprung.unlink()
    return sprung


# Files from strangers.


@pytest.mark.parametrize(
    "text",
    [
        "grid: [!!python/object/apply:os.system ['touch {mark}']]",
        "grid: !!python/object/new:os.system ['touch {mark}']",
        "base: {{method: !!python/name:os.system }}\ngrid: [{{}}]",
    ],
)
def test_a_grid_runs_no_code(text: str, mark: Path, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(text.format(mark=mark))
    with pytest.raises(ConfigError):
        load_grid(file)
    with pytest.raises(ConfigError):
        parse_override(f"seed=!!python/object/apply:os.system ['touch {mark}']")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.bin", "net.ckpt", "net.tar", "net.safetensors"])
def test_a_checkpoint_runs_no_code(name: str, mark: Path, tmp_path: Path) -> None:
    file = tmp_path / name
    torch.save({"weight": Trap(mark)}, file)
    with pytest.raises(ConfigError):
        create_backbone("vit_tiny_patch16_224", checkpoint=str(file))
    file.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(ConfigError):
        create_backbone("vit_tiny_patch16_224", checkpoint=str(file))
    assert not mark.exists()


def test_unfinished_work_runs_no_code(mark: Path, tmp_path: Path) -> None:
    packed = io.BytesIO()
    torch.save({"account": Trap(mark)}, packed)
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "tasks.pt").write_bytes(packed.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        Checkpoints(tmp_path / "cell").load("tasks")
    assert not mark.exists()


@pytest.mark.slow
def test_results_run_no_code(mark: Path, tmp_path: Path) -> None:
    """Pickles in the schema's metadata, where Arrow's Python extension types and pandas look for them."""
    store = everything(Store(tmp_path / "store"))
    file = next((tmp_path / "store" / "trials").glob("*.parquet"))
    table = pq.read_table(file)
    packed = pickle.dumps(Trap(mark))
    evil = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": packed}
    fields = [field.with_metadata(evil) if field.name == "method" else field for field in table.schema]
    schema = pa.schema(fields, metadata={**evil, b"pandas": packed, b"zeroflow": packed})
    pq.write_table(pa.table([column.combine_chunks() for column in table.columns], schema=schema), file)
    before = len(store.done())
    assert len(zeroflow.results.load(tmp_path / "store", "trials")) == before
    run = CliRunner().invoke(main, ["report", str(tmp_path / "store"), "-o", str(tmp_path / "report.html")])
    assert run.exit_code == 0, run.output
    assert not mark.exists()


def test_data_from_a_bucket_stays_in_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "source"
    (outside / "set").mkdir(parents=True)
    (outside / "set" / "a").write_text("a")
    (outside / "set" / "b").symlink_to(outside / "set" / "a")
    assert synchronise(str(outside), tmp_path / "data") == 2
    assert sorted(p.name for p in (tmp_path / "data").rglob("*") if p.is_file()) == ["a", "b"]
    with pytest.raises(ConfigError, match="nothing is there"):
        synchronise(str(tmp_path / "none"), tmp_path / "data")


# Secrets.


def test_secrets_are_cut_out_of_what_a_failed_cell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0f1e2d3c4b5a")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/somebody/.ray/auth_token")
    monkeypatch.setenv("MY_TOKEN", "1")
    try:
        raise OSError(
            "PUT https://me:hunter2hunter2@host/x with wJalrXUtnFEMI and 0f1e2d3c4b5a from /home/somebody/.ray/auth_token 1"
        )
    except OSError as error:
        told = failed(error)
    for text in (told.message, told.traceback):
        assert not any(secret in text for secret in ("wJalrXUtnFEMI", "0f1e2d3c4b5a", "hunter2"))
    assert told.message == "PUT https://***@host/x with *** and *** from /home/somebody/.ray/auth_token 1"
    assert without_secrets("nothing") == "nothing"


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="has credentials in it") as error:
        Store("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/runs")
    assert "wJalr" not in str(error.value) and "AKIA" not in str(error.value)


SWEEP = """
base: {checkpoint: none, image_size: 7, tasks: 5, stop_after: 1, epochs: 1, batch_size: 100, lr: 1e-4}
grid: [{method: aper-adapter, optimizer: zo-sgd, queries: 2}]
placement: {gpus_per_worker: 0, workers_per_trial: 2}
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_opens_no_door_and_writes_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers share a cell: Ray's processes, torch's meeting point and gloo, looked at while they run."""
    file, out = tmp_path / "grid.yaml", tmp_path / "out"
    file.write_text(SWEEP)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret := "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", token := "0f1e2d3c4b5a69788796a5b4c3d2e1f0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = [sys.executable, str(ROOT / "sweeps" / "full_grid.py"), "--grid", str(file), "--results", str(out)]
    seen: set[tuple[str, str]] = set()
    with (tmp_path / "log").open("w") as log:
        sweep = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 400
    try:
        while sweep.poll() is None and time.monotonic() < deadline:
            seen |= listening(sweep.pid)
            time.sleep(1.0)
    finally:
        sweep.kill()
    said = (tmp_path / "log").read_text()
    assert "1 of 1 cells done" in said, said
    assert {"gcs_server", "raylet"} <= {name for name, _ in seen} and any("TrainWorker" in name for name, _ in seen), (
        seen
    )
    assert open_to_the_network(seen) == set(), seen
    assert unknown_doors(seen, "a sweep on this machine") == set()
    for written in [said.encode(), *(path.read_bytes() for path in out.rglob("*") if path.is_file())]:
        assert secret.encode() not in written and token.encode() not in written
