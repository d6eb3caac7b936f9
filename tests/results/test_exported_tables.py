"""The exported tables: what is marked in them, and every format."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from everything import HALF_WIDTH, cell, fill, seeds, simplecil
from places import ROOT

from zeroflow.cli import main
from zeroflow.results import Store, load
from zeroflow.results.rendering import render
from zeroflow.results.summary import summary
from zeroflow.results.tables import make_tables

pytestmark = pytest.mark.slow  # whole stores


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_best_and_the_second_best_are_marked_in_every_data_set(store: Store) -> None:
    fill(store, simplecil(70.0), *seeds(82.0, optimizer="fo-sgd", queries=None), *seeds(72.0, optimizer="zo-sgd"))
    fill(store, simplecil(50.0, dataset="other"), cell(40.0, dataset="other", optimizer="zo-sgd"))
    (table,) = (table for table in make_tables({"trials": load(store, "trials")}) if table.name == "summary")
    column = table.headings.index("Avg")
    assert [line.cells[column].rank for line in table.lines] == [1, 2, 0, 1, 2]
    assert {cell.rank for line in table.lines for cell in line.cells[table.headings.index("Fgt") :]} == {0}, (
        "all forget alike: none is best"
    )


def test_data_sets_side_by_side_are_marked_within_a_stream(store: Store) -> None:
    """What is best over five tasks is not held against twenty."""
    for dataset in ("a", "b"):
        for tasks, level in ((5, 80.0), (2, 90.0)):
            fill(store, simplecil(level, dataset=dataset, tasks=tasks))
            fill(store, cell(level + 2, dataset=dataset, tasks=tasks, method="slda", optimizer=None, queries=None))
    (table,) = [table for table in make_tables({"trials": load(store, "trials")}) if table.name == "table1"]
    ranks = {line.cells[0].text: line.cells[1].rank for line in table.lines}
    assert sorted(ranks.items()) == [
        ("simplecil tasks=2", 2), ("simplecil tasks=5", 2), ("slda tasks=2", 1), ("slda tasks=5", 1)
    ]  # fmt: skip


def test_a_row_that_lacks_a_data_set_competes_in_the_others(store: Store) -> None:
    """Data sets may have transforms of their own, so that rows do not share all of their stream."""
    fill(store, *(simplecil(70.0, dataset=name, transform=t) for name, t in (("a", "drawings"), ("b", "plain"))))
    untrained = {"optimizer": None, "queries": None, "lr": None}
    for dataset, transform, methods in (("a", "drawings", ("slda",)), ("b", "plain", ("slda", "acil", "ranpac"))):
        for level, method in enumerate(methods):
            fill(store, cell(80.0 + level, method=method, dataset=dataset, transform=transform, **untrained))
    (table,) = [table for table in make_tables({"trials": load(store, "trials")}) if table.name == "table1"]
    column = table.headings.index("b Avg")
    ranks = {line.cells[0].text: line.cells[column].rank for line in table.lines}
    assert ranks == {"simplecil": 0, "slda": 0, "acil": 2, "ranpac": 1}


@pytest.mark.parametrize("key", ["probe_every", "schedule"])
def test_rows_that_differ_in_whether_there_is_something_have_names_of_their_own(store: Store, key: str) -> None:
    value = {"probe_every": 5, "schedule": "cosine"}[key]
    fill(store, simplecil(70.0), cell(80.0, **{key: None}), cell(80.0, **{key: value}))
    assert [row.label for row in summary(load(store, "trials"))] == [
        "simplecil",
        "ease fo-sgd",
        f"ease fo-sgd {key}={value}",
    ]


def test_ties_share_a_place(store: Store) -> None:
    fill(store, cell(80.0, optimizer="zo-sgd"), cell(80.001, optimizer="zo-adam"), cell(70.0, optimizer="zo-cge"))
    (table, *_) = make_tables({"trials": load(store, "trials")})
    ranks = {line.cells[1].text: line.cells[table.headings.index("Avg")].rank for line in table.lines}
    assert ranks == {"zo-sgd": 1, "zo-adam": 1, "zo-cge": 2}, "equal as they are shown"


def test_less_forgetting_is_better(store: Store) -> None:
    worse = dataclasses.replace(cell(seed=0, optimizer="zo-adam"))
    worse.accuracy_matrix[1, 0] = 10.0
    fill(store, worse, cell(optimizer="zo-sgd"))
    (table, *_) = make_tables({"trials": load(store, "trials")})
    ranks = {line.cells[1].text: line.cells[table.headings.index("Fgt")].rank for line in table.lines}
    assert ranks == {"zo-sgd": 1, "zo-adam": 2}


def test_shares_that_differ_look_different(store: Store) -> None:
    shares = (0.004, 0.12, 0.125, 0.995, 0.999)
    fill(
        store,
        cell(optimizer="zo-sgd"),
        *(cell(optimizer="zo-sgd", optimizer_options={"sparsity": share}) for share in shares),
    )
    (table,) = [table for table in make_tables({"trials": load(store, "trials")}) if table.name == "table4"]
    assert [line.cells[1].text for line in table.lines] == ["0%", "0.4%", "12%", "12.5%", "99.5%", "99.9%"]
    assert [line.cells[1].value for line in table.lines] == [0, *shares]


def test_formats_mark_intervals_and_names(store: Store) -> None:
    fill(store, simplecil(70.0), *seeds(82.0, optimizer="zo-sgd", method="a|b_c"))
    found = [table for table in make_tables({"trials": load(store, "trials")}) if table.name == "summary"]
    markdown, latex = render(found, "markdown"), render(found, "latex")
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "**77.00 ± 2.48**" in markdown and "<u>65.00</u>" in markdown and "a\\|b\\_c" in markdown
    assert r"\textbf{77.00 $\pm$ 2.48}" in latex and r"\underline{65.00}" in latex and r"a\textbar{}b\_c" in latex
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2 and "%, $\\pm$" not in latex.replace(r"\%", "")
    rows = list(csv.DictReader(io.StringIO(render(found, "csv"))))
    assert [row["method"] for row in rows] == ["simplecil", "a|b_c"] and rows[0]["optimizer"] == ""
    assert float(rows[1]["Avg"]) == 77.0 and float(rows[1]["Avg ±"]) == pytest.approx(HALF_WIDTH)
    assert rows[0]["Avg ±"] == ""


def test_every_table_that_there_is_something_for_is_made(full: Store) -> None:
    found = {table.name: table for table in make_tables({"trials": load(full, "trials")})}
    assert list(found) == ["summary", "table1", "table3", "table4", "effects", "cells"]
    history = found["table3"]
    assert [line.cells[1].text for line in history.lines] == ["0%", "20%", "40%"]
    assert [line.cells[3].value for line in history.lines] == pytest.approx([67.0, 69.0, 71.0])
    assert [line.cells[6].value for line in history.lines] == [57.87, 58.9, 58.76], "the paper's Table 3"
    assert len(found["cells"].lines) == len(load(full, "trials"))
    searched = make_tables(
        {name: load(ROOT / "results" / "table1_quickdraw_search", name) for name in ("trials", "searches")}
    )
    (search,) = (table for table in searched if table.name == "searches")
    assert {line.cells[1].text for line in search.lines} == {"ease", "aper-adapter"}


def test_tables_go_to_a_file_one_at_a_time_as_csv(full: Store, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    found = run("tables", full.root, "--table", "summary", "--format", "csv", "-o", out)
    assert found.exit_code == 0, found.output
    assert len(list(csv.DictReader(out.open()))) == 17
    many = run("tables", full.root, "--format", "csv")
    assert many.exit_code == 2 and "name it with --table: summary, table1" in many.output
    wrong = run("tables", full.root, "--table", "sumary")
    assert wrong.exit_code == 2 and "did you mean 'summary'" in wrong.output
