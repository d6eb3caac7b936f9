"""What a table's columns leave out of rows, the sentence above it tells, of those rows alone."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from zeroflow.results.differences import Differences
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


def test_an_option_that_differs_in_another_method_is_told_all_the_same() -> None:
    rows = [
        config(dataset="cub", method=method, optimizer="fo-sgd", optimizer_options={"momentum": momentum})
        for method, momentum in (("finetune", 0.9), ("finetune", 0.5), ("ease", 0.7))
    ]
    differences = Differences(rows)
    assert [differences.text("optimizer_options", row) for row in rows] == ["momentum=0.9", "momentum=0.5", "-"]
    assert differences.shared() == ["momentum=0.7 (ease fo-sgd)"]
