"""A cell's configuration: one meaning is one id, however it is written, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from places import ROOT

import zeroflow.data
import zeroflow.methods
import zeroflow.models.backbone
import zeroflow.optim
import zeroflow.results
from zeroflow import ConfigError, TrialConfig
from zeroflow.grid.grid_file import load_grid

pytestmark = pytest.mark.usefixtures("some_drawings")


SPELLINGS = [
    ["seed: 0", "seed: 0x0", "seed: +0"],
    ["lr: 1", "lr: 1.0", "lr: 1.", "lr: 1.0e+0"],
    ["eps: 0.02", "eps: 2.0e-2", "eps: .02"],
    ["class_order_seed: 0", "class_order_seed: 00"],
    ["optimizer_options: {hybrid: 2, hybrid_lr: 1}", "optimizer_options: {hybrid_lr: 1.0, hybrid: 2}"],
    ["optimizer_options: {betas: [0, 0.5]}", "optimizer_options: {betas: [0.0, .5]}"],
    [
        "optimizer_options: {history: 0.5, sparsity: 0}",
        "optimizer_options: {sparsity: 0.0, history: 5.0e-1, hybrid: 0}",
    ],
    ["method_options: {alpha: 1, bottleneck: 8}", "method_options: {bottleneck: 8, alpha: 1.0}"],
    ["validation: 0.25", "validation: 2.5e-1"],
]
"""Ways to write one meaning in YAML."""
WRONG = [
    "seed: true", "seed: 1.0", "class_order_seed: 0.0", "class_order_seed: off", "class_order_seed: -1", "hybrid_epochs: 0.0",
    "hybrid_epochs: no", "lr: yes", "lr: '1'", "queries: 2.0", "epochs: true", "tasks: 5.0", "optimizer_options: {hybrid_lr: yes, hybrid: 2}",
    "optimizer_options: {history: on}", "optimizer_options: {hybrid: 2.0}", "method_options: {alpha: no}", "method_options: {bottleneck: 8.0}",
    "optimizer_options: {betas: [0.1, on]}", "validation: off",
]  # fmt: skip
"""Values of another type than a key has, though they equal a right one in Python."""


@pytest.mark.parametrize("ways", SPELLINGS, ids=lambda ways: ways[0])
def test_one_meaning_is_one_cell_however_it_is_written(ways: list[str]) -> None:
    trained = {"method": "ease", "optimizer": "zo-adam"}
    found = [TrialConfig.from_dict({**trained, **yaml.safe_load(text)}) for text in ways]
    assert len({config.cell_id for config in found}) == 1
    assert len({json.dumps(config.canonical()) for config in found}) == 1


@pytest.mark.parametrize("text", WRONG)
def test_a_value_of_another_type_is_refused_though_it_equals_a_right_one(text: str) -> None:
    (key,) = yaml.safe_load(text)
    with pytest.raises(ConfigError, match=key.split("_options")[0]):
        TrialConfig.from_dict({"method": "ease", "optimizer": "zo-adam", **yaml.safe_load(text)})


def test_labels_tell_what_grids_compare() -> None:
    trained = {"method": "ease", "optimizer": "zo-sgd", "queries": 8, "lr": 0.001, "epochs": 10, "hybrid_epochs": 7}
    cell = TrialConfig.from_dict({**trained, "optimizer_options": {"history": 0.2}, "seed": 2})
    assert cell.label() == "quickdraw100 ease zo-sgd q=8 lr=0.001 epochs=10 exact=7 history=0.2 seed=2"
    assert TrialConfig.from_dict({"method": "simplecil"}).label() == "quickdraw100 simplecil seed=0"


def test_the_id_is_that_of_what_is_computed() -> None:
    make = TrialConfig.from_dict
    plain = make({"method": "ease", "optimizer": "zo-sgd"})
    assert plain.cell_id == make({"optimizer": "zo-sgd", "eps": 0.001, "queries": 1}).cell_id
    assert plain.cell_id == make({"optimizer": "zo-sgd", "method_options": {"alpha": 0.1}}).cell_id
    assert plain.cell_id != make({"optimizer": "zo-sgd", "queries": 2}).cell_id
    assert plain.cell_id != make({"optimizer": "zo-sgd", "method_options": {"alpha": 0.2}}).cell_id
    # Queries mean nothing to a first-order optimizer, nothing of the training means anything to SimpleCIL.
    assert make({"optimizer": "fo-sgd", "queries": 8}).cell_id == make({"optimizer": "fo-sgd"}).cell_id
    assert (
        make({"method": "simplecil", "optimizer": "zo-sgd", "seed": 5}).cell_id == make({"method": "simplecil"}).cell_id
    )
    assert TrialConfig(**plain.canonical()) == plain
    # A default that is spelled out is the default.
    assert make({"transform": "drawings", "image_size": 28}).cell_id == make({}).cell_id


USUAL_ORDER = np.random.RandomState(1993).permutation(100).tolist()


@pytest.mark.parametrize(
    ("values", "same", "canonical"),
    [
        ({"increments": [10] * 10}, {}, {}),
        ({"increments": (25, 25, 25, 25)}, {"tasks": 4}, {"tasks": 4}),
        ({"base_classes": 20, "tasks": 5}, {"tasks": 5}, {"tasks": 5}),
        ({"base_classes": 100, "tasks": 1}, {"increments": [100]}, {"tasks": 1}),
        ({"increments": [50, 25, 25]}, {"tasks": 3, "base_classes": 50}, {"tasks": 3, "base_classes": 50}),
        ({"increments": [25, 75]}, {"tasks": 2, "base_classes": 25}, {"tasks": 2, "base_classes": 25}),
        (
            {"increments": [50, 26, 24], "tasks": 7},
            {"increments": [50, 26, 24]},
            {"tasks": 3, "increments": [50, 26, 24]},
        ),
        (
            {"increments": [50, 25, 25], "stop_after": 3},
            {"base_classes": 50, "tasks": 3},
            {"tasks": 3, "base_classes": 50},
        ),
        ({"stop_after": 10}, {}, {}),
        ({"fixed_class_order": USUAL_ORDER, "class_order_seed": 7}, {}, {}),
        ({"fixed_class_order": list(range(100))}, {"fixed_class_order": "sorted"}, {"fixed_class_order": "sorted"}),
        (
            {"fixed_class_order": "sorted", "class_order_seed": 7},
            {"fixed_class_order": "sorted"},
            {"fixed_class_order": "sorted"},
        ),
        (
            {"fixed_class_order": USUAL_ORDER[::-1]},
            {"fixed_class_order": USUAL_ORDER[::-1], "class_order_seed": 3},
            {"fixed_class_order": USUAL_ORDER[::-1]},
        ),
    ],
)
def test_equal_streams_have_equal_ids(values: dict, same: dict, canonical: dict) -> None:
    first, second = TrialConfig.from_dict(values), TrialConfig.from_dict(same)
    assert first.cell_id == second.cell_id and first == second
    assert first.canonical() == canonical | {"lr": first.lr}
    assert TrialConfig(**first.canonical()) == first == TrialConfig.from_dict(dataclasses.asdict(first))


def test_weights_from_the_hub_are_the_default_of_every_timm_backbone() -> None:
    hub, default, none = (
        TrialConfig.from_dict({"dataset": "cifar100", "backbone": "vit_base_patch16_224.augreg_in21k", **checkpoint})
        for checkpoint in ({"checkpoint": "hub"}, {}, {"checkpoint": "none"})
    )
    assert hub == default and hub.cell_id == default.cell_id != none.cell_id


def test_different_streams_have_different_ids() -> None:
    streams: list[dict] = [
        {},
        {"stop_after": 1},
        {"stop_after": 2},
        {"base_classes": 19},
        {"increments": [20, 30, 50]},
        {"increments": [30, 20, 50]},
        {"class_order_seed": 1},
        {"fixed_class_order": "sorted"},
        {"fixed_class_order": USUAL_ORDER[::-1]},
    ]
    assert len({TrialConfig.from_dict(stream).cell_id for stream in streams}) == len(streams)


@pytest.mark.slow
def test_the_ids_of_the_committed_results_are_still_theirs() -> None:
    stores = sorted(path.parent for path in (ROOT / "results").glob("*/trials"))
    rows = [row for store in stores for row in zeroflow.results.load(store, "trials").to_pylist()]
    assert len(rows) > 200
    for row in rows:
        assert TrialConfig.from_dict(json.loads(row["config"])).cell_id == row["cell_id"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metod": "ease"}, "did you mean 'method'"),
        ({"method": "eaze"}, "did you mean 'ease'"),
        ({"optimizer": "zosgd"}, "did you mean 'zo-sgd"),
        ({"dataset": "quickdraw"}, "did you mean 'quickdraw100'"),
        ({"transform": "drawing"}, "did you mean 'drawings'"),
        ({"tasks": 7}, "100 classes do not divide into 7 equal tasks; nearest: 5"),
        ({"tasks": 0}, "tasks=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": -4}, "batch_size=-4"),
        ({"lr": 0}, "lr=0"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"optimizer": "zo-sgd", "eps": -1.0}, "eps=-1.0"),
        ({"optimizer": "zo-sgd", "queries": 0}, "queries=0"),
        ({"optimizer": "zo-sgd", "queries": 1.5}, "queries=1.5"),
        ({"optimizer_options": {"momentun": 0.9}}, "did you mean 'momentum'"),
        ({"method_options": {"alfa": 0.9}}, "did you mean 'alpha'"),
        ({"method_options": {"bottleneck": 0}}, "bottleneck=0"),
        ({"method_options": {"bottleneck": "wide"}}, "bottleneck='wide'"),
        ({"schedule": "linear"}, "cosine or constant"),
        ({"checkpoint": "/nowhere/weights.pth"}, "no file '/nowhere/weights.pth'"),
        ({"seed": -1}, "seed=-1"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": 1e39}, r"lr=1e\+39: expected a number that float32 holds, from 1.2e-38 to 3.4e\+38"),
        ({"lr": 1e-60}, "lr=1e-60: expected a number that float32 holds"),
        ({"optimizer": "zo-sgd", "eps": 1e300}, r"eps=1e\+300: expected a number that float32 holds"),
        ({"optimizer_options": {"weight_decay": 1e39}}, r"weight_decay=1e\+39: expected a number that float32 holds"),
        (
            {"optimizer": "zo-sgd", "optimizer_options": {"hybrid": 1, "hybrid_lr": 1e300}},
            "hybrid_lr=.* that float32 holds",
        ),
        ({"seed": 2**63}, "expected an integer >= 0 and less than 2\\^63"),
        ({"batch_size": 2**63}, "batch_size=9223372036854775808: expected an integer >= 1 and less than 2\\^63"),
        ({"method": "finetune", "probe_every": 10**20}, "probe_every=1000.*less than 2\\^63"),
        ({"transform": ""}, "unknown transform ''"),
        ({"class_order_seed": 2**40}, "class_order_seed"),
        ({"class_order_seed": None}, "class_order_seed=None"),
        ({"backbone": 5}, "backbone=5"),
        ({"backbone": "resnet19"}, "did you mean 'resnet1"),
        ({"method_options": 5}, "method_options=5"),
        ({"method_options": {"alpha": float("nan")}}, "finite"),
        ({"method": "simplecil", "optimizer": "zosgd"}, "did you mean 'zo-sgd"),
        ({"dtype": "bf16"}, "float32"),
        ({"validation": 1.5}, "validation=1.5"),
        ({"stop_after": 0}, "stop_after=0: expected 1..10 tasks"),
        ({"stop_after": 11}, "stop_after=11: expected 1..10 tasks"),
        ({"stop_after": 4, "increments": [50, 25, 25]}, "stop_after=4: expected 1..3 tasks"),
        ({"increments": 50}, r"increments=50: expected a list of the classes of every task; .* \[\[50, 25, 25\]\]"),
        ({"increments": []}, r"increments=\[\]: expected a list"),
        ({"increments": [50, 50.0]}, "expected a list of the classes"),
        ({"increments": [50, 25]}, r"increments=\[50, 25\]: .* add up to 100 classes; these add up to 75"),
        ({"increments": [120, -20]}, "expected positive numbers that add up to 100"),
        ({"increments": [50, 50], "base_classes": 50}, "base_classes=50: expected no value beside increments"),
        ({"base_classes": 0}, "base_classes=0"),
        ({"base_classes": 100}, "base_classes=100: expected 1..99 of 100 classes"),
        ({"base_classes": 50}, "the 50 classes after base_classes=50 do not divide into 9 equal tasks; nearest: 11"),
        ({"fixed_class_order": "alphabetical"}, "fixed_class_order='alphabetical': expected 'sorted' or a list"),
        ({"fixed_class_order": 5}, r"fixed_class_order=5: expected 'sorted' or a list .*\[\[2, 0, 1\]\]"),
        ({"fixed_class_order": [True]}, "expected 'sorted' or a list"),
        ({"fixed_class_order": [*range(98), 5, -1]}, "98, 99: not there; 5: more than once; -1: no class"),
    ],
)
def test_bad_configurations_are_refused_with_the_nearest_right_one(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrialConfig.from_dict(values)


@pytest.mark.parametrize("name", json.loads((Path(__file__).parent / "cell_ids.json").read_text()))
def test_cells_of_the_committed_grids_keep_the_ids_under_which_results_are_stored(name: str) -> None:
    """A changed id would run everything anew: the ids of a list that is never made again, but for grids that grow."""
    known = json.loads((Path(__file__).parent / "cell_ids.json").read_text())[name]
    ids = sorted(config.cell_id for config in load_grid(ROOT / "sweeps" / f"{name}.yaml").cells)
    found = {"cells": len(ids), "first": ids[:3], "sha256": hashlib.sha256(" ".join(ids).encode()).hexdigest()}
    assert found == known
