"""Conditions of a grid's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import load_grid, parse_grid, parse_override
from zeroflow.grid.plan import make_plan
from zeroflow.grid.readings import keys_of
from zeroflow.grid.rules import check_when, matches
from zeroflow.results import Store


@pytest.mark.parametrize(
    ("wanted", "matching"),
    [
        (8, {8}),
        ("< 8", {1, 4}),
        ("<= 8", {1, 4, 8}),
        ("> 8", {32}),
        (">=8", {8, 32}),
        ("!= 8", {None, 1, 4, 32}),
        (">= 1e0", {1, 4, 8, 32}),
        (["< 4", ">= 32", None], {1, 32, None}),
        ([1, "> 8"], {1, 32}),
        (None, {None}),
    ],
)
def test_comparisons_and_lists(wanted: Any, matching: set[int | None]) -> None:
    check_when({"queries": wanted}, "rule")
    # A first-order optimizer has no queries, whatever a cell says of them.
    cells = {
        queries: keys_of({"optimizer": "zo-sgd" if queries else "fo-sgd", "queries": queries or 8})
        for queries in (None, 1, 4, 8, 32)
    }
    assert {queries for queries, cell in cells.items() if matches(cell, {"queries": wanted})} == matching


def test_every_key_must_match_and_defaults_and_options_count() -> None:
    when = {"epochs": ">= 10", "optimizer_options.momentum": "> 0.5", "method": ["ease", "aper-adapter"]}
    check_when(when, "rule")

    def fits(when: dict[str, Any], **values: Any) -> bool:
        return matches(keys_of(values), when)

    assert fits(when, optimizer_options={"momentum": 0.9}), "epochs are 10 where a cell does not say"
    assert not fits(when, optimizer_options={"momentum": 0.9}, epochs=9)
    assert not fits(when, optimizer_options={"momentum": 0.5})
    assert not fits(when), "momentum is 0 where a cell does not say"
    assert fits({"optimizer_options.nesterov": "!= 2"}, optimizer_options={"nesterov": True, "momentum": 0.9})
    assert not fits({"optimizer_options.nesterov": "< 2"}, optimizer_options={"nesterov": True, "momentum": 0.9})


STREAM = {"method": "ease", "optimizer": "fo-sgd"}
SPELLINGS: list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = [
    # One meaning, other meanings beside it, and conditions that hold of the one alone.
    (
        {"method_options": {"bottleneck": 64}},
        {"method_options": {"bottleneck": 16}},
        [{"method_options.bottleneck": wanted} for wanted in (64, ">= 32", "!= 16", None)]
        + [{"method_options": {"bottleneck": 64}}, {"method_options": {}}],
    ),
    (
        {"optimizer_options": {"momentum": 0.0}},
        {"optimizer_options": {"momentum": 0.9}},
        [{"optimizer_options.momentum": 0}, {"optimizer_options.momentum": "< 0.5"}],
    ),
    ({"loss": "cross-entropy"}, {"loss": "error-rate"}, [{"loss": "cross-entropy"}, {"loss": None}]),
    ({"access": "white-box"}, {"access": "requests"}, [{"access": "white-box"}, {"access": None}]),
    ({"classifier": "class-means"}, {"classifier": "lda"}, [{"classifier": "class-means"}, {"classifier": None}]),
    ({"transform": "drawings"}, {"transform": "plain"}, [{"transform": "drawings"}]),
    ({"image_size": 28}, {"image_size": 14}, [{"image_size": 28}, {"image_size": "> 20"}]),
    ({"stop_after": 10}, {"stop_after": 2}, [{"stop_after": 10}, {"stop_after": "> 5"}, {"stop_after": None}]),
]


@pytest.mark.parametrize(("one", "other", "conditions"), SPELLINGS)
def test_what_a_key_means_counts_and_not_whether_it_is_written(
    one: dict[str, Any], other: dict[str, Any], conditions: list[dict[str, Any]]
) -> None:
    base = {} if "access" in one else {"optimizer": "zo-sgd"} if "loss" in one else {}
    if "access" in one:
        other, base = {**other, "backbone": "vit"}, {}
    for when in conditions:
        check_when(when, "rule")
        assert matches(keys_of({**base, **one}), when) and matches(keys_of(base), when), when
        assert not matches({**keys_of(base), **other}, when), when


def test_equal_streams_meet_the_same_conditions() -> None:
    """Cells that are one cell must not become two by a rule that looks at their spelling."""
    content = {
        "base": {"method": "ease", "optimizer": "fo-sgd"},
        "grid": [
            {"increments": [[50, 10, 10, 10, 10, 10], [50, 30, 20]]},
            {"tasks": 6, "base_classes": 50},
            {"tasks": 10, "queries": [1, 8]},
        ],
        "settings": [
            {"when": {"base_classes": 50, "tasks": "> 3"}, "set": {"epochs": 3}},
            {"when": {"tasks": 3}, "set": {"epochs": 4}},
            {"when": {"tasks": 10}, "set": {"epochs": 5}},
            {"when": {"queries": ">= 8"}, "set": {"epochs": 6}},
            {"when": {"increments": [[10] * 10]}, "set": {"batch_size": 7}},
        ],
    }
    grid = parse_grid(content)
    assert [(cell.tasks, cell.epochs, cell.batch_size) for cell in grid.cells] == [(6, 3, 48), (3, 4, 48), (10, 5, 7)]
    assert [line.partition("grid: ")[2] for line in grid.idle] == ["settings[3] matches no cell: {'queries': '>= 8'}"]


def test_a_rule_may_mend_what_is_no_cell_without_it() -> None:
    cell = {"method": "aper-adapter", "optimizer": "zo-sgd", "loss": "class-means", "batch_size": 8}
    rule = {"when": {"loss": "class-means", "batch_size": "< 20"}, "set": {"batch_size": 20}}
    with pytest.raises(ConfigError, match="batch_size=8"):
        parse_grid({"grid": [cell]})
    assert [found.batch_size for found in parse_grid({"grid": [cell], "settings": [rule]}).cells] == [20]


def test_rules_of_a_grid_compare() -> None:
    content = {
        "grid": [{"optimizer": "zo-sgd", "queries": [1, 8, 32]}],
        "settings": [
            {"when": {"queries": ">= 8"}, "set": {"epochs": 2}},
            {"when": {"queries": "> 8", "epochs": "<= 2"}, "set": {"lr": 0.5}},
        ],
    }
    assert [(cell.epochs, cell.lr) for cell in parse_grid(content).cells] == [(10, 3e-3), (2, 3e-3), (2, 0.5)]


def test_the_defaults_of_a_cells_own_optimizer_count() -> None:
    content = {
        "grid": [
            {"method": "ease", "optimizer": "zo-sgd"},
            {"method": "aper-adapter", "optimizer": "zo-sgd", "queries": [1, 4]},
            {"method": "ease", "optimizer": "fo-sgd"},
            {"method": "simplecil"},
        ],
        "settings": [
            {"when": {"queries": 1}, "set": {"epochs": 1}},
            {"when": {"queries": "!= 1", "method": ["ease", "aper-adapter"]}, "set": {"epochs": 2}},
            {"when": {"eps": "> 0"}, "set": {"batch_size": 7}},
        ],
    }
    cells = parse_grid(content).cells
    assert [(cell.queries, cell.epochs, cell.batch_size) for cell in cells] == [
        (1, 1, 7), (1, 1, 7), (4, 2, 7), (None, 2, 48), (None, None, None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "given", "said"),
    [
        ({"increments": [[50, 30, 20]]}, {"tasks": [5, 10]}, r"--set tasks=5: the cell has increments=\[50, 30, 20\]"),
        (
            {"increments": [[40, 20, 20, 20]]},
            {"tasks": 4},
            r"--set tasks=4: the cell has increments=\[40, 20, 20, 20\]",
        ),
        ({"increments": [[50, 50]]}, {"tasks": 2}, r"--set tasks=2: the cell has increments=\[50, 50\]"),
        *(
            (
                {"fixed_class_order": "sorted"},
                {"class_order_seed": seed},
                f"--set class_order_seed={seed}: the cell has fixed_class_order=sorted",
            )
            for seed in (2, 1993)
        ),
    ],
)
def test_what_the_command_line_sets_in_vain_is_refused(cell: dict[str, Any], given: dict[str, Any], said: str) -> None:
    content = {"grid": [{"method": "simplecil", **cell}]}
    with pytest.raises(ConfigError, match=said):
        parse_grid(content, given)
    assert parse_grid(content, {**given, **dict.fromkeys(cell)}).cells, "where the other key is set too"
    ((key, value),) = cell.items()
    ruled = {
        "grid": [{"method": "simplecil"}],
        "settings": [{"when": {}, "set": {key: value[0] if key == "increments" else value}}],
    }
    with pytest.raises(ConfigError, match=said):
        parse_grid(ruled, given)


def test_a_rule_that_sets_a_key_in_vain_is_refused() -> None:
    cells = [
        {"method": "simplecil", "increments": [[50, 30, 20]]},
        {"method": "simplecil", "fixed_class_order": "sorted"},
    ]
    for cell, (key, value) in zip(cells, (("tasks", 5), ("class_order_seed", 5)), strict=True):
        rules = [{"when": {}, "set": {"seed": 1}}, {"when": {"method": "simplecil"}, "set": {key: value}}]
        with pytest.raises(
            ConfigError, match=rf"^grid: settings\[1\]: set: {key}=5: the cell has .*, which is in its place"
        ):
            parse_grid({"grid": [cell], "settings": rules})


def test_a_setting_that_matches_no_cell_is_told(tmp_path: Path) -> None:
    """A misspelled option, or a value that no cell has, would leave them as they are."""
    (tmp_path / "shared.yaml").write_text(
        "grid: [{method: simplecil}]\nsettings: [{when: {optimizer: fo-adam}, set: {lr: 0.5}}]"
    )
    (tmp_path / "own.yaml").write_text(
        "settings_from: [shared.yaml]\n"
        "grid: [{method: finetune, optimizer: zo-sgd, optimizer_options.momentum: 0.9}]\n"
        "settings:\n"
        "  - {when: {optimizer_options.momentun: 0.9}, set: {lr: 0.5}}\n"
        "  - {when: {optimizer: zo-sgd}, set: {lr: 0.25}}\n"
        "  - {when: {queries: 7}, set: {lr: 0.125}}\n"
    )
    grid = load_grid(tmp_path / "own.yaml")
    assert [cell.lr for cell in grid.cells] == [0.25]
    told = [
        line
        for line in make_plan(grid, Store(tmp_path / "results"), None).describe(None).splitlines()
        if "settings" in line
    ]
    file = tmp_path / "own.yaml"
    assert told == [
        f"{file}: settings[0] matches no cell: {{'optimizer_options.momentun': 0.9}}",
        f"{file}: settings[2] matches no cell: {{'queries': 7}}",
    ]
    (tmp_path / "outer.yaml").write_text("include: [own.yaml]")
    assert list(load_grid(tmp_path / "outer.yaml").idle) == told
    assert not load_grid(file, {"optimizer": "fo-sgd"}).idle, "the command line has taken cells away"


def test_a_value_that_is_a_list_stands_in_a_list() -> None:
    content: dict[str, Any] = {
        "base": {"method": "simplecil", "fixed_class_order": ["sorted", list(range(99, -1, -1))]},
        "grid": [{"increments": [None, [50, 30, 20]]}],
        "settings": [
            {"when": {"increments": [[50, 30, 20]], "fixed_class_order": "sorted"}, "set": {"stop_after": 2}},
            {"when": {"increments": None}, "set": {"increments": [1, 2, 97]}},
        ],
    }
    cells = parse_grid(content).cells
    assert [(cell.increments, cell.tasks, cell.stop_after) for cell in cells] == [
        ([1, 2, 97], 3, None),
        ([50, 30, 20], 3, 2),
        ([1, 2, 97], 3, None),
        ([50, 30, 20], 3, None),
    ]
    assert [cell.fixed_class_order for cell in cells] == ["sorted"] * 2 + [list(range(99, -1, -1))] * 2
    (one,) = parse_grid({"grid": [{}]}, dict([parse_override("increments=[[50, 30, 20]]")])).cells
    assert one.increments == [50, 30, 20]
    with pytest.raises(ConfigError, match=r"grid\[0\]: increments=50: expected a list .*\[\[50, 25, 25\]\]"):
        parse_grid({"grid": [{"increments": [50, 30, 20]}]})


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (
            {"queries": "=> 8"},
            r"settings\[1\]: when: queries='=> 8': expected a number, or a comparison of one of < <= ",
        ),
        ({"queries": "== 8"}, "queries='== 8'"),
        ({"queries": ">= eight"}, "queries='>= eight'.*and a number"),
        ({"queries": ">="}, "queries='>='"),
        ({"lr": "> nan"}, "lr='> nan'"),
        ({"lr": [0.1, "< 1 2"]}, "lr='< 1 2'"),
        ({"epochs": "many"}, "epochs='many'"),
        ({"optimizer_options.momentum": "> x"}, "optimizer_options.momentum='> x'"),
        ({"optimizer": "!= 3"}, "optimizer='!= 3': a comparison, but optimizer is no number"),
        ({"querys": "> 3"}, "did you mean 'queries'"),
        ({"method": "eaze"}, "did you mean 'ease'"),
        ({"increments": [50, 50]}, r"increments=\[50, 50\]: .*write \[\[...\]\]"),
        ({"increments": "> 3"}, "increments='> 3': a comparison, but increments is no number"),
    ],
)
def test_a_wrong_condition_is_refused_with_rule_and_key(when: dict[str, Any], message: str) -> None:
    rules = [{"when": {}, "set": {}}, {"when": when, "set": {"lr": 1}}]
    with pytest.raises(ConfigError, match=f"^grid: .*{message}"):
        parse_grid({"grid": [{}], "settings": rules})
