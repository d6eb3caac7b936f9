"""What a table's columns leave out of rows, the sentence above it tells, of those rows alone."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import pytest

from zeroflow.results.differences import Differences, short_number
from zeroflow.results.schema import CONFIG_KEYS

OPTIONS = ("method_options", "classifier_options", "optimizer_options")


def config(**values: Any) -> dict[str, Any]:
    options = {key: json.dumps(values.pop(key, {})) for key in OPTIONS}
    return {**dict.fromkeys(CONFIG_KEYS), **options, **values}


def is_of(sentence: str, row: dict[str, Any]) -> bool:
    """Whether a reader would take the sentence's options for a row's."""
    names = sentence.removesuffix(")").partition(" (")[2]
    words = {row[name] or "-" for name in ("dataset", "method", "classifier", "optimizer")}
    if names.startswith("every "):
        owner, _, others = names.removeprefix("every ").partition(" but ")
        return row[owner] not in others.split(", ")
    return any(words.issuperset(name.split(" ")) for name in names.split(", "))


def drawn(generator: random.Random) -> list[dict[str, Any]]:
    values = {
        "dataset": ["cub", "omnibenchmark"],
        "method": ["ease", "finetune", "lwf"],
        "optimizer": ["fo-sgd", "zo-sgd"],
        "classifier": [None, "ridge"],
    }
    options = {
        "method_options": [{}, {"bottleneck": 4}, {"bottleneck": 8, "scale": 1.0}],
        "optimizer_options": [{}, {"momentum": 0.9}, {"momentum": 0.5}],
        "classifier_options": [{}, {"strength": 2}],
    }
    rows = [
        {
            **{key: generator.choice(some[: generator.choice((1, 3))]) for key, some in values.items()},
            **{key: generator.choice(some) for key, some in options.items()},
        }
        for _ in range(generator.randint(2, 6))
    ]
    return [config(**row) for row in rows]


@pytest.mark.parametrize("seed", range(300))
def test_an_option_is_shown_in_its_row_or_told_of_it_and_told_of_no_other(seed: int) -> None:
    rows = drawn(random.Random(seed))
    differences = Differences(rows)
    for row, key in itertools.product(rows, OPTIONS):
        shown = set(differences.text(key, row).split(" "))
        own = {f"{name}={value:g}" for name, value in json.loads(row[key]).items()}
        told = {
            option
            for sentence in differences.shared()
            if is_of(sentence, row)
            for option in sentence.partition(" (")[0].split(" ")
            if option.partition("=")[0] in ALL[key]
        }
        assert own == told | (shown - {"-"} - {f"{name}=default" for name in ALL[key]}), (row, differences.shared())


ALL = {
    "method_options": {"bottleneck", "scale"},
    "optimizer_options": {"momentum"},
    "classifier_options": {"strength"},
}


def test_an_option_that_one_data_set_alone_has_is_told_of_that() -> None:
    row = {"method": "ease", "optimizer": "fo-sgd"}
    rows = [config(dataset="cub", **row), config(dataset="marker", **row, method_options={"scale": 1.0})]
    assert Differences(rows).shared() == ["scale=1 (marker ease fo-sgd)"]


@pytest.mark.parametrize("seed", range(50))
def test_numbers_that_differ_read_differently_and_alone_as_short_as_ever(seed: int) -> None:
    generator = random.Random(seed)
    values = {10 ** generator.uniform(-9, 9) for _ in range(5)}
    for value in list(values):  # as near as six digits see, and nearer
        values |= {float(f"{value:.6g}"), float(f"{value:.9g}"), math.nextafter(value, 0), value * (1 + 4e-7)}
    assert len({short_number(value, values) for value in values}) == len(values)
    for value in values:
        assert float(short_number(value, [value, 2 * value])) == float(f"{value:g}")


@pytest.mark.parametrize("numbers", [(1.049999e-2, 1.05e-2), (1.234564, 1.2345649, 1.234565, 1.2345651)])
def test_two_numbers_that_only_a_longer_name_makes_alike_are_told_apart(numbers: tuple[float, ...]) -> None:
    assert len({short_number(value, numbers) for value in numbers}) == len(numbers)


HALF_DECADE = 10**-2.5
"""Agrees with 0.00316228 in six digits."""


def test_settings_that_agree_in_six_digits_have_names_of_their_own() -> None:
    row = {"dataset": "cub", "method": "ease", "optimizer": "zo-sgd", "eps": 0.001}
    rates = [config(**row, lr=lr) for lr in (HALF_DECADE, 0.00316228, 0.1)]
    apart = Differences(rates)
    assert apart.varies("lr")
    assert [apart.text("lr", each) for each in rates] == ["0.003162278", "0.00316228", "0.1"]
    assert apart.label(rates[0], ["method", "lr"]) == "ease lr=0.003162278"
    options = [config(**row, optimizer_options={"momentum": value}) for value in (0.9, 0.90000001)]
    apart = Differences(options)
    assert [apart.text("optimizer_options", each) for each in options] == ["momentum=0.9", "momentum=0.90000001"]
    later = [config(**row, later=json.dumps({"task": 2, "lr": lr})) for lr in (HALF_DECADE, 0.00316228)]
    apart = Differences(later)
    texts = [apart.text("later", each) for each in later]
    assert texts == ["from task 2: lr=0.003162278", "from task 2: lr=0.00316228"]


def test_options_that_no_row_shows_are_told_in_as_many_digits_as_tell_them_apart() -> None:
    rows = [
        config(dataset="cub", method=method, optimizer="fo-sgd", method_options={"scale": scale})
        for method, scale in (("ease", 0.1), ("finetune", 0.1 + 1e-9))
    ]
    assert Differences(rows).shared() == ["scale=0.1 (ease)", "scale=0.100000001 (finetune)"]


def test_an_option_that_differs_in_another_method_is_told_all_the_same() -> None:
    rows = [
        config(dataset="cub", method=method, optimizer="fo-sgd", optimizer_options={"momentum": momentum})
        for method, momentum in (("finetune", 0.9), ("finetune", 0.5), ("ease", 0.7))
    ]
    differences = Differences(rows)
    assert [differences.text("optimizer_options", row) for row in rows] == ["momentum=0.9", "momentum=0.5", "-"]
    assert differences.shared() == ["momentum=0.7 (ease fo-sgd)"]
