"""The benchmarks run and give what the documents are made of; no number here depends on a machine's speed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from zeroflow.optim import list_optimizers, optimizers

ROOT = Path(__file__).parent.parent
PROGRAM = """
import pathlib, sys
sys.path.insert(0, "docs")
import generate
generate.RESULTS = pathlib.Path(sys.argv[1])
for name in ("optimizer-time", "optimizer-memory", "optimizer-quality"):
    table = generate.BLOCKS[name]()
    assert table.endswith("\\n") and "| zo-sgd |" in table and "nan" not in table, table
"""


@pytest.mark.slow
def test_every_optimizer_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "benchmarks" / "optimizers.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "optimizers.py"), "--quick", "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) not in output.read_text()
    result = json.loads(output.read_text())
    assert {"command", "device", "threads", "dtype", "torch_version", "git_commit", "targets"} <= result.keys()
    assert [model["model"] for model in result["models"]] == ["embedded", "vit-tiny"]
    names = {*list_optimizers(), "mezo-loop"}
    for model in result["models"]:
        ratios = list(model["perturbation"].values())
        for part, keys in (("time", ("in_forwards", "per_query", "limit")), ("memory", ("mib", "ratio"))):
            assert {row["optimizer"] for row in model[part]} == names
            ratios += [row[key] for row in model[part] for key in keys]
        assert 0 < model["prefix_share"] < 1
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    quality = result["quality"]
    kinds = {type(optimizers.get(row["optimizer"]).estimator) for row in quality["quality"]}
    assert kinds == {type(info.estimator) for info in list_optimizers("[!f]*", details=True)} | {
        type(optimizers.get("forward-grad").estimator)
    }
    assert len({row["state"] for row in quality["quality"]}) == len(quality["states"]) == 2
    assert all(-1 <= row["cosine"] <= 1 and row["standard_error"] >= 0 for row in quality["quality"])
    assert all(math.isfinite(state["per_example_over_spsa"]) for state in quality["states"])

    run = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_benchmark_of_planning_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "plan.py"), "--cells", "1", "--rounds", "1"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    found = json.loads(run.stdout)
    assert found["cells"] == 200 and len(found["seconds"]) == 4
