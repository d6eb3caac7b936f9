"""The benchmarks run and give what the documents are made of; no number here depends on a machine's speed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from zeroflow.classifiers import classifiers
from zeroflow.optim import list_optimizers, optimizers

PROGRAM = """
import pathlib, sys
sys.path.insert(0, "docs")
import generate, measurements
measurements.RESULTS = pathlib.Path(sys.argv[1])
for name in ("optimizer-time", "optimizer-memory", "optimizer-quality"):
    table = generate.BLOCKS[name]()
    assert table.endswith("\\n") and "| zo-sgd |" in table and "nan" not in table, table
"""


def printed(*arguments: str | Path, timeout: int = 300, **how: Any) -> str:
    """What Python prints when it is run with these arguments and ends well."""
    command = [sys.executable, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **how)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.long
def test_every_optimizer_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "benchmarks" / "optimizers.json"
    printed(ROOT / "benchmarks" / "optimizers.py", "--quick", "--output", output, timeout=500)
    assert str(tmp_path) not in output.read_text()
    result = json.loads(output.read_text())
    assert {"command", "device", "threads", "dtype", "torch_version", "git_commit", "targets"} <= result.keys()
    assert [model["model"] for model in result["models"]] == ["embedded", "vit-tiny"]
    names = {*list_optimizers(), "mezo-loop"}
    for model in result["models"]:
        ratios = list(model["perturbation"].values())
        for part, keys in (("time", ("in_forwards", "per_query", "limit")), ("memory", ("mib", "ratio"))):
            assert {row["optimizer"] for row in model[part] if not row["optimizer"].startswith("infty-")} == names
            ratios += [row[key] for row in model[part] for key in keys]
        assert 0 < model["prefix_share"] < 1
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    quality = result["quality"]
    kinds = {
        type(optimizers.get(row["optimizer"]).estimator)
        for row in quality["quality"]
        if row["optimizer"] in list_optimizers()
    }
    assert kinds == {type(info.estimator) for info in list_optimizers("[!f]*", details=True)} | {
        type(optimizers.get("forward-grad").estimator)
    }
    assert len({row["state"] for row in quality["quality"]}) == len(quality["states"]) == 2
    assert all(-1 <= row["cosine"] <= 1 and row["standard_error"] >= 0 for row in quality["quality"])
    assert all(math.isfinite(state["per_example_over_spsa"]) for state in quality["states"])

    printed("-c", PROGRAM, tmp_path, cwd=ROOT)


STAND_IN = """
import torch

class ZeroFlow:
    def __init__(self, params, base_optimizer, model, args):
        self.q, self.state, self.base = 1, {}, base_optimizer
        assert args["inftyopt"] in ("zo_sgd", "zo_adam", "zo_sgd_conserve") and len(list(params))

    def set_closure(self, closure):
        self.closure = closure

    def step(self):
        for group in self.base.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        self.base.step()
        return self.closure()
"""
PEERS_PROGRAM = """
import pathlib, sys
sys.path.insert(0, "docs")
import generate, measurements
for folder in sys.argv[1:]:
    measurements.RESULTS = pathlib.Path(folder)
    print(generate.BLOCKS["optimizer-peers"](), end="<>")
