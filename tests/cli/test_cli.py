"""The command as people and scripts meet it: help, JSON, merging, bad input, interruptions, exit statuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from everything import cell, fill
from places import ROOT

from zeroflow.cli import main
from zeroflow.results import Store, load

QUICK = ROOT / "results" / "quick"


def invoke(*arguments: Any, **settings: Any) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), **settings)


# Help


@pytest.mark.parametrize("name", main.commands)
def test_help_has_a_sentence_examples_that_parse_and_exit_statuses(name: str, tmp_path: Path) -> None:
    (tmp_path / "cub.zip").touch()
    command = main.commands[name]
    shown = invoke(name, "-h").output
    first = " ".join(command.help.split("\n\n")[0].split())
    assert first.endswith(".") and first.split(". ")[0] in " ".join(shown.split())
    assert len(command.short_help) <= 45 and command.short_help in invoke("-h").output
    assert "Exit status:" in shown and re.search(r"^ +2 +bad input", shown, re.MULTILINE)
    assert command.examples
    for line, _ in command.examples:
        assert f"\n  {line}\n" in shown  # whole, so that it can be copied
        typed = re.sub(r"^([A-Z_]+=\S+ )+", "", line.replace("~", str(tmp_path)))  # without variables set before it
        program, own, *arguments = shlex.split(re.split(r" \| | > ", typed)[0])
        assert program == "zeroflow"
        main.commands[own].make_context(own, arguments)


def test_defaults_are_shown() -> None:
    shown = " ".join(invoke("efficiency", "-h").output.split())
    for default in ("[default: vit_base_patch16_224.augreg_in21k]", "[default: 48; x>=1]", "[default: auto]"):
        assert default in shown
    assert "[default: runs/trajectories]" in " ".join(invoke("trajectories", "-h").output.split())


def test_both_ways_to_start_it_and_the_script() -> None:
    for module in ("zeroflow", "zeroflow.cli"):
        run = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=200)
        assert run.returncode == 0 and run.stdout.startswith("Usage: zeroflow [OPTIONS] COMMAND"), run.stderr
    assert "zeroflow = zeroflow.cli:main" in (ROOT / "setup.cfg").read_text()


# JSON


@pytest.mark.slow
def test_json_is_all_of_standard_output() -> None:
    found = json.loads(invoke("tables", QUICK, "--table", "summary", "--json").stdout)
    (rows,) = found
    trials = load(QUICK, "trials")
    assert rows["table"] == "summary" and "Avg" in rows["legend"]
    for line in rows["lines"]:
        if line["method"] == "simplecil":
            same = {"method": "simplecil", "dataset": line["dataset"]}
            own = [row["avg"] for row in trials.to_pylist() if same.items() <= row.items()]
            assert line["Avg"] == pytest.approx(sum(own) / len(own)) and line["n"] == len(own)
            assert ("Avg ±" in line) == any(other["n"] > 1 for other in rows["lines"])
    assert sum(line["n"] for line in rows["lines"]) == len(trials)
    whole = json.loads(invoke("tables", QUICK, "--format", "json").stdout)
    assert {"summary", "cells"} < {table["table"] for table in whole}
    assert len(json.loads(invoke("status", QUICK, "--json").stdout)["done"]) == len(trials)


def test_a_sweep_that_has_nothing_to_do_says_so_in_json(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("grid: [{method: simplecil}]")
    command = ["sweep", "--grid", grid, "--results", tmp_path / "results", "--dry-run", "--json"]
    run = invoke(*command)
    found = json.loads(run.stdout)
    assert run.exit_code == 0 and found["grid"] == "grid" and len(found["missing"]) == 1 and found["done"] == []
    assert "1 to run" in run.stderr


def test_trajectories_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zeroflow.studies import trajectories
    from zeroflow.studies.landscapes import TwoParameters

    monkeypatch.setattr(TwoParameters, "side", 3)
    monkeypatch.setattr(TwoParameters, "steps", 4)
    monkeypatch.setattr(trajectories, "NINE", trajectories.NINE[:2])
    found = json.loads(invoke("trajectories", "--results", tmp_path, "--json").stdout)
    (landscape,) = found["landscapes"]
    assert landscape["landscape"] == "two-parameters" and found["results"] == str(tmp_path)
    assert landscape["surface"] == 9 and landscape["looks"] == len(load(tmp_path, "trajectories"))


# Merging


@pytest.mark.slow
def test_merge_brings_stores_together(tmp_path: Path) -> None:
    cells = load(QUICK, "trials")["cell_id"].to_pylist()
    for name, own in (("here", cells[:5]), ("there", cells[3:])):
        for each in own:
            rows = {table: load(QUICK, table, cells=[each]) for table in ("trials", "accuracy", "stages", "steps")}
            Store(tmp_path / name).write({table: found for table, found in rows.items() if len(found)})
    target = tmp_path / "all"
    run = invoke("merge", target, tmp_path / "here", tmp_path / "there")
    assert run.exit_code == 0 and run.output == f"{target}: {len(cells)} cells added, {len(cells)} done\n"
    for table in ("trials", "accuracy", "stages", "steps"):
        assert load(target, table).equals(load(QUICK, table))
    again = json.loads(invoke("merge", target, QUICK, "--json").stdout)
    assert again == {"results": str(target), "added": 0, "done": len(cells)}
    nowhere = invoke("merge", tmp_path / "new", target, tmp_path / "nowhere")
    assert nowhere.exit_code == 2 and "no such folder" in nowhere.output and not (tmp_path / "new").exists()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["plna"], "Did you mean 'plan'?"),
        (["plan", "--gird", "x"], "'--grid'"),
        (["tables", ".", "--format", "latx"], "unknown format 'latx'; did you mean 'latex'"),
        (["list", "optimizer"], "did you mean 'optimizers'?"),
        (["list", "optimizers", "zo-sdg"], "unknown optimizer 'zo-sdg'; did you mean 'zo-sgd'"),
        (["tables", str(QUICK), "--table", "sumary"], "did you mean 'summary'?"),
        (["run", "--set", "metod=ease"], "'method'"),
        (["run", "--set", "method=eas"], "'ease'"),
        (["efficiency", "--optimizers", "zo-sdg"], "did you mean 'zo-sgd'"),
        (["download", "cifar10", "--data-dir", "."], "'cifar100'"),
        (["report", "/dev/null/x"], "no such folder"),
        (["report", str(QUICK), "-o", "/dev/null/report.html"], "--output /dev/null/report.html: cannot be written"),
        (["tables", str(QUICK), "-o", "/dev/null/x.tex"], "cannot be written"),
    ],
)
def test_bad_input_ends_with_status_2_and_the_nearest_right_value(arguments: list[str], hint: str) -> None:
    run = invoke(*arguments)
    assert run.exit_code == 2 and hint in " ".join(run.stderr.split()) and run.stdout == "", run.output
    assert isinstance(run.exception, SystemExit)


def test_no_wildcard_is_needed_to_find_nothing() -> None:
    assert invoke("list", "methods", "x*").output == ""
    assert invoke("list", "methods", "ease").output.startswith("ease ")


# Interruptions


@pytest.mark.slow
def test_a_closed_pipe_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m zeroflow list optimizers | head -1; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=200)
    first, status = run.stdout.splitlines()
    assert first.startswith("es-cma") and run.stderr == "" and status in ("0", "141")

    reader, writer = os.pipe()  # nobody reads: the first line finds that out
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-m", "zeroflow", "list", "transforms"], stdout=writer, stderr=subprocess.PIPE, timeout=200
    )
    os.close(writer)
    assert run.returncode == 141 and run.stderr == b""


def test_a_table_that_has_nothing_to_show_is_no_unknown_one() -> None:
    for name, said in (
        ("orders", "table 'orders': these results have nothing for it; they have summary, "),
        ("order", "unknown table 'order'"),
    ):
        run = invoke("tables", QUICK, "--table", name)
        assert run.exit_code == 2 and said in run.stderr, run.stderr


def test_a_warning_is_a_line_without_a_place_in_the_code(tmp_path: Path) -> None:
    shutil.copytree(QUICK, tmp_path / "store")
    (tmp_path / "store" / "trials" / f"{'0' * 16}.parquet").write_bytes(b"PAR1 torn PAR1")
    run = invoke("status", tmp_path / "store")
    (line,) = run.stderr.splitlines()
    assert run.exit_code == 0 and line.startswith("warning: skipped files that cannot be read"), run.stderr
    assert line.endswith(f"{'0' * 16}.parquet")


def test_a_killed_sweep_is_at_no_cell_that_is_done(tmp_path: Path) -> None:
    """A cell's process may outlive the sweep by the moment that it takes to finish."""
    store, (one, other) = Store(tmp_path / "store"), (cell(seed=seed) for seed in (0, 1))
    fill(store, one)
    file = tmp_path / "sweep.py"
    file.write_text(KILLED)
    cells = json.dumps([result.config.canonical() for result in (one, other)])
    subprocess.run([sys.executable, str(file), store.root, cells], timeout=200)
    # One that began at a task that another cell had kept has logs of the tasks from there on.
    logs = tmp_path / "store" / "unfinished" / f"{other.cell_id}-code"
    logs.mkdir(parents=True)
    (logs / "task-3.losses").touch()
    run = invoke("status", store.root)
    assert "training has reached task 4" in run.stdout
    assert "2 cells: 1 done, 0 failed, 1 missing, of them 1 in work when it was killed" in run.stdout, run.stdout
    assert [line.split()[6] for line in run.stdout.splitlines() if line.startswith("  in work")] == [other.cell_id]
    (sweep,) = json.loads(invoke("status", store.root, "--json").stdout)["sweeps"]
    assert [cell["cell_id"] for cell in sweep["running"]] == [other.cell_id] == sweep["missing"]


