"""The summary of a store: what counts as a row, what it is compared with, and how it is shown."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from everything import fill
from small_results import cell, simplecil

from zeroflow.results import SCHEMAS, Store, pack
from zeroflow.results.estimates import estimate
from zeroflow.results.summary import gradients, render_markdown, render_text, summary
from zeroflow.results.tables import make_tables
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.keys.values import as_json


def test_the_interval_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    # The 97.5 % quantile of Student's t with 2 degrees of freedom, from a table; the standard deviation is 1.
    assert found.half_width == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)
    assert estimate([5.0]).half_width is None and str(estimate([5.0])) == "5.00"


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_mean_in_any_order(odd: float) -> None:
    for values in itertools.permutations([1.0, 5.0, odd]):
        found = estimate(values)
        assert math.isnan(found.mean) and (found.half_width, found.p_value, found.n) == (None, None, 3)
        assert str(found) == "-"
    assert str(estimate([odd])) == "-"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_seed_without_a_finite_number_leaves_its_row_without_one(store: Store, place: int) -> None:
    fill(store, *(cell(80.0, seed=seed, optimizer="zo-sgd") for seed in range(3)), simplecil(70.0))
    trials = store.load("trials")
    lines = trials.to_pylist()
    zeroth = sorted((line for line in lines if line["method"] == "ease"), key=lambda line: line["seed"])
    zeroth[place] |= {"avg": math.nan, "seconds": math.inf}
    rows = summary(pa.Table.from_pylist(lines, schema=trials.schema))
    assert rows[1].avg is None and rows[1].vs_simplecil is None and rows[1].seconds is None
    text = render_text(rows)
    assert re.search(r"zo-sgd +1 +3 +- +70\.00 ± 0\.00 .* - +700 +12,000 +3\.0 +-$", text.splitlines()[3]), text
    assert "nan" not in text and "inf" not in text
    (cells,) = (
        t for t in make_tables({"trials": pa.Table.from_pylist(lines, schema=trials.schema)}) if t.name == "cells"
    )
    avg = cells.headings.index("avg")
    assert sorted(line.cells[avg].text for line in cells.lines) == ["-", "65.00", "75.00", "75.00"]


def test_the_summary_averages_over_seeds_and_compares_with_simplecil(store: Store) -> None:
    fill(store, *(cell(level, seed=seed, optimizer="zo-sgd") for seed, level in enumerate((79.0, 80.0, 81.0))))
    fill(store, cell(90.0, optimizer="fo-sgd", queries=None), simplecil(70.0, seed=0))
    baseline, first_order, zeroth = summary(store.load("trials"))
    assert baseline.is_baseline and baseline.avg and baseline.avg.mean == 65.0 and baseline.vs_simplecil is None
    assert first_order.avg and first_order.avg.half_width is None and first_order.vs_simplecil == 20.0
    assert zeroth.seeds == 3 and zeroth.vs_simplecil == pytest.approx(10.0)
    assert zeroth.avg and zeroth.avg.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert (zeroth.forward_passes, zeroth.peak_memory, zeroth.seconds) == (12_000, 3.0, 4.5)
    assert list(zeroth.shown) == ["method", "optimizer", "queries"]
    assert zeroth.label == "ease zo-sgd"


@pytest.mark.parametrize("is_packed", [False, True])
def test_seeds_of_an_older_version_are_of_the_same_setting(store: Store, is_packed: bool) -> None:
    """Its files have no columns for what was added since, and a sweep goes on from them."""
    fill(store, *(cell(70.0 + seed, optimizer="zo-sgd", seed=seed) for seed in range(3)))
    added = ["hybrid_epochs", "validation", "loss", "later"]
    for file in sorted(Path(store.root).glob("trials/*.parquet"))[:2]:
        table = pq.read_table(file)
        config = {key: value for key, value in json.loads(table["config"][0].as_py()).items() if key not in added}
        where = table.column_names.index("config")
        pq.write_table(table.set_column(where, "config", [[json.dumps(config)]]).drop_columns(added), file)
    if is_packed:
        pack(store)
    (row,) = summary(store.load("trials"))
    assert row.seeds == 3 and row.avg == estimate([65.0, 66.0, 67.0])
    assert store.load("trials", ["hybrid_epochs"])["hybrid_epochs"].to_pylist() == [0, 0, 0]


def test_simplecil_leads_every_data_set_and_rows_are_sorted(store: Store) -> None:
    for dataset in ("b-set", "a-set"):
        fill(store, *(cell(dataset=dataset, optimizer="zo-sgd", queries=queries) for queries in (16, 4)))
        fill(store, cell(dataset=dataset, method="aper", optimizer="zo-sgd"), simplecil(dataset=dataset))
    rows = summary(store.load("trials"))
    assert [row.label for row in rows] == [
        f"{dataset} {rest}"
        for dataset in ("a-set", "b-set")
        for rest in ("simplecil", "aper zo-sgd q=1", "ease zo-sgd q=4", "ease zo-sgd q=16")
    ]


@pytest.mark.parametrize("others", [(), ({"method": "acil", "optimizer": None},)])
def test_options_of_a_methods_own_classifier_are_whose_they_are(store: Store, others: tuple[dict, ...]) -> None:
    """``classifier`` is null where it is the method's own."""
    shared = {"classifier_options": {"ridge": 10.0}, "queries": None}
    made = [{"method": "ranpac", "optimizer": None}, *others]
    fill(store, *(cell(**shared, **each) for each in made))
    assert f"ridge=10 ({', '.join(sorted(each['method'] for each in made))})" in render_text(
        summary(store.load("trials"))
    )


