"""The notebooks: committed without outputs, and run from first to last cell by a real kernel."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from doors import listening, unknown_doors
from everything import everything
from jupyter_client import KernelManager
from nbclient import NotebookClient
from places import ROOT

from zeroflow.results import Store

FOLDER = ROOT / "notebooks"
FIGURES = {
    "01_quick_start": 3, "02_reproducing_the_tables": 1, "03_queries_and_cost": 4, "04_trajectories": 3,
    "05_optimizers_on_your_own_model": 1, "06_gradient_bans": 1,
}  # fmt: skip
PLOTLY = "application/vnd.plotly.v1+json"


def run(name: str, **parameters: Any) -> tuple[str, list[dict[str, Any]]]:
    """What a notebook prints and the figures that it shows, run in its folder; ``parameters`` as papermill sets them."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    if parameters:
        place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}})
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning"})
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data for output in outputs if "data" in output]
    printed = [output.text for output in outputs if output.get("name") == "stdout"]
    printed += [data["text/markdown"] for data in shown if "text/markdown" in data]
    assert not [output for output in outputs if output.get("name") == "stderr"], "no warnings"
    return "\n".join(printed), [data[PLOTLY] for data in shown if PLOTLY in data]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_a_committed_notebook_has_parameters_first_and_no_outputs(file: Path) -> None:
    notebook = json.loads(file.read_text())
    nbformat.validate(notebook)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code[0]["metadata"] == {"tags": ["parameters"]}
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert file.stem in FIGURES and len(code) <= 8, "thin"


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_runs_on_the_committed_results(name: str) -> None:
    said, figures = run(name)
    assert len(figures) >= FIGURES[name]
    assert all(figure["data"] for figure in figures)
    if name == "05_optimizers_on_your_own_model":
        # A backward pass counts as two, and what is drawn is the loss itself: all begin with the same.
        assert {line["name"]: line["x"][-1] for line in figures[0]["data"]} == {
            "fo-sgd": 900, "zo-sgd": 4800, "zo-adam": 4800,
        }  # fmt: skip
        assert (
            len(set(re.findall(r"loss (\S+) ->", said))) == 1 and len(re.findall(r"(?:before|after): loss", said)) == 2
        )
    if name == "06_gradient_bans":
        assert len(set(re.findall(r"[fz]o-sgd: (\S+) ->", said))) == 1


@pytest.mark.slow
def test_notebooks_show_the_results_that_they_are_told_to(tmp_path: Path) -> None:
    full = ("table1", "table3", "table4")
    for name in (*full, "table1_quickdraw", "optimizers", "figure5_quickdraw", "quick", "trajectories"):
        everything(Store(tmp_path / name))
    told = {"results": str(tmp_path)}
    printed, _ = run("02_reproducing_the_tables", **told)
    assert "is not there yet" not in printed and str(tmp_path / "table1_quickdraw") in printed
    printed, figures = run("03_queries_and_cost", **told, dataset="quickdraw100")
    assert "is not there yet" not in printed
    assert {16} <= {x for trace in figures[0]["data"] for x in trace["x"]}, "queries of the made-up store"
    printed, figures = run("04_trajectories", **told, objective="old-then-new")
    assert printed == "" and any("fo-sgd" in trace.get("name", "") for trace in figures[0]["data"])


@pytest.mark.slow
def test_a_notebook_says_what_makes_a_missing_store(tmp_path: Path) -> None:
    everything(Store(tmp_path / "quick"))
    printed, _ = run("03_queries_and_cost", results=str(tmp_path), dataset="quickdraw100")
    assert (
        "python sweeps/full_grid.py --grid sweeps/figure5_quickdraw.yaml --results results/figure5_quickdraw" in printed
    )
    assert str(tmp_path / "quick") in printed


@pytest.mark.slow
def test_a_notebook_opens_no_door_that_is_not_named() -> None:
    kernel = KernelManager()
    kernel.start_kernel(extra_arguments=["--quiet"])
    try:
        client = kernel.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=120)
        seen = listening(kernel.provisioner.pid)
        client.stop_channels()
        assert seen and unknown_doors(seen, "a notebook") == set()
    finally:
        kernel.shutdown_kernel(now=True)
