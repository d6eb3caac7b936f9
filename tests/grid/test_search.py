"""Included grids and settings, and the search for lr, eps and options: equal budgets, held-out data, choice, the grid file's text."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from places import ROOT

from zeroflow import run_trial
from zeroflow.cli import main
from zeroflow.data import ImageDataset, load_dataset
from zeroflow.data.dataset import datasets, register_dataset
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import Grid, load_grid, parse_grid
from zeroflow.grid.search_plan import SearchPlan, plan_search
from zeroflow.grid.search_selection import SearchOutcome, outcomes, write
from zeroflow.grid.search_settings import Between, Listed
from zeroflow.grid.search_writeback import BEGIN, END, with_chosen, write_chosen
from zeroflow.grid.yaml_loader import parse_yaml
from zeroflow.optim import list_optimizers, optimizers
from zeroflow.results import SCHEMAS, Store, load, merge
from zeroflow.results.rows import failure, tables
from zeroflow.results.searches import render_searches, search_rows
from zeroflow.results.tables import make_tables
from zeroflow.trial.config import TrialConfig

TINY = {"checkpoint": "none", "tasks": 4, "epochs": 2, "batch_size": 16, "image_size": 14}
"""With ``some_drawings``: 5 classes of 12 drawings in the first task; 9 of them are trained on, 45 drawings, 3 mini-batches."""


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


# Grids of several files


def test_an_included_grid_brings_its_cells_as_its_own_file_has_them(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    put(tmp_path / "parts", one="base: {epochs: 3, tasks: 5}\ngrid: [{method: ease, seed: [0, 1]}]\ndata_dir: /there")
    put(
        tmp_path,
        two="grid: [{method: simplecil}, {method: ease, epochs: 7}]\nplacement: {cpus_per_worker: 4}",
        inner="include: [parts/one.yaml]",
        union="include: [two.yaml, inner.yaml, parts/one.yaml]\nbase: {epochs: 7}\n"
        "grid: [{method: ease}, {method: ease, seed: 5}]",
    )
    grid = load_grid(tmp_path / "union.yaml")
    parts = [load_grid(tmp_path / "two.yaml"), load_grid(tmp_path / "parts" / "one.yaml")]
    assert list(grid.cells) == [*parts[0].cells, *parts[1].cells, TrialConfig.from_dict({"epochs": 7, "seed": 5})]
    assert [(c.tasks, c.epochs) for c in grid.cells] == [(10, None), (10, 7), (5, 3), (5, 3), (10, 7)]
    assert len({c.cell_id for c in grid.cells}) == len(grid.cells) == 5
    assert grid.placement.cell.cpus_per_worker == 1 and grid.data_dir is None, "an included file's count for it alone"
    assert [c.seed for c, _ in grid.own] == [0, 5]


def test_overrides_hold_for_included_cells_too(tmp_path: Path) -> None:
    put(
        tmp_path,
        one="grid: [{method: ease, epochs: 3}]",
        two="grid: [{method: simplecil}, {method: ease}]",
        both="include: [one.yaml, two.yaml]",
        nothing="grid: [{method: simplecil}]",
        mixed="include: [nothing.yaml]\ngrid: [{method: ease}]",
    )
    cells = load_grid(tmp_path / "both.yaml", {"epochs": 2, "seed": [4, 5]}).cells
    assert sorted((c.method, c.epochs, c.seed) for c in cells) == [
        ("ease", 2, 4),
        ("ease", 2, 5),
        ("simplecil", None, 0),
    ]
    # An option that only some of the files know is dropped elsewhere, as within one file.
    ease, frozen = sorted(
        load_grid(tmp_path / "mixed.yaml", {"method_options.alpha": 0.5}).cells, key=lambda c: c.method
    )
    assert (dict(ease.method_options), dict(frozen.method_options)) == ({"alpha": 0.5}, {})
    with pytest.raises(ConfigError, match="--set: unknown option in method_options 'alfa'; did you mean 'alpha'"):
        load_grid(tmp_path / "mixed.yaml", {"method_options.alfa": 0.5})


def test_settings_are_taken_from_another_grid_before_the_own_ones(tmp_path: Path) -> None:
    put(
        tmp_path,
        first="grid: [{method: ease}]\nsettings: [{when: {optimizer: zo-sgd}, set: {lr: 0.1, epochs: 3}}]",
        second="settings_from: [first.yaml]\ngrid: [{method: ease}]\n"
        "settings: [{when: {optimizer: zo-sgd}, set: {lr: 0.2}}]",
        third="settings_from: [second.yaml]\ngrid: [{optimizer: [zo-sgd, fo-sgd]}]\n"
        "settings: [{when: {optimizer: zo-sgd}, set: {eps: 0.5}}]",
    )
    zo, fo = load_grid(tmp_path / "third.yaml").cells
    assert (zo.lr, zo.epochs, zo.eps) == (0.2, 3, 0.5)
    assert (fo.lr, fo.epochs) == (optimizers.get("fo-sgd").default_lr, TrialConfig.epochs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: [a.yaml]", r"a.yaml: include: .*a.yaml leads back to itself: .*a.yaml -> .*a.yaml"),
        ("include: [b.yaml]", r"b.yaml: include: .*a.yaml leads back to itself: .*a.yaml -> .*b.yaml -> .*a.yaml"),
        ("grid: [{}]\nsettings_from: [c.yaml]", r"c.yaml: settings_from: .*a.yaml leads back to itself"),
        ("include: [tabel.yaml]", r"a.yaml: include: .*tabel.yaml: cannot be read: No such file.*did you mean 'table.yaml'"),
        ("include: table.yaml", "include: expected a list of grid files, got 'table.yaml'"),
        ("include: []", "include: expected a list of grid files"),
        ("include: [1]", "include: expected a list of grid files"),
        ("include: [list.yaml]", r"list.yaml: expected a mapping with a 'grid' list, got list"),
        ("include: [bad.yaml]", r"bad.yaml: grid\[0\]: unknown key 'metod'"),
        ("include: [table.yaml]\nbase: {epochs: 1}", "base: concerns the cells of this file's own 'grid'"),
        ("name: a", "grid: expected a list of mappings .* or an 'include' list"),
        ("grid: [{}]\nsettings_from: [list.yaml]", "list.yaml: expected a mapping"),
        ("include: [sub]", "sub: cannot be read"),
    ],
)  # fmt: skip
def test_bad_references_to_other_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sub").mkdir()
    put(
        tmp_path,
        a=text,
        b="include: [a.yaml]",
        c="grid: [{}]\nsettings_from: [a.yaml]",
        table="grid: [{method: ease}]",
        list="- 1",
        bad="grid: [{metod: ease}]",
    )
    with pytest.raises(ConfigError, match=message):
        load_grid(tmp_path / "a.yaml")


def test_a_file_may_include_one_that_takes_its_settings(tmp_path: Path) -> None:
    put(
        tmp_path,
        a="include: [b.yaml]\ngrid: [{method: ease}]\nsettings: [{when: {}, set: {lr: 0.7}}]",
        b="settings_from: [a.yaml]\ngrid: [{method: ease, seed: 1}]",
    )
    assert [c.lr for c in load_grid(tmp_path / "a.yaml").cells] == [0.7, 0.7]


# What a budget pays for


def grid_of(dataset: str, search: dict[str, Any], *blocks: dict[str, Any], **sections: Any) -> Grid:
    return parse_grid({"base": {**TINY, "dataset": dataset}, "grid": list(blocks), "search": search, **sections})


def test_a_range_is_halved_again_and_again() -> None:
    found = list(islice(Between(1e-4, 1.0), 9))
    assert found == [0.01, 1e-4, 1.0, 1e-3, 0.1, 0.000316, 0.0316, 0.00316, 0.316]
    assert list(islice(Between(1e-4, 1.0), 4)) == found[:4]
    assert list(Between(1.0, 1.01)) == [1.0, 1.01], "three digits tell no more values apart, and it ends"
    assert list(islice(Between(1.2345e-3, 7.6543e-1), 3))[1:] == [1.2345e-3, 7.6543e-1], "the ends as they are given"


@pytest.mark.slow
def test_every_optimizer_gets_the_same_budget(some_drawings: str) -> None:
    names = list_optimizers()
    for budget in (500, 777):
        search = {"forward_passes": budget, "seeds": [100, 101]}
        plan = plan_search(
            grid_of(some_drawings, search, {"method": ["ease", "aper-adapter"], "optimizer": names, "seed": [0, 1]}),
            None,
        )
        assert len(plan.searches) == 2 * len(names)
        for one in plan.searches:
            spent = len(one.candidates) * one.cost
            assert spent <= budget < spent + one.cost, one.label
            assert not one.exhausted and one.candidates
    cost = {str(one.when["optimizer"]): one.cost for one in plan.searches}
    # 2 epochs of 3 mini-batches, for two seeds: three units for a gradient, two for a pair of forward passes.
    assert (cost["fo-sgd"], cost["zo-sgd"], cost["zo-sgd-conserve"]) == (2 * 6 * 3, 2 * 6 * 2, 2 * 6 * 5)
    assert cost["zo-svrg"] == 2 * (6 * 4 + 3 * 2), "its snapshot counts too"


def test_a_smaller_budget_tries_the_first_of_the_same(some_drawings: str) -> None:
    def tried(budget: int) -> list[str]:
        search = {"forward_passes": budget, "eps": [1e-3, 1e-2]}
        plan = plan_search(grid_of(some_drawings, search, {"optimizer": "zo-sgd"}), None)
        return [config.cell_id for candidate in plan.searches[0].candidates for config in candidate.cells]

    large = tried(12 * 11 + 5)
    assert len(large) == 11 == len(set(large))
    for count in range(1, 11):
        assert tried(12 * count) == large[:count]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "cost"),
    [
        ({"optimizer": "fo-sgd"}, 6 * 3),
        ({"optimizer": "zo-sgd", "queries": 2}, 6 * 4),
        ({"optimizer": "zo-adam-conserve"}, 6 * 5),
        ({"optimizer": "forward-grad"}, 6 * 2),
        ({"optimizer": "zo-svrg", "optimizer_options": {"snapshot_every": 4}}, 6 * 4 + 2 * 3 * 2),
        ({"optimizer": "zo-sgd", "hybrid_epochs": 1}, 3 * 3 + 3 * 2),
        ({"optimizer": "zo-sgd", "optimizer_options": {"hybrid": 2}}, 2 * 3 + 4 * 2),
        ({"optimizer": "zo-sgd", "optimizer_options": {"hybrid": 99}}, 6 * 3),
    ],
)
def test_a_candidate_costs_what_was_planned(some_drawings: str, cell: dict[str, Any], cost: int) -> None:
    (search,) = plan_search(
        grid_of(some_drawings, {"forward_passes": 500}, {"method": "aper-adapter", **cell}), None
    ).searches
    (config,) = search.candidates[0].cells
    assert (config.stop_after, config.validation, config.seed) == (1, 0.25, 100)
    result = run_trial(dataclasses.replace(config, lr=1e-4))
    assert result.accuracy_matrix.shape == (1, 1) and list(result.test_samples) == [15]
    assert result.summary["forward_equivalents"] == search.cost == cost


@pytest.mark.slow
def test_no_image_of_the_test_data_and_of_later_tasks_is_ever_looked_at(some_drawings: str) -> None:
    seen: set[int] = set()
    whole = load_dataset(some_drawings)

    class Watched:
        labels = whole.train.labels

        def images(self, indices: np.ndarray) -> Any:
            seen.update(indices.tolist())
            return whole.train.images(indices)

    class Forbidden:
        labels = whole.test.labels

        def images(self, indices: np.ndarray) -> Any:
            raise AssertionError("test data was looked at")

    name = "watched-drawings"
    if name not in datasets.names():

        @register_dataset(
            name, classes=20, transform="drawings", image_size=28, where="made by the tests", description="watched"
        )
        def open_it(data_dir: Path | None) -> ImageDataset:
            return ImageDataset(name, whole.class_names, Watched(), Forbidden())

    plan = plan_search(
        grid_of(name, {"forward_passes": 18}, {"method": ["ease", "aper-adapter"], "optimizer": ["zo-sgd", "fo-sgd"]}),
        None,
    )
    assert not seen, "planning looks at labels alone"
    for config in plan.candidates.cells:
        run_trial(config)
    first = np.random.RandomState(1993).permutation(20)[:5]
    assert set(whole.train.labels[sorted(seen)]) == set(first)
    with pytest.raises(AssertionError, match="test data was looked at"):
        run_trial(dataclasses.replace(plan.candidates.cells[0], validation=0.0))


def test_cells_are_searched_together_if_only_seed_lr_eps_and_queries_differ(some_drawings: str) -> None:
    block = {"optimizer": ["fo-sgd", "zo-sgd", "zo-fzoo"], "queries": [2, 8], "seed": [0, 1], "lr": [0.1, 0.2]}
    grid = grid_of(some_drawings, {"forward_passes": 200}, {"method": "simplecil"}, block)
    plan = plan_search(grid, None)
    assert [(s.when["optimizer"], len(s.cells)) for s in plan.searches] == [
        ("fo-sgd", 4),
        ("zo-sgd", 8),
        ("zo-fzoo", 8),
    ]
    assert {c.queries for s in plan.searches[1:] for t in s.candidates for c in t.cells} == {2}, "the fewest"
    given = plan_search(dataclasses.replace(grid, search=dataclasses.replace(grid.search, queries=4)), None).searches[1]
    assert {c.queries for t in given.candidates for c in t.cells} == {4}
    each = plan_search(dataclasses.replace(grid, search=dataclasses.replace(grid.search, queries="each")), None)
    assert [s.when for s in each.searches[1:3]] == [
        {"dataset": some_drawings, "method": "ease", "optimizer": "zo-sgd", "queries": q} for q in (2, 8)
    ]


def test_a_candidate_does_nothing_that_no_choice_needs(some_drawings: str) -> None:
    blocks = [{"method": "finetune", "optimizer": "zo-sgd", **probes} for probes in ({}, {"probe_every": 2})]
    (search,) = plan_search(grid_of(some_drawings, {"forward_passes": 50}, *blocks), None).searches
    assert len(search.cells) == 2 and {c.probe_every for t in search.candidates for c in t.cells} == {None}


MOMENTUM, BOTTLENECK = "optimizer_options.momentum", "method_options.bottleneck"


def planned(dataset: str, options: dict[str, Any], *blocks: dict[str, Any], **search: Any) -> SearchPlan:
    settings = {"forward_passes": 10**6, "lr": [0.3, 0.1], "options": options, **search}
    return plan_search(grid_of(dataset, settings, *(blocks or ({"optimizer": "zo-sgd"},))), None)


def test_options_are_tried_with_their_first_values_and_all_lr_first_then_one_changed_then_two(
    some_drawings: str,
) -> None:
    options = {BOTTLENECK: [16, 4], MOMENTUM: [0.9, 0.0, 0.5]}
    wanted = [
        (lr, *values) for values in ((16, 0.9), (4, 0.9), (16, 0.0), (16, 0.5), (4, 0.0), (4, 0.5)) for lr in (0.3, 0.1)
    ]
    for tries in (1, 3, 11, 12, 13):
        # A pair of forward passes in 6 mini-batches: 12 each.
        (search,) = planned(some_drawings, options, forward_passes=12 * tries + 11).searches
        tried = [(c.lr, c.options[BOTTLENECK], c.options[MOMENTUM]) for c in search.candidates]
        assert tried == wanted[:tries] and search.exhausted == (tries >= 12)
        for candidate in search.candidates:
            (config,) = candidate.cells
            changed = {"momentum": candidate.options[MOMENTUM]} if candidate.options[MOMENTUM] else {}
            assert (config.lr, config.method_options["bottleneck"]) == (candidate.lr, candidate.options[BOTTLENECK])
            assert dict(config.optimizer_options) == changed and candidate.cost == 12


def test_eps_and_a_range_of_lr_with_options(some_drawings: str) -> None:
    (both,) = planned(some_drawings, {MOMENTUM: [0.0, 0.9]}, eps=[1e-3, 1e-2]).searches
    assert [(c.options[MOMENTUM], c.lr, c.eps) for c in both.candidates] == [
        (momentum, lr, eps) for momentum in (0.0, 0.9) for lr in (0.3, 0.1) for eps in (1e-3, 1e-2)
    ]
    # A range goes on for long: its middle and ends with all options, then the points halfway.
    (halved,) = planned(
        some_drawings, {MOMENTUM: [0.0, 0.9]}, lr={"from": 1e-4, "to": 1}, forward_passes=12 * 12
    ).searches
    rounds = ((0.01, 1e-4, 1.0), (1e-3, 0.1), (0.000316,))
    wanted = [(momentum, lr) for together in rounds for momentum in (0.0, 0.9) for lr in together]
    tried = [(c.options[MOMENTUM], c.lr) for c in halved.candidates]
    assert tried[:10] == wanted[:10] and tried[10:] == [(0.0, 0.000316), (0.0, 0.0316)] and not halved.exhausted


def test_an_option_is_tried_where_it_is_known(some_drawings: str) -> None:
    options = {
        "method_options.alpha": [0.1, 0.5],
        "optimizer_options.eps_adam": [1e-8, 1e-4],
        "classifier_options.amount": [0.0, 0.2],
    }
    blocks = [
        {"method": ["ease", "aper-adapter"], "optimizer": ["zo-sgd", "zo-adam"]},
        {"method": "ease", "optimizer": "zo-sgd", "classifier": "lda", "classifier_options": {"shrinkage": "fixed"}},
    ]
    plan = planned(some_drawings, options, *blocks, lr=[0.1])
    known = [
        (
            one.when["method"],
            one.when["optimizer"],
            one.when.get("classifier"),
            sorted(name.split(".")[1] for name in one.options),
        )
        for one in plan.searches
    ]
    assert known == [
        ("ease", "zo-sgd", None, ["alpha"]),
        ("ease", "zo-adam", None, ["alpha", "eps_adam"]),
        ("aper-adapter", "zo-sgd", None, []),
        ("aper-adapter", "zo-adam", None, ["eps_adam"]),
        ("ease", "zo-sgd", "lda", ["alpha", "amount"]),
    ]
    assert [len(one.candidates) for one in plan.searches] == [2, 4, 1, 2, 4]


def test_strings_and_truth_values_are_tried_and_two_spellings_of_one_value_once(some_drawings: str) -> None:
    options = {
        "optimizer_options.nesterov": [False, True],
        "optimizer_options.distribution": ["gaussian", "rademacher"],
    }
    block = {"optimizer": "zo-sgd", "optimizer_options": {"momentum": 0.9}}
    (search,) = planned(some_drawings, options, block, lr=[0.1]).searches
    tried = [tuple(c.options.values()) for c in search.candidates]
    assert tried == [(False, "gaussian"), (True, "gaussian"), (False, "rademacher"), (True, "rademacher")]
    # 12 each: nothing is paid twice.
    (search,) = planned(some_drawings, {MOMENTUM: [0, 0.0, 0.9, 0.9]}, lr=[0.1], forward_passes=24).searches
    assert [c.options[MOMENTUM] for c in search.candidates] == [0, 0.9] and search.exhausted


@pytest.mark.slow
def test_an_option_that_takes_forward_passes_is_paid_for(some_drawings: str, tmp_path: Path) -> None:
    options = {"optimizer_options.snapshot_every": [4, 50]}
    few, many = 6 * 4 + 3 * 2, 6 * 4 + 2 * 3 * 2  # a snapshot is a pair for each of 3 mini-batches
    for budget, costs in ((many + few, [many, few]), (many + few - 1, [many])):
        (search,) = planned(some_drawings, options, {"optimizer": "zo-svrg"}, lr=[1e-4], forward_passes=budget).searches
        assert [candidate.cost for candidate in search.candidates] == costs
    plan = planned(some_drawings, options, {"optimizer": "zo-svrg"}, lr=[1e-4])
    (search,), store = plan.searches, Store(tmp_path)
    results = [run_trial(config) for config in plan.candidates.cells]
    for result in results:
        store.write(tables(result))
    spent = [result.summary["forward_equivalents"] for result in results]
    assert [row["forward_equivalents"] for row in found_by(store, plan).rows] == spent
    assert spent == [many, few] and f"2 tries of {few} to {many}, {few + many} in all" in search.describe()
    assert "optimizer_options.snapshot_every 4, 50; no more values to try" in search.describe()


def test_cells_that_differ_in_a_searched_option_are_searched_together(some_drawings: str) -> None:
    block = {"optimizer": "zo-sgd", MOMENTUM: [0.0, 0.9], "optimizer_options.sparsity": [0.0, 0.5], "seed": [0, 1]}
    plan = planned(some_drawings, {MOMENTUM: [0.0, 0.9]}, block)
    when = {"dataset": some_drawings, "method": "ease", "optimizer": "zo-sgd"}
    assert [(len(one.cells), one.when) for one in plan.searches] == [
        (4, {**when, "optimizer_options.sparsity": share}) for share in (0.0, 0.5)
    ]
    # Whatever a cell itself says of the option, the search is the same one.
    alone = [
        planned(some_drawings, {MOMENTUM: [0.0, 0.9]}, {"optimizer": "zo-sgd", MOMENTUM: own})
        for own in (0.0, 0.9, 0.5)
    ]
    assert len({one.searches[0].search_id("g") for one in alone}) == 1
    assert len({tuple(config.cell_id for config in one.candidates.cells) for one in alone}) == 1
    more, other, none = (
        planned(some_drawings, options).searches[0].search_id("g")
        for options in ({MOMENTUM: [0.9, 0.5]}, {BOTTLENECK: [4]}, None)
    )
    first = alone[0].searches[0].search_id("g")
    assert first == more and len({first, other, none}) == 3, "of other options: another search"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table1", "families", "figure6", "blackbox", "nondifferentiable"])
def test_committed_searches_are_planned_chosen_and_written_as_they_were(tmp_path: Path, name: str) -> None:
    shutil.copytree(ROOT / "results" / f"{name}_quickdraw_search", tmp_path / "store")
    store = Store(tmp_path / "store")
    before = load(store, "searches")
    rows = before.to_pylist()
    assert {row["options"] for row in rows} == {None}
    plan = plan_search(load_grid(ROOT / "sweeps" / f"{name}_quickdraw.yaml"), None)
    for row in rows:
        # The formula of an id, with what was in common then.
        search = dataclasses.replace(plan.searches[0], shared=json.loads(row["shared"]))
        assert search.search_id(row["search"]) == row["search_id"]
    write(outcomes(plan, store), store)
    after = load(store, "searches")
    assert after.drop_columns("shared").equals(before.drop_columns("shared")), "in place of the earlier run"
    assert "options" not in render_searches(search_rows(rows))


def test_patterns_and_conditions_say_what_is_searched(some_drawings: str) -> None:
    search = {
        "forward_passes": 90,
        "when": {"method": "ease"},
        "eps": {"zo-adam": [0.1]},
        "lr": {"zo-*": {"from": 1e-3, "to": 1e-1}, "zo-adam": [0.5, 0.25]},
    }
    block = {"method": ["ease", "aper-adapter"], "optimizer": ["fo-sgd", "zo-sgd", "zo-adam"]}
    plan = plan_search(grid_of(some_drawings, search, block), None)
    sgd, adam = plan.searches
    assert [(c.lr, c.eps) for c in sgd.candidates][:3] == [(0.01, 1e-3), (0.001, 1e-3), (0.1, 1e-3)]
    assert [(c.lr, c.eps) for c in adam.candidates] == [(0.5, 0.1), (0.25, 0.1)] and adam.exhausted
    assert (sgd.eps, adam.eps, plan.kept) == (False, True, 4)
    assert "no more values to try" in plan.describe() and "4 cells are not searched" in plan.describe()
    assert isinstance(plan.settings.lr_of("zo-adam"), Listed) and plan.settings.lr_of("fo-sgd") is None


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"lr": {"zo-sdg": [0.1]}}, "search: lr: unknown optimizer 'zo-sdg'; did you mean 'zo-sgd'"),
        ({"lr": {"from": 1.0, "to": 0.1}}, "lr: from=1 is not below to=0.1; did you mean {from: 0.1, to: 1}"),
        ({"lr": {"zo-*": {"from": 1.0, "till": 2}}}, r"lr: zo-\*: expected {from: LOW, to: HIGH}"),
        ({"lr": [0.1, -1]}, "lr: expected {from: LOW, to: HIGH} or a list of numbers > 0"),
        ({"lr": {"zo-*": "0.1"}}, "expected {from: LOW"),
        ({"eps": {"from": 1, "to": 2}}, "eps: expected a list of numbers > 0"),
        ({"forward_passes": 0}, "forward_passes=0: expected an integer >= 1"),
        ({"forward_passes": None}, "forward_passes=None: expected an integer"),
        ({"validation": 1.0}, "validation=1.0: expected a share between 0 and 1"),
        ({"validation": 0}, "validation=0: expected a share"),
        ({"seeds": [1, 1]}, "seeds=.*different integers"),
        ({"seeds": []}, "seeds="),
        ({"seeds": [True]}, "seeds="),
        ({"queries": "all"}, "queries='all': expected an integer >= 1, or 'each'"),
        ({"when": {"metod": "ease"}}, "when: unknown key 'metod'"),
        ({"budget": 5}, "search: unknown key 'budget'"),
        (
            {"options": {"momentum": [0.9]}},
            "options: 'momentum': expected method_options.NAME or optimizer_options.NAME or",
        ),
        (
            {"options": {"optimizer_options": {"momentum": [0.9]}}},
            "options: 'optimizer_options': expected method_options.NAME",
        ),
        ({"options": {"optimizer_options.": [0.9]}}, "options: 'optimizer_options.': expected"),
        (
            {"options": {"optimiser_options.momentum": [0.9]}},
            "unknown section 'optimiser_options'; did you mean 'optimizer_options'",
        ),
        ({"options": {"preprocessing.mean": [0.5]}}, "options: preprocessing.mean: unknown section 'preprocessing'"),
        ({"options": {MOMENTUM: []}}, r"options: optimizer_options.momentum: expected a list of numbers, .*, got \[\]"),
        ({"options": {MOMENTUM: 0.9}}, "options: optimizer_options.momentum: expected a list of numbers.*, got 0.9"),
        ({"options": {MOMENTUM: [[0.9]]}}, "options: optimizer_options.momentum: expected a list of numbers"),
        ({"options": [MOMENTUM]}, "options: expected names such as optimizer_options.momentum with lists"),
        ({"options": {}}, "options: expected names such as"),
        (
            {"options": {MOMENTUM: [0.9]}, "when": {MOMENTUM: 0.0}},
            f"when: {MOMENTUM} is searched, so no condition can be on it",
        ),
        ({"options": {MOMENTUM: [0.9]}, "when": {"optimizer_options": {}}}, f"when: {MOMENTUM} is searched"),
    ],
    ids=str,
)
def test_a_bad_search_section_is_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_grid({"grid": [{}], "search": {"forward_passes": 100, **search}}, where="g.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer_options.momentun": [0.9]},
            "unknown option in optimizer_options 'momentun'; did you mean 'momentum'",
        ),
        (
            {"method_options.momentum": [0.9]},
            "unknown option 'method_options.momentum'; did you mean 'optimizer_options.momentum'",
        ),
        ({"optimizer_options.betas": [0.9]}, "unknown option in optimizer_options 'betas'"),  # zo-adam's, not searched
        ({"classifier_options.ridge": [1.0]}, "unknown option in classifier_options 'ridge'; known: none"),
        ({BOTTLENECK: [4, 0]}, "options: some-drawings ease zo-sgd: method_options: bottleneck=0"),
        ({MOMENTUM: [0.9, "much"]}, "options: some-drawings ease zo-sgd: .*momentum='much'"),
        ({MOMENTUM: [0.9, None]}, "options: some-drawings ease zo-sgd: .*momentum=None"),
    ],
    ids=str,
)
def test_an_option_that_no_searched_cell_can_have_is_refused(
    some_drawings: str, options: dict[str, Any], message: str
) -> None:
    block = {"optimizer": ["zo-sgd", "zo-adam"]}
    with pytest.raises(ConfigError, match="grid grid: search: .*" + message):
        # The budget pays for one try: values beyond it are looked at too.
        planned(some_drawings, options, block, when={"optimizer": "zo-sgd"}, forward_passes=12)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        search = {"validation": 2, "lr": {"a": [1], "zo-sgd": [0]}, "eps": [], "options": {"a": [1], MOMENTUM: []}}
        parse_grid({"grid": [{}], "search": search})
    assert [line.split(":")[2].split("=")[0].strip() for line in str(error.value).splitlines()] == [
        "forward_passes",
        "validation",
        "lr",
        "lr",
        "eps",
        "options",
        "options",
    ]


def test_a_budget_that_pays_for_no_try_says_for_whom_and_how_much_it_takes(some_drawings: str) -> None:
    block = {"optimizer": ["fo-sgd", "zo-sgd", "zo-sgd-conserve"]}
    with pytest.raises(ConfigError) as error:
        plan_search(grid_of(some_drawings, {"forward_passes": 17}, block), None)
    text = str(error.value)
    assert "forward_passes=17 does not pay for one try" in text
    assert "ease fo-sgd needs 18" in text and "ease zo-sgd-conserve needs 30" in text and "zo-sgd needs" not in text


def test_a_search_of_nothing_and_with_the_seeds_of_the_grid_is_refused(some_drawings: str) -> None:
    with pytest.raises(ConfigError, match=r"seeds=\[100\]: the grid's own cells use \[100\]"):
        plan_search(grid_of(some_drawings, {"forward_passes": 99}, {"seed": [0, 100]}), None)
    with pytest.raises(ConfigError, match="no cell that trains"):
        plan_search(grid_of(some_drawings, {"forward_passes": 99}, {"method": "simplecil"}), None)
    with pytest.raises(ConfigError, match="no such section"):
        plan_search(parse_grid({"grid": [{}]}), None)


# The choice


def made_up(
    store: Store, config: TrialConfig, accuracy: float, *last_losses: float | None, n: int | None = None
) -> None:
    """A finished cell with an accuracy and the losses of its last epoch; in the first epoch all losses were low."""
    now = datetime(2026, 1, 2, tzinfo=UTC)
    trial = {"cell_id": config.cell_id, "schema_version": 1, "last": accuracy, "finished_at": now}
    steps = [(0, 0.001), *((config.epochs - 1, loss) for loss in last_losses)]
    rows = [{"cell_id": config.cell_id, "epoch": epoch, "loss": loss} for epoch, loss in steps]
    stages = [{"cell_id": config.cell_id, "stage": 0, "n": n}] if n else []
    store.write(
        {
            "trials": pa.Table.from_pylist([trial], SCHEMAS["trials"]),
            "steps": pa.Table.from_pylist(rows, SCHEMAS["steps"]),
            **({"stages": pa.Table.from_pylist(stages, SCHEMAS["stages"])} if stages else {}),
        }
    )


def three_tries(dataset: str, **search: Any) -> SearchPlan:
    """Of zo-sgd: lr 0.3, 0.1 and 0.2."""
    settings = {"forward_passes": 100, "lr": [0.3, 0.1, 0.2], **search}
    return plan_search(grid_of(dataset, settings, {"optimizer": "zo-sgd"}), None)


def found_by(store: Store, plan: SearchPlan) -> SearchOutcome:
    (outcome,) = outcomes(plan, store)
    return outcome


@pytest.mark.parametrize(
    ("cells", "lr"),
    [
        ([(50, 1.0), (60, 9.0), (40, 0.1)], 0.1),  # accuracy comes first
        ([(50, 2.0), (50, 9.0), (50, 1.0)], 0.1),  # then the smaller lr, whatever the loss
        ([(50, 1.0), (40, 1.0), (50, 1.0)], 0.2),
        ([None, (40, 1.0), (30, 1.0)], 0.1),  # a failed one is out
        ([None, None, None], None),
    ],
)
def test_the_best_accuracy_wins_then_the_smaller_lr(
    some_drawings: str, tmp_path: Path, cells: list[Any], lr: float | None
) -> None:
    store, plan = Store(tmp_path), three_tries(some_drawings)
    for config, result in zip(plan.candidates.cells, cells, strict=True):
        assert outcomes(plan, store) == [], "not before all candidates have ended"
        if result is None:
            store.write_failure(failure(config, "NonFiniteLoss", "diverged", "", 1))
        else:
            made_up(store, config, *result)
    outcome = found_by(store, plan)
    assert (outcome.chosen and outcome.chosen.lr) == lr
    if lr is not None:
        when = {"dataset": some_drawings, "method": "ease", "optimizer": "zo-sgd"}
        assert outcome.rule == {"when": when, "set": {"lr": lr}}
    write([outcome], store)
    rows = {row["lr"]: row for row in load(store, "searches").to_pylist()}
    assert [row["candidate"] for row in rows.values()] == [0, 1, 2] and list(rows) == [0.3, 0.1, 0.2]
    assert {row["lr"] for row in rows.values() if row["chosen"]} == ({lr} if lr else set())
    assert [row["error"] for row in rows.values()] == ["NonFiniteLoss" if c is None else None for c in cells]
    assert [row["accuracy"] for row in rows.values()] == [c and c[0] for c in cells]
    assert {(row["budget"], row["forward_equivalents"], row["seed"]) for row in rows.values()} == {(100, 12, 100)}


@pytest.mark.parametrize(
    ("accuracies", "n", "lr", "level"),
    [
        # By lr: 0.3, 0.1, 0.2. One standard error of 80 % over 100 samples is 4 points, over 400 it is 2.
        ((80, 77, 79), 100, 0.1, 3),
        ((80, 75.9, 79), 100, 0.2, 2),
        ((80, 77, 79), 400, 0.2, 2),
        ((80, 77, 77.9), 400, 0.3, 1),
        ((50, 60, 60), 100, 0.1, 2),
    ],
)
def test_of_what_held_out_samples_cannot_tell_apart_the_smallest_lr_is_chosen(
    some_drawings: str, tmp_path: Path, accuracies: Sequence[float], n: int, lr: float, level: int
) -> None:
    store, plan = Store(tmp_path), three_tries(some_drawings)
    for config, accuracy in zip(plan.candidates.cells, accuracies, strict=True):
        made_up(store, config, accuracy, 1.0, n=n)
    outcome = found_by(store, plan)
    assert outcome.chosen and outcome.chosen.lr == lr
    (row,) = search_rows(outcome.rows)
    assert (row.level, row.best, row.lr) == (level, max(accuracies), lr)


def test_searches_of_one_name_say_what_tells_them_apart(some_drawings: str, tmp_path: Path) -> None:
    store, rows = Store(tmp_path), []
    for block in ({MOMENTUM: 0.0}, {MOMENTUM: 0.9}, {MOMENTUM: 0.9, "hybrid_epochs": 1}):
        plan = planned(some_drawings, None, {"optimizer": "zo-sgd", **block}, lr=[0.1])
        for config in plan.candidates.cells:
            made_up(store, config, 50, 1.0, n=100)
        rows += found_by(store, plan).rows
    assert sorted(row.setting for row in search_rows(rows)) == [
        "hybrid_epochs=0 momentum=0.9",
        "hybrid_epochs=0 momentum=default",
        "hybrid_epochs=1 momentum=0.9",
    ]
    text = render_searches(search_rows(rows))
    assert "| setting" in text and "hybrid_epochs=1 momentum=0.9" in text
    assert [row.setting for row in search_rows(rows[:1])] == [""]


def test_a_failed_first_candidate_leaves_the_standard_error_as_it_is(some_drawings: str, tmp_path: Path) -> None:
    store, plan = Store(tmp_path), three_tries(some_drawings)
    first, second, third = plan.candidates.cells
    store.write_failure(failure(first, "NonFiniteLoss", "diverged", "", 1))
    made_up(store, second, 77, 1.0, n=100)
    made_up(store, third, 80, 1.0, n=100)
    outcome = found_by(store, plan)
    assert outcome.chosen and outcome.chosen.lr == 0.1
    (row,) = search_rows(outcome.rows)
    assert (row.level, row.lr) == (2, 0.1)


@pytest.mark.parametrize(
    ("cells", "eps"),
    [
        ([(50, 1.0), (60, 9.0)], 1e-2),  # accuracy comes first
        ([(50, 2.0), (50, 1.0)], 1e-2),  # then the loss
        ([(50, 1.0, 3.0), (50, 3.0, 0.5)], 1e-2),  # its mean over the last epoch, not the last step
        ([(50, None), (50, 9.0)], 1e-2),  # no finite loss loses against any
        ([(50, 1.0), (50, 1.0)], 1e-3),  # then the smaller eps
    ],
)
def test_among_equal_lr_accuracy_loss_and_the_smaller_eps_decide(
    some_drawings: str, tmp_path: Path, cells: list[Any], eps: float
) -> None:
    store, plan = Store(tmp_path), three_tries(some_drawings, lr=[0.1], eps=[1e-3, 1e-2])
    for config, result in zip(plan.candidates.cells, cells, strict=True):
        made_up(store, config, *result)
    outcome = found_by(store, plan)
    assert outcome.chosen and outcome.chosen.eps == eps


@pytest.mark.parametrize(
    ("cells", "chosen"),
    [
        # In the order of the tries: lr 0.3 and 0.1 with momentum 0.9, then both with 0.0. Of 80 % over 100 samples: 4 points.
        ([(80, 1.0), (77, 1.0), (60, 1.0), (70, 1.0)], (0.1, 0.9)),  # level with the best: the smaller lr
        ([(80, 1.0), (77, 0.1), (60, 1.0), (78, 9.0)], (0.1, 0.0)),  # at that lr the accuracy
        ([(80, 1.0), (78, 2.0), (60, 1.0), (78, 1.0)], (0.1, 0.0)),  # then the loss
        ([(80, 1.0), (78, 1.0), (60, 1.0), (78, 1.0)], (0.1, 0.9)),  # then the order
        ([(80, 1.0), (75, 1.0), (79, 1.0), (75, 1.0)], (0.3, 0.9)),
        ([(60, 1.0), None, (80, 1.0), None], (0.3, 0.0)),  # failed ones are out
        ([None, None, None, None], None),
    ],
)
def test_options_are_chosen_at_the_smallest_lr_that_is_level_with_the_best(
    some_drawings: str, tmp_path: Path, cells: list[Any], chosen: tuple[float, float] | None
) -> None:
    store, plan = Store(tmp_path), planned(some_drawings, {MOMENTUM: [0.9, 0.0]})
    for config, result in zip(plan.candidates.cells, cells, strict=True):
        if result is None:
            store.write_failure(failure(config, "NonFiniteLoss", "diverged", "", 1))
        else:
            made_up(store, config, *result, n=100)
    outcome = found_by(store, plan)
    write([outcome], store)
    rows = load(store, "searches").to_pylist()
    assert [(row["lr"], json.loads(row["options"])) for row in rows] == [
        (lr, {MOMENTUM: momentum}) for momentum in (0.9, 0.0) for lr in (0.3, 0.1)
    ]
    assert [(row["lr"], json.loads(row["options"])[MOMENTUM]) for row in rows if row["chosen"]] == (
        [chosen] if chosen else []
    )
    (row,) = search_rows(rows)
    assert (row.tries, row.failed) == (4, sum(result is None for result in cells))
    if chosen is None:
        assert row.options == {} and row.options_text is None
        return
    lr, momentum = chosen
    assert outcome.rule["set"] == {"lr": lr, MOMENTUM: momentum} and row.options == {MOMENTUM: momentum}
    accuracies = {(r["lr"], json.loads(r["options"])[MOMENTUM]): r["accuracy"] for r in rows}
    assert row.accuracy == accuracies[chosen]
    beside = accuracies[0.3 if lr == 0.1 else 0.1, momentum]
    assert (row.lower, row.higher) == ((None, beside) if lr == 0.1 else (beside, None)), "with the same options"


def test_tables_have_a_column_of_options_where_any_were_searched(some_drawings: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    options = {MOMENTUM: [0.9], "optimizer_options.nesterov": [True], BOTTLENECK: [4]}
    plain, with_options = three_tries(some_drawings), planned(some_drawings, options, lr=[0.4])
    for plan in (plain, with_options):
        for config in plan.candidates.cells:
            made_up(store, config, 50, 1.0)
        write(outcomes(plan, store), store)
    table = load(store, "searches")
    text = render_searches(search_rows(table.to_pylist()))
    header, _, *lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    place = [head.strip() for head in header].index("options")
    assert sorted(line[place].strip() for line in lines) == ["-", "bottleneck=4 momentum=0.9 nesterov=True"]
    assert "options" not in render_searches(search_rows(outcomes(plain, store)[0].rows))


def test_over_seeds_the_means_count(some_drawings: str, tmp_path: Path) -> None:
    store, plan = Store(tmp_path), three_tries(some_drawings, seeds=[7, 8])
    for candidate, (first, second) in zip(
        plan.searches[0].candidates, [(90, 10), (60, 50), (0.1 + 0.2, 100)], strict=True
    ):
        made_up(store, candidate.cells[0], first, 1.0)
        made_up(store, candidate.cells[1], second, 1.0)
    outcome = found_by(store, plan)
    assert outcome.chosen and outcome.chosen.lr == 0.1
    assert [row["chosen"] for row in outcome.rows] == [False, False, True, True, False, False]
    (row,) = search_rows(outcome.rows)
    assert (row.accuracy, row.lower, row.higher) == (55.0, None, pytest.approx(50.15))


def test_the_table_says_where_the_best_lies(some_drawings: str, tmp_path: Path) -> None:
    plan = three_tries(some_drawings)

    def table(name: str, *accuracies: float) -> Any:
        store = Store(tmp_path / name)
        for config, accuracy in zip(plan.candidates.cells, accuracies, strict=True):
            made_up(store, config, accuracy, 1.0)
        (row,) = search_rows(found_by(store, plan).rows)
        return row

    inside, edge, flat = table("a", 30, 40, 50), table("b", 30, 50, 40), table("c", 50, 50, 50)
    assert (inside.lr, inside.lower, inside.higher, inside.edge) == (0.2, 40, 30, None)
    assert (edge.lr, edge.lower, edge.higher, edge.edge) == (0.1, None, 40, "lowest")
    assert (flat.lr, flat.level, flat.tries, flat.spent, flat.budget) == (0.1, 3, 3, 36, 100)
    text = render_searches([inside, edge])
    assert "50.00 (40.00, 30.00)" in text and "lowest lr tried: widen the range" in text
    lines = text.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1 and len({line.count("|") for line in lines[:4]}) == 1


def test_a_search_is_one_file_replaced_as_a_whole_and_merged(some_drawings: str, tmp_path: Path) -> None:
    small, large = three_tries(some_drawings, forward_passes=24), three_tries(some_drawings)
    store = Store(tmp_path / "one")
    for config, accuracy in zip(large.candidates.cells, (50, 40, 60), strict=True):
        made_up(store, config, accuracy, 1.0)
    write([found_by(store, small)], store)
    assert [row["chosen"] for row in load(store, "searches").to_pylist()] == [True, False]
    write([found_by(store, large)], store)
    rows = load(store, "searches").to_pylist()
    assert [row["chosen"] for row in rows] == [False, False, True] and {row["budget"] for row in rows} == {100}
    (file,) = (tmp_path / "one" / "searches").iterdir()
    assert file.stem == rows[0]["search_id"]
    assert merge(tmp_path / "two", store) == 3 and merge(tmp_path / "two", store) == 0
    assert load(tmp_path / "two", "searches").equals(load(store, "searches"))


# The grid file's text

HEAD = "# head\nbase: {tasks: 5}   # five\ngrid:\n  - {optimizer: [fo-sgd, zo-sgd]}\n"
RULES = [
    {"when": {"dataset": "quickdraw100", "method": "ease", "optimizer": "zo-sgd"}, "set": {"lr": 3e-05, "eps": 0.01}},
    {"when": {"dataset": "quickdraw100", "method": "ease", "optimizer": "fo-sgd"}, "set": {"lr": 1.0}},
]
SOME = "settings:\n  - {when: {optimizer: zo-sgd}, set: {lr: 0.5}}   # mine\n"


@pytest.mark.parametrize(
    "text",
    [
        HEAD,
        HEAD.rstrip("\n"),
        HEAD + SOME,
        (HEAD + SOME).rstrip("\n"),
        SOME + "\n# what is below\n\n" + HEAD + "# the end\n",
        HEAD + SOME.replace("  - ", "- ") + "# behind\nname: x\n",
        HEAD + "settings:   # none yet\n  # - a comment\nname: x\n",
        HEAD + "settings:\n    - when:\n        optimizer: zo-sgd\n      set:\n        lr: 0.5\n\n    # last words\n",
        (HEAD + SOME + "name: \u00e9\u2028\n").replace("\n", "\r\n"),
    ],
)
def test_chosen_values_go_into_the_settings_and_all_else_stays(tmp_path: Path, text: str) -> None:
    file = tmp_path / "g.yaml"
    file.write_bytes(text.encode())
    assert write_chosen(file, RULES) is True
    after = file.read_bytes().decode()
    begin = after.index(BEGIN)
    begin = after.rindex("\n", 0, begin) + 1
    end = after.index("\n", after.index(END)) + 1
    newline = "\r\n" if "\r\n" in text else "\n"
    rest, start = after[:begin] + after[end:], text if text.endswith(newline) else text + newline
    assert rest == (start if "settings" in text else f"{start}{newline}settings:{newline}")
    assert after.count("\n") == after.count(newline)
    cells = {cell.optimizer: cell for cell in load_grid(file).cells}
    assert (cells["zo-sgd"].lr, cells["zo-sgd"].eps, cells["fo-sgd"].lr) == (3e-05, 0.01, 1.0)
    assert write_chosen(file, RULES) is False, "again: nothing changes"
    assert file.read_bytes().decode() == after
    # Another search of some of the cells replaces what it chose and leaves the rest.
    new = [{**RULES[1], "set": {"lr": 0.25}}]
    write_chosen(file, new)
    assert file.read_bytes().decode() == after.replace("{lr: 1.0}", "{lr: 0.25}")


@pytest.mark.slow
def test_chosen_options_hold_when_the_file_is_read_again(some_drawings: str, tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    text = f"""
base: {{checkpoint: none, tasks: 4, epochs: 2, batch_size: 16, image_size: 14, dataset: {some_drawings}}}
grid:
  - {{method: [ease, shared-adapter], optimizer: zo-sgd, optimizer_options.momentum: [0.5, 0.9], seed: [0, 1]}}