def test_keys_get_a_column_where_they_tell_rows_apart(store: Store) -> None:
    fill(store, cell(epochs=1), cell(epochs=2), cell(lr=0.5, optimizer="fo-adam", epochs=1), simplecil())
    rows = summary(store.load("trials"))
    # The learning rate follows the optimizer here; SimpleCIL has no epochs.
    assert all(list(row.shown) == ["method", "optimizer", "queries", "epochs"] for row in rows)
    fill(store, cell(epochs=1, lr=0.2), cell(epochs=1, checkpoint="none", method_options={"depth": 2}))
    shown = [row.shown for row in summary(store.load("trials"))]
    assert {row["lr"] for row in shown} == {"-", "0.01", "0.2", "0.5"}
    assert {row["checkpoint"] for row in shown} == {"-", "none"}
    assert {row["method_options"] for row in shown} == {"-", "depth=default", "depth=2"}
    assert len({tuple(row.values()) for row in shown}) == len(shown) == 6


def test_simplecil_on_another_problem_is_no_measure(store: Store) -> None:
    fill(store, cell(), simplecil(class_order_seed=7))
    assert [row.vs_simplecil for row in summary(store.load("trials"))] == [None, None]


def test_simplecil_of_the_same_weights_is_the_measure_however_older_files_say_it(store: Store) -> None:
    """Those of before say ``hub`` where today nothing is said."""
    fill(store, cell(80.0), simplecil(70.0))
    trials = store.load("trials").to_pylist()
    older = [{**row, "checkpoint": "hub" if row["optimizer"] else None} for row in trials]
    gains = [row.vs_simplecil for row in summary(pa.Table.from_pylist(older, SCHEMAS["trials"]))]
    assert gains == [None, 10.0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hybrid_epochs": 2, "epochs": 2}, "exact"),
        ({"hybrid_epochs": 1, "epochs": 2}, "both"),
        # Another optimizer brings its own settings, which are no exact steps.
        ({"hybrid_epochs": 2, "epochs": 2, "later": {"task": 2, "optimizer": "zo-adam"}}, "both"),
        ({"hybrid_epochs": 2, "epochs": 2, "later": {"task": 2, "optimizer": "zo-adam", "hybrid_epochs": 2}}, "exact"),
        ({"optimizer_options": {"hybrid": 5}, "later": {"task": 2, "lr": 0.5}}, "both"),
        ({"later": {"task": 2, "optimizer": "zo-adam"}}, "forward"),
        ({"later": {"task": 2, "optimizer": "fo-adam"}}, "both"),
    ],
)
def test_what_a_cell_is_trained_with_is_what_its_tasks_are(changes: dict[str, Any], expected: str) -> None:
    config = TrialConfig.from_dict({"method": "ease", "optimizer": "zo-sgd", **changes})
    columns = {key: as_json(value) if isinstance(value, Mapping) else value for key, value in vars(config).items()}
    assert gradients(columns) == expected


def test_the_table_fits_a_terminal(store: Store) -> None:
    for seed, level in enumerate((79.0, 80.0, 81.0)):
        fill(store, cell(level, seed=seed, method="aper-adapter", optimizer="zo-adam-conserve", queries=4))
    fill(store, simplecil())
    text = render_text(summary(store.load("trials")))
    assert max(map(len, text.splitlines())) <= 120
    _, _, first, second, *_ = text.splitlines()
    assert first.split()[:4] == ["simplecil", "-", "-", "1"]
    assert re.search(r"zo-adam-conserve +4 +3 +75\.00 ± 2\.48 .* \+10\.00 +700 +12,000 +3\.0 +4\.5$", second)


def test_markdown_keeps_its_columns_whatever_the_names(store: Store) -> None:
    fill(store, cell(method="a|b"), simplecil())
    lines = [line for line in render_markdown(summary(store.load("trials"))).splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_an_empty_table_renders() -> None:
    assert "Avg" in render_text([]) and "Avg" in render_markdown([])


def test_a_line_of_table_1_is_one_setting_on_all_data_sets(store: Store) -> None:
    """An option that tells rows of one data set apart is named on the other one too, where all rows have it."""
    fast = {"optimizer_options": {"momentum": 0.9}}
    fill(store, simplecil(70.0), simplecil(60.0, dataset="cifar100"), cell(80.0), cell(84.0, **fast))
    fill(store, cell(64.0, dataset="cifar100", **fast))
    (table,) = [table for table in make_tables({"trials": store.load("trials")}) if table.name == "table1"]
    places = [table.headings.index(f"{dataset} Avg") for dataset in ("cifar100", "quickdraw100")]
    means = {line.cells[0].text: [line.cells[place].text for place in places] for line in table.lines}
    assert means == {
        "simplecil": ["55.00", "65.00"],
        "ease fo-sgd": ["-", "75.00"],
        "ease fo-sgd momentum=0.9": ["59.00", "79.00"],
    }
