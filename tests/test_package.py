"""What is installed: the wheel alone runs a cell, and the rooms import in one direction."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_runs_a_cell_outside_the_checkout(tmp_path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "zeroflow/py.typed", "zeroflow/data/embedded/quickdraw100.npz", "zeroflow/data/embedded/ATTRIBUTION.md",
        "zeroflow/models/embedded/quickdraw_vit.safetensors", "zeroflow/models/embedded/MODEL_CARD.md",
        "zeroflow/results/paper/table1_accuracy.csv", "zeroflow/results/paper/ATTRIBUTION.md",
    ):  # fmt: skip
        assert wanted in names
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    program = (
        f"import zeroflow; assert zeroflow.__file__.startswith({str(site)!r}), zeroflow.__file__; "
        "config = zeroflow.TrialConfig.from_dict({'method': 'simplecil'}); "
        "summary = zeroflow.run_trial(config).summary; assert summary['last'] > 30, summary"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("zeroflow.optim", ["ray", "timm", "torchvision", "pyarrow", "plotly"]),
        ("zeroflow.models.backbone", ["ray", "timm", "pyarrow", "plotly", "zeroflow.methods", "zeroflow.trial"]),
        ("zeroflow.models.factory", ["ray", "timm", "pyarrow", "plotly", "zeroflow.methods", "zeroflow.trial"]),
        ("zeroflow.methods", ["ray", "pyarrow", "plotly", "zeroflow.trial"]),
        ("zeroflow.trial.trial", ["ray", "pyarrow", "plotly", "zeroflow.results"]),
        ("zeroflow.results", ["ray", "torch", "timm"]),
        ("zeroflow.sweep.plan", ["ray", "timm", "torchvision", "plotly", "torch._dynamo"]),
        ("zeroflow.cli", ["ray", "torch", "timm", "pyarrow", "plotly"]),
    ],
)
def test_a_room_imports_only_what_is_before_it(module: str, unwanted: list[str]) -> None:
    program = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_no_file_names_a_place_of_one_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked:
        path = ROOT / name
        assert path.stat().st_size <= 10 * 2**20, f"{name} is larger than 10 MiB"
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".cfg", ".toml", ".json"}:
            assert str(ROOT) + "/" not in path.read_text(), f"{name} names {ROOT}"


def test_every_number_in_the_documents_comes_from_the_committed_results() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