settings:
  - {{when: {{method: ease}}, set: {{method_options.bottleneck: 8}}}}
search:
  forward_passes: 1000
  lr: [0.1]
  options:
    OPTIONS
"""
    first = "optimizer_options.momentum: [0.0, 0.5]\n    optimizer_options.distribution: [gaussian, rademacher]"
    file.write_text(text.replace("OPTIONS", first))
    plan = plan_search(load_grid(file), None)
    store = Store(tmp_path / "store")
    accuracy = {"ease": {"gaussian": 50, "rademacher": 60}, "shared-adapter": {"gaussian": 60, "rademacher": 50}}
    for candidate in plan.searches[0].candidates + plan.searches[1].candidates:
        (config,) = candidate.cells
        best = accuracy[config.method][candidate.options["optimizer_options.distribution"]]
        made_up(store, config, best - 10 * candidate.options[MOMENTUM], 1.0)
    assert write_chosen(file, [outcome.rule for outcome in outcomes(plan, store)])
    when = f"dataset: {some_drawings}, method: ease, optimizer: zo-sgd"
    chosen = "lr: 0.1, optimizer_options.momentum: 0.0, optimizer_options.distribution: rademacher"
    assert f"  - {{when: {{{when}}}, set: {{{chosen}}}}}\n" in file.read_text()
    cells = load_grid(file).cells
    assert [(c.method, c.seed, dict(c.optimizer_options), dict(c.method_options)) for c in cells] == [
        ("ease", 0, {"distribution": "rademacher"}, {"bottleneck": 8}),
        ("ease", 1, {"distribution": "rademacher"}, {"bottleneck": 8}),
        ("shared-adapter", 0, {}, {}),
        ("shared-adapter", 1, {}, {}),
    ], "momentum 0.0, the default, where the file's blocks say 0.5 and 0.9"
    # The same search again: the same candidates, and nothing to write.
    again = plan_search(load_grid(file), None)
    assert [c.cell_id for c in again.candidates.cells] == [c.cell_id for c in plan.candidates.cells]
    assert write_chosen(file, [outcome.rule for outcome in outcomes(again, store)]) is False
    # A search of something else is made with what was chosen before, which stays.
    file.write_text(file.read_text().replace(first, "method_options.bottleneck: [4, 16]"))
    other = plan_search(load_grid(file), None)
    assert {c.optimizer_options.get("distribution") for c in other.searches[0].candidates[0].cells} == {"rademacher"}
    for candidate in other.searches[0].candidates:
        made_up(store, candidate.cells[0], candidate.options[BOTTLENECK], 1.0)
    (outcome,) = outcomes(other, store)
    assert write_chosen(file, [outcome.rule])
    assert f"set: {{{chosen}, method_options.bottleneck: 16}}}}\n" in file.read_text()
    kept = {
        (c.method, c.method_options.get("bottleneck"), c.optimizer_options.get("distribution"))
        for c in load_grid(file).cells
    }
    assert kept == {("ease", 16, "rademacher"), ("shared-adapter", None, None)}


def test_what_cannot_be_placed_or_would_not_hold_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    block = f"settings:\n  {BEGIN}\n  {END}\n"
    for text, message in [
        (HEAD + "settings: [{when: {optimizer: zo-sgd}, set: {lr: 0.5}}]\n", "cannot be placed here.*--print"),
        ("{grid: [{optimizer: [fo-sgd, zo-sgd]}]}", "cannot be placed here"),
        (HEAD + block + "  - {when: {optimizer: zo-sgd}, set: {lr: 0.5}}\n", "would keep {'lr': 0.5}.*move it up"),
        (HEAD + f"settings:\n  {BEGIN}\n", "expected one line"),
        (HEAD + block + f"# {END}\n", "expected one line"),
    ]:
        file = tmp_path / "g.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            write_chosen(file, RULES)
        assert file.read_text() == text
    for momentum, other in ((0.0, 0.9), (0.5, 0.9), (0.9, 0.0)):
        text = HEAD + block + f"  - {{when: {{optimizer: zo-sgd}}, set: {{{MOMENTUM}: {other}}}}}\n"
        file.write_text(text)
        rule = {**RULES[0], "set": {"lr": 0.5, MOMENTUM: momentum}}
        with pytest.raises(ConfigError, match=f"would keep {{'{MOMENTUM}': {other}}}.*move it up"):
            write_chosen(file, [rule])
        assert file.read_text() == text
    assert write_chosen(file, [{**RULES[0], "set": {"lr": 0.5, MOMENTUM: 0.0}}]), "the same value may stand there"


def test_rules_tell_apart_what_was_searched_apart(tmp_path: Path) -> None:
    """Whatever else differs between cells, each gets what its own search chose, and cells that were not searched nothing."""
    text = """
