"""What a search's budget pays for: equal budgets, held-out data, which candidates of lr, eps and options."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT
from searches import BOTTLENECK, MOMENTUM, found_by, grid_of, planned

from zeroflow import run_trial
from zeroflow.data import ImageDataset, load_dataset
from zeroflow.data.dataset import datasets, register_dataset
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import load_grid
from zeroflow.grid.rules import matches
from zeroflow.grid.search_plan import plan_search
from zeroflow.grid.search_selection import outcomes, write
from zeroflow.grid.search_settings import Between, Listed
from zeroflow.optim import list_optimizers
from zeroflow.results import Store, load
from zeroflow.results.rows import tables
from zeroflow.results.searches import render_searches, search_rows


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
        ("ease", "zo-sgd", "class-means", ["alpha"]),
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
    ("blocks", "when"),
    [
        ([{"queries": 1}, {"queries": 8}], {"queries": 1}),
        ([{"queries": [1, 2, 8, 16]}], {"queries": "> 4"}),
        ([{"seed": [0, 1, 2]}], {"seed": [0, 2]}),
        ([{"stop_after": [None, 2]}], {"stop_after": 2}),
        ([{"stop_after": [None, 2]}], {"stop_after": 4}),
        ([{"validation": [0.0, 0.5]}], {"validation": 0}),
        ([{}, {"later": {"task": 2, "epochs": 1}}], {"later.task": 2}),
        ([{"eps": [1e-3, 1e-2], "queries": [1, 4]}], {"eps": 1e-2, "queries": 4}),
        ([{"method_options.scale": [0.05, 0.1, 0.5]}], {"method_options.scale": [0.1, 0.5]}),
        ([{"epochs": [2, 4], "queries": [1, 4]}], {"epochs": 2, "queries": 4}),
        ([{"tasks": 4}, {"increments": [[5, 5, 5, 5], [10, 5, 5]]}], {"tasks": 4}),
        ([{"tasks": 3, "base_classes": 10}, {"increments": [[10, 5, 5]]}, {"tasks": 5}], {}),
    ],
)
def test_a_search_gives_values_to_the_cells_that_meet_its_condition_alone(
    blocks: list[dict[str, Any]], when: dict[str, Any], some_drawings: str
) -> None:
    own = [{"method": "ease", "optimizer": "zo-sgd", "lr": 0.007, **block} for block in blocks]
    grid = grid_of(some_drawings, {"forward_passes": 10**6, "lr": [0.3, 0.1], "when": when}, *own)
    wanted = {config.cell_id for config in grid.cells if matches(vars(config), when)}
    plan = plan_search(grid, None)
    assert {config.cell_id for search in plan.searches for config in search.cells} == wanted
    assert plan.kept == len(grid.cells) - len(wanted)
    rules = [{"when": dict(search.when), "set": {"lr": 0.1}} for search in plan.searches]
    tuned = grid_of(some_drawings, {"forward_passes": 10**6}, *own, settings=rules)
    for before, after in zip(grid.own, tuned.own, strict=True):
        assert after[0].lr == (0.1 if before[0].cell_id in wanted else 0.007), after[0].label()


@pytest.mark.parametrize("name", ["lr", "eps"])
def test_a_condition_on_what_is_searched_is_refused(name: str, some_drawings: str) -> None:
    search = {"forward_passes": 10**6, "lr": [0.3, 0.1], "eps": [1e-3], "when": {name: 0.01}}
    with pytest.raises(ConfigError, match=f"search: when: {name} is searched, so no condition can be on it"):
        grid_of(some_drawings, search, {"optimizer": "zo-sgd"})
