"""The command on a terminal: what completes, colours, how far it is."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from places import ROOT

import zeroflow.cli.progress as progress
from zeroflow.cli import main
from zeroflow.cli.completion import TABLES, Bash
from zeroflow.cli.progress import Bar
from zeroflow.results.report import read
from zeroflow.results.schema import CONFIG_KEYS
from zeroflow.results.tables import make_tables

QUICK = ROOT / "results" / "quick"


def invoke(*arguments: Any, **settings: Any) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), **settings)


# Completion


def completed(*words: str) -> list[str]:
    """What is offered for the last word."""
    found = ShellComplete(main, {}, "zeroflow", "_ZEROFLOW_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found]


def test_names_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert completed("tr") == ["trajectories"] and "plan" in completed("")
    assert completed("list", "me") == ["methods"]
    assert completed("list", "methods", "aper-a") == ["aper-adapter"]
    assert completed("list", "optimizers", "zo-sgd-s") == ["zo-sgd-sign"]
    assert completed("download", "cif") == ["cifar100"]
    assert completed("run", "--set", "optim") == ["optimizer=", "optimizer_options="]
    assert set(completed("run", "--set", "")) == {f"{key}=" for key in CONFIG_KEYS}
    assert completed("sweep", "--set", "optimizer=zo-sgd-s") == ["optimizer=zo-sgd-sign"]
    assert completed("plan", "--set", "optimizer=[fo-sgd,zo-adam-s") == ["optimizer=[fo-sgd,zo-adam-sign"]
    assert completed("plan", "--set", "optimizer=[forward") == ["optimizer=[forward-grad"]
    assert completed("plan", "--set", "dataset=cu") == ["dataset=cub"] and completed("plan", "--set", "lr=1") == []
    assert completed("efficiency", "--optimizers", "fo-sgd,zo-sgd-c") == ["fo-sgd,zo-sgd-conserve"]
    assert completed("tables", ".", "--table", "table") == ["table1", "table2", "table3", "table4"]
    assert completed("tables", ".", "--format", "l") == ["latex"]
    monkeypatch.chdir(tmp_path)
    for file in ("sweeps/full.yaml", "mine.yml", "mine.txt", "more/grid.yaml"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    assert completed("plan", "--grid", "") == ["mine.yml", "sweeps/full.yaml"]
    assert completed("search", "sw") == ["sweeps/full.yaml"]
    assert completed("trajectories", "--grid", "more/") == ["more/grid.yaml"]


@pytest.mark.slow
def test_the_tables_that_complete_are_those_that_there_are() -> None:
    names = {table.name for table in make_tables(read(QUICK, ROOT / "results" / "table1_quickdraw_search").tables)}
    assert {"summary", "searches", "cells"} <= names <= set(TABLES)


BASH = """
PATH={path}:$PATH
eval "$(_ZEROFLOW_COMPLETE=bash_source zeroflow)"
compopt() {{ echo "option $2"; }}
COMP_WORDS=({words}) COMP_CWORD={last} COMPREPLY=()
_zeroflow_completion zeroflow
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("zeroflow traj", ["trajectories"]),
        ("zeroflow run --set optimizer = zo-sgd-s", ["zo-sgd-sign"]),  # how bash divides optimizer=zo-sgd-s
        ("zeroflow efficiency --optimizers zo-sgd : 4,zo-sgd-c", ["4,zo-sgd-conserve"]),
        ("zeroflow run --set optimizer_o", ["option nospace", "optimizer_options="]),
    ],
)
def test_bash_offers_the_rest_of_what_it_takes_for_a_word(words: str, offered: list[str], tmp_path: Path) -> None:
    command = tmp_path / "zeroflow"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m zeroflow "$@"\n')
    command.chmod(0o755)
    program = BASH.format(path=tmp_path, words=" ".join(map(shlex.quote, words.split())), last=len(words.split()) - 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, timeout=200, env=environment
    )
    assert run.stdout.split("\n")[:-1] == offered, run.stderr


def test_bash_divides_words_at_equal_signs_and_colons(monkeypatch: pytest.MonkeyPatch) -> None:
    bash = Bash(main, {}, "zeroflow", "_ZEROFLOW_COMPLETE")
    for words, expected, kept in (
        (["zeroflow", "run", "--set", "optimizer", "=", "zo-s"], (["run", "--set"], "optimizer=zo-s"), "zo-sgd"),
        (["zeroflow", "run", "--set", "optimizer", "="], (["run", "--set"], "optimizer="), "zo-sgd"),
        (
            ["zeroflow", "run", "--set", "seed", "=", "1", "--set", ""],
            (["run", "--set", "seed=1", "--set"], ""),
            "optimizer=zo-sgd",
        ),
    ):
        monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        assert bash.get_completion_args() == expected
        assert bash.format_completion(click.shell_completion.CompletionItem("optimizer=zo-sgd")) == f"plain,{kept}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_documented_shell_gets_a_script(shell: str) -> None:
    run = CliRunner().invoke(main, [], env={"_ZEROFLOW_COMPLETE": f"{shell}_source"}, prog_name="zeroflow")
    assert run.exit_code == 0 and "_ZEROFLOW_COMPLETE=" in run.output
    assert f"_ZEROFLOW_COMPLETE={shell}_source" in (ROOT / "docs" / "commands.md").read_text()


