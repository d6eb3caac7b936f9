"""What is installed: the wheel alone runs a cell, and the rooms import in one direction."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
import zipfile

import pytest
import yaml
from places import ROOT


@pytest.mark.slow
def test_the_wheel_runs_a_cell_outside_the_checkout(tmp_path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "zeroflow/py.typed",
        "zeroflow/data/embedded/quickdraw100.npz",
        "zeroflow/data/embedded/ATTRIBUTION.md",
        "zeroflow/models/embedded/quickdraw_vit.safetensors",
        "zeroflow/models/embedded/MODEL_CARD.md",
        "zeroflow/results/paper/table1_accuracy.csv",
        "zeroflow/results/paper/ATTRIBUTION.md",
    ):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("zeroflow.optim", ["ray", "timm", "torchvision", "pyarrow", "plotly"]),
        ("zeroflow.models.backbone", ["ray", "timm", "pyarrow", "plotly", "zeroflow.methods", "zeroflow.trial"]),
        ("zeroflow.models.factory", ["ray", "timm", "pyarrow", "plotly", "zeroflow.methods", "zeroflow.trial"]),
        ("zeroflow.methods", ["ray", "pyarrow", "plotly", "zeroflow.trial"]),
        ("zeroflow.trial.trial", ["ray", "pyarrow", "plotly", "zeroflow.results"]),
        ("zeroflow.results", ["ray", "torch", "timm"]),
        ("zeroflow.grid.plan", ["ray", "timm", "torchvision", "plotly", "torch._dynamo", "zeroflow.sweep"]),
        ("zeroflow.clusters.launch", ["ray", "timm", "torchvision", "plotly", "torch._dynamo"]),
        ("zeroflow.sweep.coordinator", ["torch", "timm", "pandas", "ray.tune", "zeroflow.methods"]),
        ("zeroflow.cli", ["ray", "torch", "timm", "pyarrow", "plotly"]),
    ],
)
def test_a_room_imports_only_what_is_before_it(module: str, unwanted: list[str]) -> None:
    program = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_the_version_stands_in_one_place() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    wanted = metadata["metadata"]["version"]
    program = "import sys, zeroflow; print(zeroflow.__version__, [m for m in ('torch', 'timm') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == f"{wanted} []", run.stderr
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == wanted


def test_what_a_package_index_shows_needs_no_file_beside_it() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    page = ROOT / metadata["metadata"]["long_description"].removeprefix("file: ")
    links = re.findall(r"\]\(([^()\s]+)\)", page.read_text())
    assert [link for link in links if not link.startswith("https://")] == []


def test_hooks_are_those_of_make_check_and_need_no_network() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local" and {hook["language"] for hook in local["hooks"]} == {"system"}
    makefile = (ROOT / "Makefile").read_text()
    checks = makefile[makefile.index("\ncheck:") : makefile.index("\nreport:")]
    named = {hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in local["hooks"]}
    assert named == {"ruff check", "ruff format", "mypy"} and all(f"$(BIN)/{name}" in checks for name in named)


def test_continuous_integration_runs_the_project_s_own_script() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"] and job["timeout-minutes"] == 90


@pytest.mark.slow
def test_only_the_sweep_imports_ray() -> None:
    """Not even inside a function, where it would show only when the function runs."""
    importers = {
        path.relative_to(ROOT / "zeroflow").parts[0]
        for path in (ROOT / "zeroflow").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""] * (node.level == 0)
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.split(".")[0] == "ray"
    }
    assert importers == {"sweep"}


def test_no_file_names_a_place_of_one_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked:
        path = ROOT / name
        assert path.stat().st_size <= 10 * 2**20, f"{name} is larger than 10 MiB"
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".cfg", ".toml", ".json"}:
            assert str(ROOT) + "/" not in path.read_text(), f"{name} names {ROOT}"


@pytest.mark.slow
def test_every_number_in_the_documents_comes_from_the_committed_results() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