KILLED = """
import dataclasses, json, os, signal, sys
from zeroflow.grid.placement import SweepPlacement
from zeroflow.results.store import Store
from zeroflow.results.sweeps import SweepRecord
from zeroflow.trial.config import TrialConfig

cells = [TrialConfig(**config) for config in json.loads(sys.argv[2])]
record = SweepRecord(Store(sys.argv[1]), "g", cells, dataclasses.asdict(SweepPlacement()), None)
at = [{"cell_id": cell.cell_id, "label": cell.label(), "since": None, "workers": 1} for cell in cells]
record.write("running", {"running": at})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_control_c_ends_without_a_traceback(tmp_path: Path) -> None:
    store = tmp_path / "store"
    cell = ["--set", "method=ease", "--set", "epochs=500", "--results", str(store)]
    command = [sys.executable, "-m", "zeroflow", "run", *cell]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not store.exists() and run.poll() is None:  # made when everything is imported, before the work
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=200)
    # Shells call both 130; the interpreter ends itself by the signal where it found it in code made of text.
    assert run.returncode in (130, -signal.SIGINT), err
    assert err.strip() == "interrupted" and out == ""


@pytest.mark.parametrize("command", ["status", "report", "tables"])
def test_a_folder_of_stores_is_told_from_an_empty_store(command: str) -> None:
    result = invoke(command, QUICK.parent)
    assert result.exit_code == 2 and "a folder of stores; expected one of: " in result.output
    assert " quick," in result.output


@pytest.mark.parametrize("option", ["--grid", "--results"])
def test_names_that_are_not_utf_8_are_refused_before_any_work(option: str, tmp_path: Path) -> None:
    """The disk takes any bytes, Parquet and Ray do not."""
    name = tmp_path / os.fsdecode(b"caf\xe9.yaml")
    name.write_text("grid: [{method: simplecil}]\n")
    (tmp_path / "grid.yaml").write_text("grid: [{method: simplecil}]\n")
    given = {"--grid": str(tmp_path / "grid.yaml"), "--results": str(tmp_path / "out"), option: str(name)}
    command = [sys.executable, "-m", "zeroflow", "sweep", *(word for pair in given.items() for word in pair)]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert run.returncode == 2 and "not UTF-8; expected names and paths that are" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()
