"""Searches that are refused, with the key, the value and what to do."""

from __future__ import annotations

from typing import Any

import pytest
from searches import BOTTLENECK, MOMENTUM, grid_of, planned

from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import parse_grid
from zeroflow.grid.search_plan import plan_search


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
