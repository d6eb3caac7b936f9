"""The report and the exported tables, as a reader meets them: the page in a real browser, bad stores, every format."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner
from everything import HALF_WIDTH, cell, fill, landscape, seeds, simplecil
from places import ROOT

from zeroflow.cli import main
from zeroflow.errors import ConfigError
from zeroflow.results import SCHEMA_VERSION, Store, figures, load
from zeroflow.results.findings import findings
from zeroflow.results.rendering import render
from zeroflow.results.report import write_report
from zeroflow.results.rows import failure, tables
from zeroflow.results.summary import HELD_OUT, render_text, shared, summary
from zeroflow.results.tables import make_tables
from zeroflow.trial.metrics import DEFINITIONS

pytestmark = pytest.mark.slow  # a real browser, whole pages

QUICK = ROOT / "results" / "adapters"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def page_of(store: Store | str | Path, tmp_path: Path) -> str:
    return write_report(store, tmp_path / "reports" / "report.html").read_text()


def without_plotly(page: str) -> str:
    """The page without the library, which mentions everything."""
    return re.sub(r"<script>[^<]*plotly\.js v.*?</script>", "", page, flags=re.DOTALL)


# The page


def test_the_page_of_all_committed_results_is_small(tmp_path: Path) -> None:
    stores = [folder.parent for folder in sorted((ROOT / "results").glob("*/trials"))]
    out = write_report([*stores, ROOT / "results" / "trajectories"], tmp_path / "report.html")
    # Plotly's library is 4.8 MB of it.
    assert len(stores) > 10 and 5e6 < out.stat().st_size < 10e6


def test_the_report_holds_everything_and_needs_no_network(store: Store, tmp_path: Path) -> None:
    fill(store, cell(seed=0), cell(seed=1), simplecil(), cell(dataset="other"))
    fill(store, dataclasses.replace(cell(seed=2), named={"/home/anna/weights.pth": "0a1b2c3d4e5f"}))
    store.write_failure(failure(cell(seed=9).config, "RuntimeError", "boom", "", 2))
    page = page_of(store, tmp_path)
    out = tmp_path / "reports" / "report.html"
    assert out.stat().st_size < 8e6
    words = (
        "fo-sgd",
        "simplecil",
        "+10.00",
        "c0ffee with changes",
        "boom",
        "weights.pth 0a1b2c3d4e5f",
        DEFINITIONS["avg"],
    )
    for expected in words:
        assert expected in page, expected
    assert "5 cells done, 1 failed" in page and "anna" not in page
    order = (
        "<ul class='findings'>",
        "<h2 id='table-summary'>Summary",
        "<h2>Figures",
        "<h2>Tables",
        "<h2>Failed",
        "<h2>Provenance",
        "<h2>Metric",
    )
    assert sorted(order, key=page.index) == list(order)
    assert page.count("plotly.js v") == 1, "the library is in the page once"
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)\s*=", page)
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_cells_judged_on_held_out_samples_stand_beside_no_results(store: Store, tmp_path: Path) -> None:
    tried = [cell(93.0, seed=seed, validation=0.25, lr=0.5) for seed in range(3)]
    fill(store, simplecil(70.0), *seeds(72.0), *tried)
    page = without_plotly(page_of(store, tmp_path))
    assert "4 cells done" in page and "3 more cells were judged on held-out training samples" in page
    assert "93.0" not in page and not any(each.cell_id in page for each in tried)
    alone = Store(tmp_path / "alone")
    fill(alone, *tried)
    page = without_plotly(page_of(alone, tmp_path))
    assert "3 cells done" in page and "93.0" in page and "more cells" not in page


def test_the_first_sentences_say_what_was_found(store: Store, tmp_path: Path) -> None:
    fill(
        store,
        simplecil(70.0),
        *seeds(82.0, optimizer="fo-sgd", queries=None),
        *seeds(72.0, optimizer="zo-sgd"),
        *seeds(67.0, optimizer="zo-adam"),
        cell(72.0, optimizer="zo-cge"),
    )
    page = page_of(store, tmp_path)
    best = "the best of 5 settings is ease fo-sgd, with exact gradients, with 77.00 ± 2.48 % (3 seeds, +12.00 points)"
    assert best in page and "the best with exact gradients" not in page, "said once"
    assert "SimpleCIL, which trains nothing, has Avg 65.00 %" in page
    assert "the best by forward passes alone is ease zo-cge with 67.00 % (one seed, +2.00 points)" in page
    # +2 with a half width of 2.48, and below: neither is above with all of its interval.
    assert "Of 2 settings trained by forward passes alone with several seeds, none lies above SimpleCIL" in page
    orders = Store(tmp_path / "orders")
    for order, level, best in ((1, 70.0, 71.0), (2, 74.0, 90.0), (3, 80.0, 81.0)):
        fill(orders, simplecil(level, class_order_seed=order), cell(best, optimizer="zo-sgd", class_order_seed=order))
    page = page_of(orders, tmp_path)
    one = "class_order_seed=1: the best of 2 settings is ease zo-sgd, by forward passes alone, with 66.00 % (one seed, +1.00 points)"
    assert f"{one}; SimpleCIL, which trains nothing, has Avg 65.00 %." in page, "not the best of all orders"
    assert "2 more streams of this data set are in the tables." in page
    for level, verdict in ((82.0, "lies above"), (65.0, "does not lie above")):
        one = Store(tmp_path / verdict)
        fill(one, simplecil(70.0), *seeds(level, optimizer="zo-sgd"))
        assert f"The one setting trained by forward passes alone with several seeds {verdict} SimpleCIL" in page_of(
            one, tmp_path
        )


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        ("by forward passes alone", {"optimizer": "zo-sgd"}),
        ("with exact gradients", {"optimizer": "fo-sgd", "queries": None}),
        ("in some steps", {"optimizer": "zo-sgd", "epochs": 9, "hybrid_epochs": 3}),
        ("in some steps", {"optimizer": "zo-sgd", "optimizer_options": {"hybrid": 8}}),
        ("in some steps", {"optimizer": "zo-sgd", "later": {"task": 2, "optimizer": "fo-sgd"}}),
        ("in some steps", {"optimizer": "fo-sgd", "queries": None, "later": {"task": 2, "optimizer": "zo-sgd"}}),
        ("with exact gradients", {"optimizer": "fo-sgd", "queries": None, "later": {"task": 2, "lr": 0.5}}),
    ],
)
def test_what_took_exact_gradients_anywhere_is_not_called_forward_passes_alone(
    store: Store, way: str, settings: dict[str, Any]
) -> None:
    fill(store, simplecil(70.0), cell(90.0, **settings))
    (sentence,) = findings(summary(store.load("trials")))
    assert way in sentence.partition(", with 85.00")[0], sentence
    assert ("by forward passes alone" in sentence) == (way == "by forward passes alone")


def test_class_orders_that_begin_alike_are_two_rows_for_the_reader_too(store: Store) -> None:
    orders = [[*range(12), *rest] for rest in ([12, 13], [13, 12])]
    fill(store, *(cell(80.0, queries=q, fixed_class_order=order) for order in orders for q in (1, 4)))
    rows = summary(store.load("trials"))
    assert len({row.name() for row in rows}) == 4
    assert [line.x for line in figures.against_queries(rows)] == [(1, 4), (1, 4)]


def test_options_that_only_data_sets_differ_in_are_told_with_their_data_set(store: Store) -> None:
    for dataset, size in (("quickdraw100", 16), ("quickdraw100-marker", 32)):
        fill(store, cell(80.0, dataset=dataset, method_options={"bottleneck": size}))
    (sentence,) = shared(summary(store.load("trials")))
    for each in ("bottleneck=16 (quickdraw100 ease fo-sgd)", "bottleneck=32 (quickdraw100-marker ease fo-sgd)"):
        assert each in sentence


def test_the_table_of_cells_has_the_keys_of_their_streams(store: Store) -> None:
    fill(store, *(simplecil(70.0 + order, class_order_seed=order) for order in (1, 2)), simplecil(75.0, stop_after=1))
    (found,) = [table for table in make_tables({"trials": store.load("trials")}) if table.name == "cells"]
    lines = [dict(zip(found.headings, (cell.text for cell in line.cells), strict=True)) for line in found.lines]
    assert sorted((line["class_order_seed"], line["stop_after"], line["avg"]) for line in lines) == [
        ("1", "-", "66.00"),
        ("1993", "1", "70.00"),
        ("2", "-", "67.00"),
    ]


def test_a_store_of_tries_alone_says_that_no_test_sample_was_looked_at(store: Store, tmp_path: Path) -> None:
    fill(store, simplecil(70.0, validation=0.3))
    assert HELD_OUT in page_of(store, tmp_path) and HELD_OUT in render_text(summary(store.load("trials")))
    fill(store, simplecil(70.0))
    assert HELD_OUT not in page_of(store, tmp_path) and HELD_OUT not in render_text(summary(store.load("trials")))


def test_streams_beside_each_other_have_no_line_to_beat(store: Store) -> None:
    fill(store, simplecil(70.0), cell(80.0, optimizer="zo-sgd"), cell(81.0, optimizer="zo-sgd", queries=4))
    one = figures.draw_ranking(summary(store.load("trials")))
    assert len(one.layout.shapes) == 3
    fill(store, simplecil(60.0, stop_after=1), cell(82.0, optimizer="zo-sgd", stop_after=1))
    rows = summary(store.load("trials"))
    assert not figures.draw_ranking(rows).layout.shapes
    joined = [trace for trace in figures.draw_accuracy_against_forwards(rows).data if "points" in (trace.meta or {})]
    assert sorted(len(trace.x) for trace in joined) == [1, 2], "no line from one stream to another"


@pytest.mark.parametrize("method", ["ranpac", "simplecil"])
def test_the_first_sentence_names_the_best_row_also_of_untrained_methods(
    store: Store, tmp_path: Path, method: str
) -> None:
    fill(store, simplecil(95.0 if method == "simplecil" else 70.0), *seeds(72.0, optimizer="zo-sgd"))
    fill(store, cell(92.0, method="ranpac", optimizer=None, queries=None))
    found = {
        "ranpac": "ranpac, without training, with 87.00",
        "simplecil": "simplecil, which trains nothing, with 90.00",
    }
    assert f"the best of 3 settings is {found[method]}" in page_of(store, tmp_path)


def heading(title: str) -> str:
    return f">{title}</h3>"


def test_every_section_appears_where_there_is_something_for_it(full: Store, tmp_path: Path) -> None:
    page = page_of(full, tmp_path)
    for title in (
        "All settings beside each other",
        "Accuracy along the stream",
        "Accuracy on the last task",
        "Accuracy per task",
        "Accuracy against queries",
        "Accuracy against work",
        "What it costs",
        "Accuracy against memory",
        "History (Table 3)",
        "Sparsity (Table 4)",
        "Hybrid training",
        "Function values of old and new tasks",
        "What one change does, ours beside the paper&#x27;s",
        "The whole grid",
        "Two parameters: both tasks at once",
        "Two parameters: both tasks at once: one loss against the other",
    ):
        assert heading(title) in page, title
    few = page_of(QUICK, tmp_path)
    for title in ("History (Table 3)", "Hybrid training", "Function values of old and new tasks", "Two parameters"):
        assert title not in without_plotly(few), title


def test_the_report_shows_names_and_does_not_run_them(store: Store, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\""
    fill(store, cell(method=evil), simplecil(), dataclasses.replace(simplecil(dataset=evil), class_names=[evil] * 4))
    store.write_failure(failure(cell(seed=9, method=evil).config, "RuntimeError", evil, evil, 1))
    page = page_of(store, tmp_path)
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page and "<img src=x" not in page


def test_several_stores_make_one_report_and_a_cell_counts_once(tmp_path: Path) -> None:
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    fill(one, cell(), simplecil())
    fill(other, cell(), cell(seed=1))
    one.write_failure(failure(cell(seed=1).config, "RuntimeError", "boom", "", 1))
    page = write_report([one, other.root], tmp_path / "report.html").read_text()
    assert "3 cells done, 0 failed" in page, "what failed in one store is done in the other"
    assert "in <code>one</code>, <code>other</code>" in page


def test_stores_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    fill(one, cell(80.0))
    fill(other, cell(90.0))
    told = f"cell {cell().cell_id}: avg is 75.0 in an earlier store and 85.0 in other; the earlier one counts"
    assert told in write_report([one, other], tmp_path / "report.html").read_text()
    found = run("tables", one.root, other.root, "--table", "summary", "--format", "csv")
    assert ",75.0," in found.stdout and ",85.0," not in found.stdout
    assert told in found.stderr
    fill(other, cell(80.0))
    assert not run("tables", one.root, other.root, "--table", "summary").stderr


def test_tables_name_files_that_cannot_be_read(store: Store) -> None:
    fill(store, cell(), cell(seed=1))
    broken = Path(store.root, "trials", f"{cell().cell_id}.parquet")
    broken.write_bytes(broken.read_bytes()[:-20] + b"broken")
    assert f"trials/{broken.name}" in run("tables", store.root, "--table", "summary").stderr


def test_the_page_names_no_path_of_this_machine(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, cell())
    monkeypatch.chdir(tmp_path.parent)
    below = f"{tmp_path.name}/results"
    assert f"<code>{below}</code>" in page_of(below, tmp_path)
    monkeypatch.chdir(ROOT)
    page = page_of(store, tmp_path)
    assert "<code>results</code>" in page and str(tmp_path) not in page


# Bad input


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path / "nowhere", tmp_path)
    assert "0 cells done, 0 failed" in page and "Nothing to show: no cell has been finished here yet." in page
    assert "<h2>" not in page and "plotly.js v" not in page
    (tmp_path / "empty").mkdir()
    found = run("report", tmp_path / "empty", "-o", tmp_path / "report.html")
    assert found.exit_code == 0 and "Nothing to show" in (tmp_path / "report.html").read_text()
    found = run("tables", tmp_path / "empty")
    assert found.exit_code == 2 and "no finished cell, 0 failed" in found.output


def test_landscapes_need_no_cells(store: Store, tmp_path: Path) -> None:
    store.write_landscape(*landscape())
    page = page_of(store, tmp_path)
    assert "0 cells done" in page and "Nothing to show" not in page and "<h2>The way over both losses" in page
    assert page.count("data-key='optimizer'") == 3 and "data-key='method'" not in page


def test_a_store_of_failures_alone_shows_them(store: Store, tmp_path: Path) -> None:
    store.write_failure(failure(cell().config, "MemoryError", "out of memory", "", 3))
    page = page_of(store, tmp_path)
    assert "Nothing to show: every cell that was tried has failed" in page and "out of memory" in page
    found = run("tables", store.root)
    assert found.exit_code == 2 and "no finished cell, 1 failed" in found.output and "Traceback" not in found.output


@pytest.mark.parametrize("missing", ["stages", "accuracy", "steps"])
def test_a_missing_table_leaves_out_its_figures_and_says_so(store: Store, tmp_path: Path, missing: str) -> None:
    fill(store, *seeds(80.0), simplecil())
    shutil.rmtree(Path(store.root, missing))
    page = page_of(store, tmp_path)
    assert ("no table stages" in page) == (missing == "stages")
    assert ("no table accuracy" in page) == (missing == "accuracy")
    titles = {"stages": ["Accuracy along the stream"], "accuracy": ["Accuracy per task", "Accuracy on the last task"]}
    for table, own in titles.items():
        for title in own:
            assert (heading(title) in page) == (table != missing)
    assert run("tables", store.root).exit_code == 0


@pytest.mark.parametrize("result", [cell(), simplecil()], ids=["trained", "simplecil"])
def test_one_cell_is_enough(store: Store, tmp_path: Path, result: Any) -> None:
    fill(store, result)
    page = page_of(store, tmp_path)
    assert "1 cells done, 0 failed" in page and "All settings beside each other" in page
    assert all(run("tables", store.root, "--format", kind).exit_code == 0 for kind in ("text", "markdown", "latex"))


def test_a_newer_store_is_refused_and_nothing_is_written(store: Store, tmp_path: Path) -> None:
    written = tables(cell())
    trials = written["trials"]
    newer = pa.array([SCHEMA_VERSION + 1], pa.int32())
    written["trials"] = trials.set_column(trials.column_names.index("schema_version"), "schema_version", newer)
    store.write(written)
    for command in (("report", store.root, "-o", tmp_path / "report.html"), ("tables", store.root)):
        found = run(*command)
        assert found.exit_code == 2 and f"schema version {SCHEMA_VERSION + 1}" in found.output
        assert "update zeroflow" in found.output and "Traceback" not in found.output
    assert not (tmp_path / "report.html").exists()


def test_files_that_cannot_be_read_are_named(store: Store, tmp_path: Path) -> None:
    fill(store, cell(), cell(seed=1))
    broken = Path(store.root, "stages", f"{cell().cell_id}.parquet")
    broken.write_bytes(broken.read_bytes()[:-20] + b"broken")
    assert f"hold other rows than their name says: results/stages/{broken.name}" in page_of(store, tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    for command in ("report", "tables"):
        found = run(command, tmp_path / "nowhere")
        assert found.exit_code == 2 and "no such folder" in found.output


def test_a_file_of_costs_that_is_none_is_refused(store: Store, tmp_path: Path) -> None:
    fill(store, cell())
    (tmp_path / "costs.json").write_text('{"rows": 3}')
    for name, message in (
        ("costs.json", "expected what 'zeroflow efficiency --json FILE' writes"),
        ("no.json", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_report(store, tmp_path / "report.html", efficiency=tmp_path / name)
    assert not (tmp_path / "report.html").exists()


# Tables


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


# In a real browser


CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1200,1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """An open report."""

    def __init__(self, driver: Any, file: Path, *, theme: str = "light", width: int = 1200) -> None:
        self.driver = driver
        media = [{"name": "prefers-color-scheme", "value": theme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        # So tall that every figure is in view.
        size = {"width": width, "height": 30_000, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(file.as_uri())
        self.run("try { localStorage.clear(); } catch {}")
        self.wait_drawn()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 60).until(lambda _: self.run(f"return {condition}"), condition)

    def wait_drawn(self) -> None:
        """Until every figure that is to be seen has been drawn."""
        self.wait(
            "[...document.querySelectorAll('section:not([hidden]) .figure')]"
            ".every((f) => f.dataset.drawn || f.querySelector('.plot').hidden)"
        )

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def figure(self, title: str) -> str:
        """The id of a figure of the data set that is chosen."""
        found: str = self.run(
            "return [...document.querySelectorAll('section:not([hidden]) .figure')]"
            ".find((f) => f.querySelector('h3').textContent === arguments[0]).id",
            title,
        )
        return found

    def seen(self, title: str) -> list[str]:
        """Names of the marks that a figure shows."""
        script = "return document.querySelector(`#${arguments[0]} .plot`).data.filter((t) => t.visible !== false)"
        found: list[str] = self.run(
            f"{script}.flatMap((t) => t.name ? [t.name] : t.y.filter((y) => typeof y === 'string'))", self.figure(title)
        )
        return sorted(set(found))

    def lines(self, table: str) -> list[str]:
        """The second and third column of the lines that a table shows."""
        found: list[str] = self.run(
            "return [...document.querySelector(`table[data-table=${arguments[0]}]`).tBodies[0].rows].filter((r) => !r.hidden)"
            ".map((r) => `${r.cells[1].textContent} ${r.cells[2].textContent} ${r.cells[3].textContent}`)",
            table,
        )
        return found

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def quick_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(QUICK, tmp_path_factory.mktemp("quick") / "report.html")


@pytest.fixture(scope="module")
def full_file(full: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(full, tmp_path_factory.mktemp("full") / "report.html")


@pytest.fixture
def quick(browser: Any, quick_file: Path) -> Page:
    return Page(browser, quick_file)


def test_the_page_opens_without_errors_and_without_a_network(quick: Page) -> None:
    assert quick.run("return document.querySelectorAll('section:not([hidden]) .figure .main-svg').length") > 10
    assert quick.run("return performance.getEntriesByType('resource').length") == 0
    assert quick.complaints() == []


def test_a_filter_changes_every_figure_and_table(quick: Page) -> None:
    title = "All settings beside each other"
    # With several data sets the one with most cells is chosen.
    assert len(quick.lines("summary")) == 10 == len(quick.seen(title)) and len(quick.lines("cells")) == 20
    quick.click("#filters button[data-key=optimizer][data-value=zo-sgd]")
    rows = ["simplecil - -", "aper-adapter zo-sgd 8", "aper-adapter zo-sgd 1", "ease zo-sgd 1"]
    named = ["aper-adapter zo-sgd q=1", "aper-adapter zo-sgd q=8", "ease zo-sgd q=1", "simplecil"]
    assert quick.lines("summary") == rows, "the best first"
    assert len(quick.lines("cells")) == 6
    for each in (title, "Accuracy along the stream", "Accuracy on the last task", "What it costs", "The whole grid"):
        assert quick.seen(each) == named, each
    # What trains nothing has no step whose memory could be beside theirs.
    assert quick.seen("Accuracy against memory") == ["Pareto front", *named[:-1]]
    shown = quick.run(
        "return document.querySelector(`#${arguments[0]} .plot`).data.filter((t) => t.visible !== false).map((t) => [t.x, t.y])",
        quick.figure("Accuracy against memory"),
    )
    (memory, front), points = shown[0], [(x, y) for (x,), (y,) in shown[1:]]
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    assert list(zip(memory, front, strict=True)) == sorted(set(points) - beaten), "of what the filter leaves"
    assert set(
        quick.run("return [...document.querySelectorAll('section:not([hidden]) select option')].map((o) => o.text)")
    ) == set(named)
    effects = quick.run(
        "return document.querySelector(`#${arguments[0]} .plot`).data[0].y",
        quick.figure("What one change does, ours beside the paper's"),
    )
    assert effects == ["ease: zo-sgd - fo-sgd", "aper-adapter: zo-sgd - fo-sgd", "aper-adapter, zo-sgd: q = 8 - q = 1"]

    quick.click("#filters button[data-key=queries][data-value='8']")
    assert quick.lines("summary") == ["simplecil - -", "aper-adapter zo-sgd 8"]
    quick.click("#keep-baseline")
    assert quick.seen(title) == ["aper-adapter zo-sgd q=8"]
    points = quick.run(
        "return document.querySelector(`#${arguments[0]} .plot`).data[0].x", quick.figure("Accuracy against queries")
    )
    assert points == [8], "a line loses the points that do not pass"
    quick.click("#filters button[data-key=method][data-value=ease]")
    assert quick.lines("summary") == []
    assert (
        quick.run("return document.querySelector('section:not([hidden]) .figure .note').textContent")
        == "Nothing here passes the filters."
    )
    quick.click("#clear")
    assert len(quick.lines("summary")) == 11, "of both data sets"
    quick.wait_drawn()
    assert quick.complaints() == []


def test_the_data_set_is_a_filter_too(quick: Page) -> None:
    headings = "return [...document.querySelectorAll('section:not([hidden]) h2')].map((h) => h.textContent)"
    told = "return [...document.querySelectorAll('.findings li:not([hidden])')].map((item) => item.textContent.split(':')[0])"
    assert quick.run(headings) == ["Figures: quickdraw100-marker"]
    assert quick.run(told) == ["quickdraw100-marker"]
    quick.click("#filters button[data-value=quickdraw100]")
    assert quick.run(told) == ["quickdraw100", "quickdraw100-marker"]
    assert quick.run(headings) == ["Figures: quickdraw100", "Figures: quickdraw100-marker"]
    quick.click("#filters button[data-value=quickdraw100-marker]")
    assert quick.run(headings) == ["Figures: quickdraw100"] and quick.lines("summary") == ["simplecil - -"]


def test_the_theme_follows_the_system_and_the_switch(browser: Any, quick_file: Path) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    letters = "return document.querySelector('section:not([hidden]) .plot')._fullLayout.font.color"
    page = Page(browser, quick_file, theme="dark")
    assert (page.run(ground), page.run(letters)) == ("rgb(23, 25, 28)", "#e6e6e6")
    page = Page(browser, quick_file, theme="light")
    assert (page.run(ground), page.run(letters)) == ("rgb(255, 255, 255)", "#222")
    page.click("#theme")
    page.wait("document.querySelector('section:not([hidden]) .plot')._fullLayout.font.color === '#e6e6e6'")
    assert page.run(ground) == "rgb(23, 25, 28)"
    assert "#000000" not in page.run(
        "return JSON.stringify(document.querySelector('section:not([hidden]) .plot').data)"
    )
    assert page.complaints() == []


def test_a_click_on_a_heading_sorts(quick: Page) -> None:
    avg = quick.run(
        "return [...document.querySelectorAll('table[data-table=summary] th')].findIndex((h) => h.textContent === 'Avg')"
    )
    column = f"return [...document.querySelectorAll('table[data-table=summary] tbody tr')].map((r) => parseFloat(r.cells[{avg}].textContent))"
    button = f"table[data-table=summary] th:nth-child({avg + 1}) button"
    quick.click("#clear")
    best = quick.run(column)
    assert best == sorted(best, reverse=True)
    quick.click("#filters button[data-value=quickdraw100-marker]")
    shown = column.replace("tbody tr'", "tbody tr:not([hidden])'")
    assert quick.run(shown) == sorted(quick.run(shown), reverse=True), "the best first"
    quick.click(button)
    assert quick.run(column) == sorted(best)
    quick.click(button)
    assert quick.run(column) == sorted(best, reverse=True)


SUMMARY = "table[data-table=summary]"


def test_typing_leaves_the_lines_with_these_words(quick: Page) -> None:
    place = quick.driver.find_element("css selector", ".sheet:has(table[data-table=summary]) input")
    place.send_keys("EASE zo")
    assert quick.lines("summary") == ["ease zo-sgd 1", "ease zo-adam 1"]
    assert quick.run(f"return document.querySelector('.sheet:has({SUMMARY}) .count').textContent") == "2 of 11 lines"


def test_the_seeds_of_a_line_open_and_close(quick: Page) -> None:
    seeds = f"return [...document.querySelectorAll('{SUMMARY} tr.seed:not([hidden])')].map((r) => r.innerText.split(/\\s+/).filter(Boolean))"
    place = quick.driver.find_element("css selector", f"{SUMMARY} tbody tr:not([hidden]) button")
    count = int(place.text)
    assert count > 1 and quick.run(seeds) == []
    place.send_keys("\n")
    opened = quick.run(seeds)
    assert [line[:2] for line in opened] == [["seed", str(seed)] for seed in range(count)]
    table = seeds_of_the_best(QUICK)
    assert [float(line[3]) for line in opened] == pytest.approx(table, abs=0.005)
    assert place.get_attribute("aria-expanded") == "true"
    place.send_keys("\n")
    assert quick.run(seeds) == [] and place.get_attribute("aria-expanded") == "false"


def seeds_of_the_best(results: Path) -> list[float]:
    """Avg of each seed of the best row of several seeds, of the embedded data set."""
    trials = load(results, "trials")
    rows = [r for r in summary(trials) if r.config["dataset"] == "quickdraw100-marker" and r.avg and r.seeds > 1]
    best = max(rows, key=lambda row: row.avg.mean if row.avg else 0.0)
    values = dict(zip(trials["cell_id"].to_pylist(), trials["avg"].to_pylist(), strict=True))
    return [values[each] for each in best.cells]


def test_what_is_shown_of_a_table_is_exported(quick: Page) -> None:
    quick.run("window.made = []; URL.createObjectURL = (blob) => { window.made.push(blob); return '#'; }")
    quick.click("#filters button[data-key=optimizer][data-value=zo-sgd]")
    for kind in ("csv", "latex"):
        quick.click(f".sheet:has({SUMMARY}) [data-export={kind}]")
    written, latex = quick.driver.execute_async_script(
        "const end = arguments[0]; Promise.all(window.made.map((blob) => blob.text())).then(end)"
    )
    rows = list(csv.DictReader(io.StringIO(written)))
    assert [row["method"] for row in rows] == ["simplecil", "aper-adapter", "aper-adapter", "ease"]
    assert rows[0]["optimizer"] == "" and float(rows[1]["Avg"]) > 40
    assert float(rows[2]["Avg ±"]) > 0 and float(rows[2]["forwards"]) > 100
    assert latex.count(r" \\") == 1 + len(rows) and latex.count(r"\begin{") == latex.count(r"\end{") == 2
    assert "$\\pm$" in latex and "zo-sgd & 8" in latex


def test_the_first_columns_stay_in_sight(browser: Any, quick_file: Path) -> None:
    page = Page(browser, quick_file, width=380)
    place = f"document.querySelector('{SUMMARY} tbody tr:not([hidden]) th:nth-child(2)').getBoundingClientRect().left"
    window = f"document.querySelector('{SUMMARY}').parentNode"
    before = page.run(f"return {place}")
    assert page.run(f"{window}.scrollLeft = 300; return {window}.scrollLeft") == 300
    assert page.run(f"return {place}") == pytest.approx(before, abs=2)


def test_a_figure_of_many_settings_shows_the_best_until_all_are_asked_for(
    browser: Any, store: Store, tmp_path: Path
) -> None:
    rates = [0.01 * (1 + i) for i in range(12)]
    fill(
        store,
        simplecil(50.0),
        *(cell(60.0 + i, lr=lr, optimizer=o) for o in ("zo-sgd", "zo-adam") for i, lr in enumerate(rates)),
    )
    page = Page(browser, write_report(store, tmp_path / "report.html"))
    title = "All settings beside each other"
    assert page.seen(title) == ["ease zo-adam lr=0.12", "ease zo-sgd lr=0.12", "simplecil"]
    place = f"#{page.figure(title)}"
    assert "2 of 24 settings" in page.run(f"return document.querySelector('{place} .note').textContent")
    page.click(f"{place} button.all")
    assert len(page.seen(title)) == 25
    page.click(f"{place} button.all")
    assert len(page.seen(title)) == 3 and page.complaints() == []


# What a keyboard and a screen reader need


CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll("h1, h2, h3, p, li, th, td, button, label, summary, code")]
  .filter((e) => e.offsetParent && e.textContent.trim()).map((e) => {
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), `${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}`];
  }).filter(([ratio]) => ratio < 4.5);
"""  # of WCAG 2.2, 1.4.3


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, quick_file: Path, theme: str) -> None:
    page = Page(browser, quick_file, theme=theme)
    page.click("#filters button[data-key=optimizer][data-value=zo-sgd]")
    assert page.run(CONTRAST) == []