# Colours


def on_a_terminal(*command: str, size: tuple[int, int] = (24, 80), **environment: str) -> str:
    """What a command writes where both of its outputs are a terminal of so many lines and columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, size)
    names = ("NO_COLOR", "TERM", "FORCE_COLOR")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    run = subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**clean, "TERM": "xterm", **environment})
    os.close(theirs)
    shown = io.BytesIO()
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError as error:
            assert error.errno == errno.EIO
            break
        if not part:
            break
        shown.write(part)
    os.close(ours)
    assert run.wait(timeout=200) == 0
    return shown.getvalue().decode()


@pytest.mark.slow
def test_colours_on_a_terminal_alone_and_never_with_no_color() -> None:
    help_ = [sys.executable, "-m", "zeroflow", "plan", "-h"]
    assert "\x1b[36mzeroflow plan" in on_a_terminal(*help_)
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in on_a_terminal(*help_, **plain)
    piped = subprocess.run(help_, capture_output=True, text=True, timeout=200).stdout
    assert "\x1b" not in piped and "zeroflow plan --grid" in piped


# Progress


SLOW = """
import time
import zeroflow.cli.progress as progress
progress._SHORT, progress._ON_TERMINAL, progress._ELSEWHERE = 0.2, 0.1, float(__import__("sys").argv[1])
with progress.Bar("work") as bar:
    for number in range(4):
        bar(f"part {number}", number, 4)
        time.sleep(0.4)
    bar.echo("a line of its own")
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [(24, 80), (0, 0)])  # a terminal may not know its size
def test_a_bar_with_remaining_time_on_a_terminal(size: tuple[int, int]) -> None:
    shown = on_a_terminal(sys.executable, "-c", SLOW, "1", size=size)
    assert re.search(r"work: +50%.*\| 2/4 \[00:0\d<00:0\d, part 2\]", shown), shown
    assert "a line of its own\r\n" in shown
    assert shown.rsplit("\r", 1)[-1].strip() == ""  # nothing of it is left


@pytest.mark.slow
def test_elsewhere_a_line_now_and_then() -> None:
    run = subprocess.run([sys.executable, "-c", SLOW, "0.5"], capture_output=True, text=True, timeout=200)
    assert run.stdout == "a line of its own\n"
    lines = run.stderr.splitlines()
    assert 1 <= len(lines) <= 4
    assert any(re.fullmatch(r"work: part [123], \d\d%, 00:0\d, left ~00:0\d", line) for line in lines), lines
    quiet = subprocess.run([sys.executable, "-c", SLOW, "30"], capture_output=True, text=True, timeout=200)
    assert quiet.stderr == ""


def told(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[tuple[str, int, int]]:
    """What a command tells its bar."""
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(progress.Bar, "__call__", lambda self, *state: calls.append(state))
    run = invoke(*arguments)
    assert run.exit_code == 0, run.output
    return calls


def check_order(calls: list[tuple[str, int, int]]) -> None:
    """Within a total what is behind never falls and never passes it."""
    assert calls
    for total in {call[2] for call in calls}:
        done = [call[1] for call in calls if call[2] == total]
        assert done == sorted(done) and done[0] >= 0 and (done[-1] <= total or not total), calls


@pytest.mark.slow
def test_long_commands_tell_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, some_drawings: str, tiny_vit: dict[str, Any]
) -> None:
    report = told(monkeypatch, "report", QUICK, "-o", tmp_path / "report.html")
    check_order(report)
    assert ("reading trials", 0, 9) in report and "figures: quickdraw100" in {what for what, _, _ in report}

    check_order(told(monkeypatch, "merge", tmp_path / "merged", QUICK))

    cell = {
        "dataset": some_drawings,
        "tasks": 2,
        "method": "aper-adapter",
        "optimizer": "zo-sgd",
        "epochs": 3,
        **tiny_vit,
    }
    settings = [part for key, value in cell.items() for part in ("--set", f"{key}={value}")]
    run = told(monkeypatch, "run", *settings, "--json")
    check_order(run)
    assert ("task 1 of 2, epoch 3", 2, 6) in run and run[-1] == ("task 2 of 2", 6, 6)

    options = [
        "--backbone",
        tiny_vit["backbone"],
        "--image-size",
        "14",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    found = told(monkeypatch, "efficiency", *options, "--optimizers", "fo-sgd,zo-sgd")
    check_order(found)
    assert found[0] == ("memory: fo-sgd, q = 1", 0, 12) and found[-1] == ("time: round 2 of 2", 10, 12)


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("work") as bar:
        bar("all", 1, 2)
    assert capsys.readouterr() == ("", "")
