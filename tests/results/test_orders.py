"""Settings over class orders, with an interval of their own beside that over seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from everything import cell, fill, simplecil
from scipy import stats

from zeroflow.results import Store
from zeroflow.results.orders import over_orders
from zeroflow.results.summary import summary
from zeroflow.results.tables import make_tables

LEVELS = {0: (80.0, 82.0, 84.0), 1: (70.0, 71.0, 72.0), 2: (90.0, 90.0, 93.0)}
"""Of three seeds, by order; Avg is five less."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "results")
    for order, levels in LEVELS.items():
        fill(found, simplecil(60.0 + order, class_order_seed=order))
        fill(found, *(cell(level, class_order_seed=order, seed=seed) for seed, level in enumerate(levels)))
    fill(found, cell(99.0, class_order_seed=7, optimizer="zo-adam"), cell(99.0, fixed_class_order="sorted"))
    return found


def test_an_interval_over_orders_and_one_over_seeds(store: Store) -> None:
    baseline, trained = over_orders(summary(store.load("trials")))
    assert [len(each.rows) for each in (baseline, trained)] == [3, 3], "one order alone, or a fixed one, says nothing"
    means = np.array([np.mean(levels) - 5 for levels in LEVELS.values()])
    interval = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    assert trained.avg.mean == pytest.approx(means.mean())
    assert trained.avg.half_width == pytest.approx((interval[1] - interval[0]) / 2)
    within = np.mean([np.var(levels, ddof=1) for levels in LEVELS.values()])
    assert trained.over_seeds == pytest.approx(stats.t.ppf(0.975, 6) * np.sqrt(within / 3))
    gains = means - (np.array([60.0, 61.0, 62.0]) - 5)
    assert trained.gain and trained.gain.mean == pytest.approx(gains.mean())
    assert trained.gain.half_width == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(gains))
    assert baseline.over_seeds is None and baseline.gain is None


def test_the_table_has_a_line_for_each_setting(store: Store) -> None:
    (table,) = [each for each in make_tables({"trials": store.load("trials")}) if each.name == "orders"]
    assert [line.cells[1].text for line in table.lines] == ["simplecil", "ease fo-sgd"]
    assert [cell.text for cell in table.lines[1].cells[2:6]] == ["3", "3", "76.33 ± 24.88", "2.31"]


def test_settings_compete_on_one_stream_and_in_the_same_orders(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    for tasks, level in ((5, 80.0), (2, 60.0)):
        for order in (0, 1):
            fill(store, simplecil(level, class_order_seed=order, tasks=tasks))
            fill(store, cell(level + 5, class_order_seed=order, tasks=tasks))
    (table,) = [each for each in make_tables({"trials": store.load("trials")}) if each.name == "orders"]
    ranks = {line.cells[1].text: line.cells[4].rank for line in table.lines}
    assert sorted(ranks.items()) == [
        ("ease fo-sgd tasks=2", 1), ("ease fo-sgd tasks=5", 1), ("simplecil tasks=2", 2), ("simplecil tasks=5", 2)
    ]  # fmt: skip


def test_a_gain_over_fewer_orders_than_the_row_has_is_none(store: Store) -> None:
    fill(store, *(cell(80.0, class_order_seed=order, optimizer="zo-cge") for order in (0, 1, 9)))
    (found,) = [each for each in over_orders(summary(store.load("trials"))) if "zo-cge" in each.label]
    assert len(found.rows) == 3 and found.gain is None, "order 9 has no SimpleCIL"