@pytest.mark.parametrize("width", [380, 1400])
def test_everything_to_press_has_a_name_and_every_table_its_headings(browser: Any, full_file: Path, width: int) -> None:
    page = Page(browser, full_file, width=width)
    assert page.run("return document.documentElement.scrollWidth") <= width
    controls = page.driver.find_elements("css selector", "button, input, select")
    shown = [control for control in controls if control.is_displayed()]
    assert len(shown) > 20 and all(control.accessible_name for control in shown[:40])
    nothing = {
        "headings without scope": "th:not([scope])",
        "what is pressed and no button": "[onclick], div[role=button], a:not([href])",
        "boxes that a keyboard cannot scroll": ".wide:not([tabindex='0'])",
        "boxes without a name": "[role=region]:not([aria-label]):not([aria-labelledby])",
    }
    for what, selector in nothing.items():
        assert page.run(f'return document.querySelectorAll("{selector}").length') == 0, what
    identities = page.run("return [...document.querySelectorAll('body [id]:not(svg [id])')].map((e) => e.id)")
    assert len(identities) == len(set(identities))
    levels = page.run("return [...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))
    small = page.run(
        "return [...document.querySelectorAll('button')].filter((b) => b.offsetParent && b.getBoundingClientRect().height < 24)"
        ".map((b) => b.textContent)"
    )
    assert small == [], "of WCAG 2.2, 2.5.8"


AXE = """
const done = arguments[0];
axe.run(document, {resultTypes: ["violations"]}).then((found) => done(
    found.violations.filter((each) => ["serious", "critical"].includes(each.impact))
        .map((each) => [each.id, each.help, each.nodes.slice(0, 3).map((node) => node.html.slice(0, 200))])));
"""


@pytest.mark.parametrize(("theme", "width"), [("light", 1400), ("dark", 380)])
def test_axe_finds_nothing_serious(browser: Any, quick_file: Path, theme: str, width: int) -> None:
    (script,) = [file for file in files("axe-core-python") or () if file.name == "axe.min.js"]
    page = Page(browser, quick_file, theme=theme, width=width)
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.run(script.read_text())
    browser.set_script_timeout(120)
    assert browser.execute_async_script(AXE) == []


def test_a_keyboard_reaches_everything_and_shows_where_it_is(quick: Page) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(30):
        ActionChains(quick.driver).send_keys(Keys.TAB).perform()
        own = "const e = document.activeElement; return [e.textContent.trim() || e.id || e.type, getComputedStyle(e).outlineStyle]"
        name, outline = quick.run(own)
        assert outline == "solid", name
        reached.append(name)
    assert reached[0] == "Skip to the results" and {"light / dark", "zo-sgd", "clear", "search", "CSV", "LaTeX"} <= set(
        reached
    )


def test_the_heat_map_is_of_the_setting_that_is_chosen(quick: Page) -> None:
    place = quick.figure("Accuracy per task")
    shown = f"return document.querySelector('#{place} .plot').data.filter((t) => t.visible).map((t) => t.name)"
    assert quick.run(shown) == ["quickdraw100-marker ease fo-sgd"] or quick.run(shown) == ["ease fo-sgd"], (
        "the best Avg"
    )
    quick.run(
        f"const s = document.querySelector('#{place} select'); s.value = [...s.options].find((o) => o.text === 'simplecil').value;"
        "s.dispatchEvent(new Event('change'))"
    )
    assert quick.run(shown) == ["simplecil"]


def test_trajectories_play(browser: Any, full_file: Path) -> None:
    page = Page(browser, full_file)
    place = page.figure("Two parameters: both tasks at once")
    length = f"document.querySelector('#{place} .plot').data.at(-1).x.length"
    assert page.run(f"return {length}") == 21
    page.run(f"document.querySelector('#{place} .updatemenu-button').dispatchEvent(new MouseEvent('click'))")
    page.wait(f"{length} < 10")
    page.wait(f"{length} === 21")
    page.click("#filters button[data-value=forward-grad]")
    names = f"return document.querySelector('#{place} .plot').data.filter((t) => t.meta && t.visible !== false).map((t) => t.name)"
    assert page.run(names) == ["forward-grad q=1"]
    assert page.complaints() == []


def test_a_narrow_page_does_not_scroll_sideways(browser: Any, full_file: Path) -> None:
    page = Page(browser, full_file, width=380)
    assert page.run("return document.documentElement.scrollWidth") <= 380
    assert page.run("return document.getElementById('filters').open") is False
    assert page.complaints() == []


@pytest.mark.parametrize("kind", ["empty", "failures", "one", "landscape"])
def test_odd_stores_open_without_errors(browser: Any, tmp_path: Path, kind: str) -> None:
    store = Store(tmp_path / "results")
    if kind == "failures":
        store.write_failure(failure(cell().config, "MemoryError", "out of memory", "", 3))
    if kind == "one":
        fill(store, simplecil())
    if kind == "landscape":
        store.write_landscape(*landscape())
    page = Page(browser, write_report(store, tmp_path / "report.html"))
    before = page.run("return getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.run("return getComputedStyle(document.body).backgroundColor") != before
    assert page.complaints() == []


def test_an_animation_on_the_page_shows_what_was_reached_by_each_step(
    browser: Any, full: Store, full_file: Path
) -> None:
    page = Page(browser, full_file)
    surface, runs = figures.surfaces(full.load("surfaces"))[0], figures.trajectories(full.load("trajectories"))
    moving = figures.animate_trajectories(surface, runs, objective="both")
    plot = "[...document.querySelectorAll('.plot')].find((p) => p._transitionData?._frames.length)"
    for frame in (moving.frames[3], moving.frames[-1]):
        page.run(
            f"window.moved = 0; Plotly.animate({plot}, [arguments[0]], {{mode: 'immediate', transition: {{duration: 0}}, "
            "frame: {duration: 0, redraw: false}}).then(() => { window.moved = 1; })",
            frame.name,
        )
        page.wait("window.moved === 1")
        for number, trace in zip(frame.traces, frame.data, strict=True):
            assert page.run(f"return {plot}.data[arguments[0]].x.length", number) == len(trace.x)
    assert page.complaints() == []