base: {dataset: quickdraw100, tasks: 5}
grid:
  - {method: [ease, aper-adapter], optimizer: [zo-sgd, zo-adam], optimizer_options.sparsity: [0.0, 0.5], seed: [0, 1]}
  - {method: ease, optimizer: zo-sgd, transform: [plain, drawings], queries: [1, 8]}
  - {method: ease, optimizer: [zo-adam, fo-sgd], method_options: {alpha: 0.5}}
  - {method: ease, optimizer: fo-adam, optimizer_options: {betas: [0.5, 0.9]}}
  - {method: ease, optimizer: fo-adam, optimizer_options: {betas: [0.6, 0.9]}}
settings:
  - {when: {queries: ">= 8"}, set: {epochs: 2}}
search: {forward_passes: 10000, when: {method: ease}, eps: [1e-3, 1e-2], lr: {"*-sgd": [0.5], "*-adam": [0.25]}}
"""
    file = tmp_path / "g.yaml"
    file.write_text(text)
    plan = plan_search(load_grid(file), None)
    assert len(plan.searches) == 11
    wanted, rules = {}, []
    for number, one in enumerate(plan.searches):
        lr = (number + 1) / 64
        rules.append({"when": dict(one.when), "set": {"lr": lr}})
        for config in one.cells:
            wanted[dataclasses.replace(config, lr=lr).cell_id] = lr
    write_chosen(file, rules)
    after = {cell.cell_id: cell for cell in load_grid(file).cells}
    searched = {cell_id: cell.lr for cell_id, cell in after.items() if cell.method == "ease"}
    assert searched == wanted
    untouched = [cell for cell in after.values() if cell.method != "ease"]
    before = {cell.cell_id for cell in parse_grid(parse_yaml(text, "g")).cells}
    assert untouched and all(cell.cell_id in before for cell in untouched)


def test_rules_keep_any_text_and_number() -> None:
    rule = {"when": {"dataset": "a: b # {c}", "transform": [None, "x"]}, "set": {"lr": 1e-05, "eps": 3.16e20}}
    content = parse_yaml(with_chosen("grid: [{}]\n", [rule], "g"), "g")
    assert content["settings"] == [rule] and isinstance(content["settings"][0]["set"]["lr"], float)


# The command

SMALL = """# Two optimizers.
name: small
base: {checkpoint: none, image_size: 14, tasks: 5, epochs: 1, batch_size: 400, method: aper-adapter}
grid:
  - {optimizer: [fo-sgd, zo-sgd], seed: [0, 1]}

