"""The report, as a reader meets it: what the page holds and says, and bad stores."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner
from everything import cell, fill, landscape, seeds, simplecil
from places import ROOT

from zeroflow.cli import main
from zeroflow.errors import ConfigError
from zeroflow.results import SCHEMA_VERSION, Store, figures
from zeroflow.results.findings import findings
from zeroflow.results.report import write_report
from zeroflow.results.rows import failure, tables
from zeroflow.results.summary import HELD_OUT, render_text, shared, summary
from zeroflow.results.tables import make_tables
from zeroflow.trial.metrics import DEFINITIONS

pytestmark = pytest.mark.slow  # whole pages

QUICK = ROOT / "results" / "adapters"


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