"""


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, pytest.param(False, marks=pytest.mark.long)])
def test_others_optimizers_are_measured_where_they_are_there(there: bool, tmp_path: Path) -> None:
    (tmp_path / "infty").mkdir()
    (tmp_path / "infty" / "optim.py").write_text(STAND_IN)
    (tmp_path / "infty-0.0.1.dist-info").mkdir()
    (tmp_path / "infty-0.0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: infty\nVersion: 0.0.1\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path)] * there + [str(ROOT)])}
    output = tmp_path / "benchmarks" / "peers.json"
    script = ROOT / "benchmarks" / "optimizers.py"
    said = printed(script, "--peers", "--quick", "--output", output, timeout=500, env=environment)
    (model,) = (result := json.loads(output.read_text()))["models"]
    ours, theirs = {"zo-sgd", "zo-sgd, whole passes", "zo-adam", "zo-sgd-conserve"}, {"mezo-loop"}
    if there:
        theirs |= {"infty-zo-sgd", "infty-zo-adam", "infty-zo-sgd-conserve"}
    assert ("not measured: infty-zo-sgd, infty-zo-adam, infty-zo-sgd-conserve" in said) != there
    assert {row["optimizer"] for row in model["time"]} == {row["optimizer"] for row in model["memory"]} == ours | theirs
    assert {row["theirs"] for row in model["peers"]} == theirs
    targets = {
        (row["ours"], row["queries"]): row["target"] for row in model["peers"] if row["theirs"] == "infty-zo-sgd"
    }
    wanted = {("zo-sgd", 1): 1.15, ("zo-sgd", 4): 1.25}
    assert {pair: target for pair, target in targets.items() if target} == (wanted if there else {})
    assert result["infty_version"] == ("0.0.1" if there else None)
    quality = {(row["optimizer"], row["queries"]) for row in result["quality"]["quality"]}
    assert quality == {("zo-sgd", 1), ("mezo-loop", 1), *([("infty-zo-sgd", 1)] if there else [])}

    here, nowhere = printed("-c", PEERS_PROGRAM, tmp_path, tmp_path / "none", cwd=ROOT).split("<>")[:2]
    assert "| embedded | zo-sgd | mezo-loop | 4 |" in here and ("infty-zo-sgd" in here) == there
    assert "Not measured yet" in nowhere and "infty-zo-sgd" not in nowhere


@pytest.mark.long
def test_the_benchmark_of_planning_runs() -> None:
    found = json.loads(printed(ROOT / "benchmarks" / "plan.py", "--cells", "1", "--rounds", "1"))
    assert found["cells"] == 200 and len(found["seconds"]) == 4


@pytest.mark.long
def test_workers_are_timed_and_more_of_them_forecast(tmp_path: Path) -> None:
    output = tmp_path / "query_workers.json"
    small = ["--queries", "2", "--batch", "4", "--rounds", "1", "--steps", "1"]
    for command in (["measure", *small], ["simulate", "--forward-ms", "100", "--hop-ms", "0", "--update-ms", "0"]):
        printed(ROOT / "benchmarks" / "query_workers.py", *command, "--output", output)
    result = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert {"command", "device", "threads", "torch_version", "git_commit"} <= result.keys()
    assert [(row["way"], row["workers"]) for row in result["workers"]] == [("one", 1), ("queries", 2), ("data", 2)]
    assert all(row["step_seconds"] > row["exchange_seconds"] >= 0 for row in result["workers"])
    assert all(row["log_bytes_per_task"] < row["checkpoint_bytes"] for row in result["replay"])
    # Nothing but forward passes: q = 8 has 16 of 0.1 s, and as many workers do not get in each other's way.
    steps = {(row["queries"], row["workers"]): row["steps_per_second"] for row in result["forecast"]["rows"]}
    assert steps[8, 1] == pytest.approx(1 / 1.6) and steps[8, 16] == pytest.approx(10)


@pytest.mark.slow
def test_loading_of_data_is_timed_each_way(tmp_path: Path) -> None:
    output = tmp_path / "benchmarks" / "data_loading.json"
    script = ROOT / "benchmarks" / "data_loading.py"
    printed(script, "--images", "8", "--batch", "3", "--rounds", "1", "--output", output)
    result = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert {"command", "device", "cpus", "torch_version", "git_commit"} <= result.keys()
    assert {row["way"] for row in result["ways"]} == {"decoding", "cached"} and result["ways"][0]["threads"] == 0
    assert all(row["images_per_second"] > 0 and row["times_torchvision"] > 0 for row in result["ways"])
    assert result["checksum_microseconds"] > 0
    assert 40 < result["kib_per_file"] < 160, "about as large as photos of that many pixels"
    program = PROGRAM.split("for name")[0] + "print(generate.BLOCKS['data-loading']())"
    assert "| cached | 0 |" in printed("-c", program, tmp_path, cwd=ROOT)


@pytest.mark.long
def test_classifiers_are_timed_beside_the_backbone(tmp_path: Path) -> None:
    output = tmp_path / "benchmarks" / "classifiers.json"
    script = ROOT / "benchmarks" / "classifiers.py"
    printed(script, "--tasks", "1", "--rounds", "0", "--output", output)
    assert str(tmp_path) not in output.read_text()
    found = json.loads(output.read_text())["embedded"]
    rows = {row["classifier"]: row for row in found["classifiers"]}
    assert rows.keys() == set(classifiers.names())
    assert all(row["learning_in_forwards"] > 0 and row["scoring_in_forwards"] > 0 for row in rows.values())
    assert rows["random-projection"]["mib"] > 2000 * 2000 * 8 / 2**20
    program = PROGRAM.split("for name")[0] + "print(generate.BLOCKS['classifier-cost']())"
    assert "| `lda` |" in printed("-c", program, tmp_path, cwd=ROOT)


@pytest.mark.long
def test_training_curves_are_of_equal_forward_passes_and_of_the_best_try(tmp_path: Path) -> None:
    output = tmp_path / "curves.json"
    printed(ROOT / "benchmarks" / "training_curves.py", "--passes", "40", "--seeds", "1", "--output", output)
    for row in json.loads(output.read_text())["curves"]:
        (curve,) = row["curves"]
        assert curve[0]["forwards"] == 0 and 40 <= curve[-1]["forwards"] <= 40 + 32, row["optimizer"]
        best = min((one for one in row["tried"] if one["loss"] is not None), key=lambda one: one["loss"])
        assert (row["lr"], row["eps"]) == (best["lr"], best["eps"])


@pytest.mark.long
def test_passes_through_a_backbone_are_timed_beside_the_model_itself(tmp_path: Path) -> None:
    output = tmp_path / "benchmarks" / "backbones.json"
    command = ["--rounds", "1", "--model", "quickdraw_vit", "--model", "resnet18", "--output", output]
    printed(ROOT / "benchmarks" / "backbones.py", *command)
    rows = json.loads(output.read_text())["rows"]
    assert [sorted(row) for row in rows] == [
        ["adapted", "backbone", "features", "images"],
        ["backbone", "features", "images"],
    ]
    program = PROGRAM.split("for name")[0] + "print(generate.BLOCKS['backbones']())"
    assert "| `resnet18` | 4 | " in printed("-c", program, tmp_path, cwd=ROOT)