placement: {gpus_per_worker: 0, max_concurrent: 2}
search: {forward_passes: 18, lr: {fo-*: [0.1, 0.2], zo-*: {from: 1e-3, to: 1e-1}}, eps: [1e-2]}
"""


@pytest.mark.slow
def test_a_search_of_options_that_is_really_run(some_drawings: str, tmp_path: Path) -> None:
    options = {MOMENTUM: [0.0, 0.9], BOTTLENECK: [4, 16]}
    block = {"method": "aper-adapter", "optimizer": "fo-sgd"}
    plan = planned(some_drawings, options, block, lr=[0.5, 0.05], forward_passes=18 * 5)
    store, candidates = Store(tmp_path), plan.searches[0].candidates
    assert len(candidates) == 5 == len(plan.candidates.cells)
    for config in plan.candidates.cells:
        store.write(tables(run_trial(config)))
    outcome = found_by(store, plan)
    write([outcome], store)
    rows, trials = load(store, "searches").to_pylist(), load(store, "trials")
    ran = {row["cell_id"]: row for row in trials.to_pylist()}
    assert len(rows) == len(ran) == 5
    for row in rows:
        trial, values = ran[row["cell_id"]], json.loads(row["options"])
        assert row["forward_equivalents"] == trial["forward_equivalents"] == 6 * 3
        assert json.loads(trial["method_options"]) == {"bottleneck": values[BOTTLENECK]}
        assert json.loads(trial["optimizer_options"] or "{}") == ({"momentum": 0.9} if values[MOMENTUM] else {})
    # The rule, spelled out: one standard error over 15 held-out drawings.
    best = max(row["accuracy"] for row in rows) / 100
    least = 100 * (best - math.sqrt(best * (1 - best) / 15))
    level = [
        (row["lr"], -row["accuracy"], row["final_loss"], row["candidate"]) for row in rows if row["accuracy"] >= least
    ]
    chosen = candidates[min(level)[-1]]
    assert outcome.chosen is chosen and outcome.rule["set"] == {"lr": chosen.lr, **chosen.options}
    (table,) = (
        one for one in make_tables({"trials": trials, "searches": load(store, "searches")}) if one.name == "searches"
    )
    shown = table.lines[0].cells[table.headings.index("options")]
    assert json.loads(shown.value) == chosen.options
    assert shown.text == f"bottleneck={chosen.options[BOTTLENECK]} momentum={chosen.options[MOMENTUM]:g}"


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    run = CliRunner().invoke(main, ["search", str(file), "--results", str(tmp_path / "r"), "--dry-run"])
    assert run.exit_code == 0, run.output
    assert "aper-adapter fo-sgd: 2 tries of 9, 18 in all; lr 0.1 to 0.2; no more values to try" in run.output
    assert "aper-adapter zo-sgd: 3 tries of 6, 18 in all; lr 0.001 to 0.1; eps 0.01" in run.output
    assert "5 cells: 0 done, 0 failed, 5 to run" in run.output and "estimate: none yet" in run.output
    assert file.read_text() == SMALL and [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_data_that_is_not_here_is_named(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("grid: [{dataset: [cub, quickdraw100]}]\nsearch: {forward_passes: 100000}\n")
    run = CliRunner().invoke(main, ["search", str(file), "--data-dir", str(tmp_path), "--dry-run"])
    assert run.exit_code == 0, run.output
    assert "cub: 1 cells wait for their data set" in run.output and "1 searches of 100,000" in run.output


def test_what_is_wrong_with_several_data_sets_is_said_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for part in ("train", "test"):
            (tmp_path / name / part / "empty class").mkdir(parents=True)
    blocks = {"dataset": ["folder:one", "folder:two"], "tasks": 1}
    with pytest.raises(ConfigError) as error:
        plan_search(parse_grid({"grid": [blocks], "search": {"forward_passes": 100}}), str(tmp_path))
    assert "folder:one" in str(error.value) and "folder:two" in str(error.value)


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_search_chooses_writes_and_never_runs_a_cell_twice(tmp_path: Path, sweep_here) -> None:
    file, results = tmp_path / "small.yaml", tmp_path / "results"
    file.write_text(SMALL)
    search = partial(sweep_here, "search", file, "--results", results)
    first = search()
    assert first.exit_code == 0, first.output
    rows = load(results, "searches").to_pylist()
    trials = {row["cell_id"]: row for row in load(results, "trials").to_pylist()}
    assert len(rows) == len(trials) == 5
    for row in rows:
        trial = trials[row["cell_id"]]
        assert (trial["validation"], trial["stop_after"], trial["seed"]) == (0.25, 1, 100)
        assert (row["accuracy"], row["lr"], row["eps"]) == (trial["last"], trial["lr"], trial["eps"])
        assert row["forward_equivalents"] == trial["forward_equivalents"]
        assert math.isfinite(row["final_loss"])
    chosen = {row["optimizer"]: row for row in rows if row["chosen"]}
    for name, row in chosen.items():
        others = [other for other in rows if other["optimizer"] == name]
        assert {other["n"] for other in others} == {400}, "a quarter of 20 classes' 80 drawings"
        best = max(other["accuracy"] for other in others) / 100
        level = [o for o in others if o["accuracy"] >= 100 * (best - math.sqrt(best * (1 - best) / 400))]
        assert (row["lr"], -row["accuracy"]) == min((o["lr"], -o["accuracy"]) for o in level)
    for cell in load_grid(file).cells:
        assert cell.lr == chosen[cell.optimizer]["lr"] and cell.eps == chosen[cell.optimizer]["eps"]
    text = file.read_text()
    assert text.startswith(SMALL), "what was there stays as it was"
    kept = {path: path.read_bytes() for path in results.rglob("*.parquet")}

    again = search()
    assert again.exit_code == 0 and "5 done, 0 failed, 0 to run" in again.stdout and "Ray" not in again.stdout
    assert "holds the chosen values already" in again.stdout and file.read_text() == text
    assert {path: path.read_bytes() for path in results.rglob("*.parquet")} == kept

    printed = search("--print")
    assert printed.exit_code == 0 and f"optimizer: zo-sgd}}, set: {{lr: {chosen['zo-sgd']['lr']}" in printed.stdout
