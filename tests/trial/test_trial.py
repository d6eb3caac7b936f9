"""A cell: its configuration, its metrics, its run on the embedded data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from places import ROOT, TESTS

import zeroflow.data
import zeroflow.methods
import zeroflow.models.backbone
import zeroflow.optim
import zeroflow.results
from zeroflow import ConfigError, TrialConfig, run_trial
from zeroflow.cli import main
from zeroflow.grid.grid_file import load_grid, parse_grid
from zeroflow.models.factory import create_backbone
from zeroflow.results import rows
from zeroflow.trial import metrics

SMALL = {"dataset": "some-drawings", "tasks": 4, "epochs": 2, "batch_size": 16}
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


def test_metrics_on_a_matrix_worked_out_by_hand() -> None:
    a = np.array([[80.0, np.nan, np.nan], [60.0, 90.0, np.nan], [70.0, 50.0, 40.0]])
    n = np.array([10, 20, 30])
    np.testing.assert_allclose(metrics.stage_accuracy(a, n), [80.0, 80.0, (700 + 1000 + 1200) / 60])
    assert metrics.average(a, n) == pytest.approx((80 + 80 + 2900 / 60) / 3)
    assert metrics.last(a, n) == pytest.approx(2900 / 60)
    assert metrics.forgetting(a) == pytest.approx(((80 - 70) + (90 - 50)) / 2)
    assert metrics.backward_transfer(a) == pytest.approx(((70 - 80) + (50 - 90)) / 2)
    # A task that improves has been forgotten by nothing, never by less.
    assert metrics.forgetting(np.array([[10.0, np.nan], [30.0, 20.0]])) == 0.0
    assert metrics.forgetting(np.array([[10.0]])) == 0.0
    with pytest.raises(ValueError, match="task 1 has no test samples"):
        metrics.stage_accuracy(a, np.array([10, 0, 30]))


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


def class_mean_cosines(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of each test drawing with each class mean, and its class, under new labels; with NumPy."""
    data = zeroflow.data.load_dataset("some-drawings")
    backbone = create_backbone()

    def features(samples) -> np.ndarray:
        with torch.no_grad():
            return backbone((samples.pixels.float() / 255).expand(-1, 3, -1, -1)).double().numpy()

    train, test = features(data.train), features(data.test)
    means = np.stack([train[data.train.labels == label].mean(0) for label in order])
    unit = test / np.linalg.norm(test, axis=1, keepdims=True)
    return unit @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T, np.argsort(order)[data.test.labels]


@pytest.mark.slow
def test_simplecil_is_the_nearest_class_mean() -> None:
    """The whole cell against class means computed here with NumPy."""
    result = run_trial(TrialConfig.from_dict({"method": "simplecil", "dataset": "some-drawings"}))
    cosine, labels = class_mean_cosines(np.random.RandomState(1993).permutation(20))
    seen = range(2, 21, 2)
    expected = [100 * np.mean(cosine[labels < n, :n].argmax(1) == labels[labels < n]) for n in seen]
    np.testing.assert_allclose(result.stage_accuracy, expected, rtol=0, atol=1e-9)
    assert expected[-1] > 50
    assert result.summary["forward_passes"] == 0
    assert result.accuracy_matrix.shape == (10, 10)
    assert np.isnan(result.accuracy_matrix[np.triu_indices(10, 1)]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "increments"),
    [
        ({"tasks": 4}, [5, 5, 5, 5]),
        ({"tasks": 4, "stop_after": 3, "class_order_seed": 5}, [5, 5, 5]),
        ({"base_classes": 8, "tasks": 5, "fixed_class_order": "sorted"}, [8, 3, 3, 3, 3]),
        ({"increments": [1, 12, 7], "fixed_class_order": [*range(19, -1, -2), *range(0, 20, 2)]}, [1, 12, 7]),
        ({"increments": [6, 6, 8], "stop_after": 2}, [6, 6]),
        ({"tasks": 1}, [20]),
    ],
)  # fmt: skip
def test_one_run_is_judged_in_three_settings(stream: dict, increments: list[int]) -> None:
    """Every number against one computed here, sample by sample, from class means."""
    result = run_trial(TrialConfig.from_dict({"method": "simplecil", "dataset": "some-drawings", **stream}))
    order = np.random.RandomState(stream.get("class_order_seed", 1993)).permutation(20)
    if "fixed_class_order" in stream:
        order = np.arange(20) if stream["fixed_class_order"] == "sorted" else np.array(stream["fixed_class_order"])
    assert result.class_order.tolist() == order.tolist() and result.task_classes.tolist() == increments
    cosine, labels = class_mean_cosines(order)
    ends = np.cumsum(increments).tolist()
    tasks = [list(range(end - n, end)) for end, n in zip(ends, increments, strict=True)]
    place = {c: (task, classes.index(c)) for task, classes in enumerate(tasks) for c in classes}
    expected = np.full((3, len(tasks), len(tasks)), np.nan)
    for stage, end in enumerate(ends):
        for task, classes in enumerate(tasks[: stage + 1]):
            right = [
                (
                    (best := max(range(end), key=lambda c: row[c])) == label,
                    max(classes, key=lambda c: row[c]) == label,
                    place[best][1] == place[label][1],
                )
                for row, label in zip(cosine, labels, strict=True)
                if label in classes
            ]
            expected[:, stage, task] = 100 * np.mean(right, axis=0)
        counted = np.zeros((end, end), int)
        for row, label in zip(cosine, labels, strict=True):
            if label < end:
                counted[label, max(range(end), key=lambda c: row[c])] += 1
        np.testing.assert_array_equal(result.confusion[stage], counted)
    # All classes have five test drawings, so that pooling is weighting by classes.
    weights = np.tril(np.tile(increments, (len(tasks), 1)))
    pooled = (np.nan_to_num(expected) * weights).sum(2) / weights.sum(1)

    np.testing.assert_allclose(result.accuracy_matrix, expected[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.task_incremental, expected[1], rtol=0, atol=1e-9)
    assert result.summary["avg_task_incremental"] == pytest.approx(pooled[1].mean())
    assert result.summary["last_task_incremental"] == pytest.approx(pooled[1][-1])
    if len(set(increments)) == 1:
        np.testing.assert_allclose(result.domain_incremental, expected[2], rtol=0, atol=1e-9)
        assert result.summary["avg_domain_incremental"] == pytest.approx(pooled[2].mean())
        assert result.summary["last_domain_incremental"] == pytest.approx(pooled[2][-1])
    else:
        assert result.domain_incremental is None and result.summary["avg_domain_incremental"] is None
    if len(tasks) == 1:
        np.testing.assert_array_equal(result.task_incremental, result.accuracy_matrix)
        np.testing.assert_array_equal(result.domain_incremental, result.accuracy_matrix)
    else:
        assert result.summary["last_task_incremental"] > result.summary["last"] + 5, "knowing the task must help here"


@pytest.mark.slow
def test_the_page_on_streams_runs() -> None:
    page = (ROOT / "docs" / "streams.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["result"].domain_incremental.shape == (2, 2)
    grid, branches = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    cells = parse_grid(yaml.safe_load(grid)).cells
    assert [(cell.increments, cell.stop_after) for cell in cells[::2]] == [([10, 20, 30, 40], None), ([50, 30, 20], 2)]
    assert len(cells) == 4
    told = [config.later for config in parse_grid(yaml.safe_load(branches)).cells]
    assert told[:2] == [{}, {"task": 4, "epochs": 2}] and len(told) == 6
    assert [(later["optimizer"], later["queries"]) for later in told[2:]] == [
        (name, queries) for name in ("zo-sgd", "zo-adam") for queries in (4, 16)
    ]
    assert all(f"| `{name}` | {meaning} |" in page for name, meaning in metrics.DEFINITIONS.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ease", "aper-adapter"])
def test_a_trained_stream_of_unequal_tasks(method: str) -> None:
    common = {**SMALL, "method": method, "optimizer": "zo-sgd", "epochs": 1}
    unequal = run_trial(TrialConfig.from_dict({**common, "increments": [9, 1, 6, 4]}))
    steps = [len([step for step in unequal.steps if step.task == task]) for task in range(4)]
    # Mini-batches of 16 out of 12 drawings of each class; APER trains on the first task alone.
    assert steps == ([7, 1, 5, 3] if method == "ease" else [7, 0, 0, 0])
    assert unequal.test_samples.tolist() == [45, 5, 30, 20] and unequal.domain_incremental is None
    assert unequal.task_incremental[3, 1] == 100.0, "among one class there is no choice"
    equal = run_trial(TrialConfig.from_dict(common))
    for result in (unequal, equal):
        seen = np.tril_indices(4)
        assert (result.task_incremental[seen] >= result.accuracy_matrix[seen]).all()
    assert (equal.domain_incremental[seen] >= equal.accuracy_matrix[seen]).all()


@pytest.mark.slow
def test_a_stream_that_stops_early_is_the_beginning_of_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**SMALL, "method": "ease", "optimizer": "zo-sgd", "epochs": 1}
    whole, part = (run_trial(TrialConfig.from_dict({**config, "stop_after": n})) for n in (None, 2))
    for name in ("accuracy_matrix", "task_incremental", "domain_incremental"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:2, :2])
    assert [step.loss for step in part.steps] == [step.loss for step in whole.steps[: len(part.steps)]]
    assert part.summary["forward_passes"] == whole.summary["forward_passes"] / 2
    stages = rows.tables(part)["stages"].to_pylist()
    assert [row["classes_seen"] for row in stages] == [5, 10] and [row["n"] for row in stages] == [25, 50]


def test_the_command_counts_the_tasks_that_are_run() -> None:
    settings = ["method=simplecil", "dataset=some-drawings", "increments=[4, 7, 9]", "stop_after=2"]
    run = CliRunner().invoke(main, ["run", *(part for text in settings for part in ("--set", text))])
    assert run.exit_code == 0 and "stage 1/2:" in run.output and "stage 2/2:" in run.output, run.output
    assert re.search(r"avg_task_incremental +\d", run.output)


@pytest.mark.slow
def test_a_stream_of_a_data_set_that_is_not_known_before_is_checked_on_opening(some_drawings: str) -> None:
    name = "untold-drawings"
    if name not in zeroflow.data.datasets.names():
        told = zeroflow.data.datasets.get(some_drawings)
        zeroflow.data.datasets.register(name, dataclasses.replace(told, name=name, classes=None))
    untold = {"dataset": name, "method": "simplecil"}
    fits = TrialConfig.from_dict({**untold, "increments": [5, 5, 5, 5], "fixed_class_order": list(range(20))})
    assert fits.increments == [5, 5, 5, 5], "whether these are all classes is not known yet"
    same = run_trial(TrialConfig.from_dict({**untold, "tasks": 4, "fixed_class_order": "sorted"}))
    np.testing.assert_array_equal(run_trial(fits).accuracy_matrix, same.accuracy_matrix)
    for stream, message in (
        ({"increments": [5, 5]}, "add up to 20 classes; these add up to 10"),
        ({"tasks": 3}, "20 classes do not divide into 3"),
        ({"base_classes": 30, "tasks": 2}, "base_classes=30: expected 1..19"),
        ({"fixed_class_order": [0, 1, 2]}, "each of 0..19 once; 3, 4, .*not there"),
    ):
        config = TrialConfig.from_dict({**untold, **stream})
        with pytest.raises(ConfigError, match=message):
            run_trial(config)
    with pytest.raises(ConfigError, match="2: more than once"):
        TrialConfig.from_dict({**untold, "fixed_class_order": [0, 2, 2]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optimizer", "forwards"),
    [
        ("ease", "zo-sgd", 64),
        ("aper-adapter", "fo-sgd", 8),
        ("aper-adapter", "forward-grad", 8),
    ],
)
def test_the_same_configuration_gives_the_same_bits(method: str, optimizer: str, forwards: int) -> None:
    config = TrialConfig.from_dict({**SMALL, "method": method, "optimizer": optimizer})
    first = run_trial(config)
    torch.rand(7), np.random.rand(3)  # whatever else draws random numbers must not matter
    second = run_trial(config)
    assert [step.loss for step in first.steps] == [step.loss for step in second.steps]
    np.testing.assert_array_equal(first.accuracy_matrix, second.accuracy_matrix)
    assert first.summary["forward_passes"] == forwards
    other = run_trial(TrialConfig.from_dict({**SMALL, "method": method, "optimizer": optimizer, "seed": 1}))
    assert [step.loss for step in first.steps] != [step.loss for step in other.steps]


@pytest.mark.slow
def test_first_order_training_learns_the_first_task() -> None:
    config = {**SMALL, "method": "aper-adapter", "optimizer": "fo-sgd", "epochs": 20, "lr": 0.5}
    steps = run_trial(TrialConfig.from_dict(config)).steps
    assert np.mean([s.loss for s in steps[-4:]]) < np.mean([s.loss for s in steps[:4]]) - 0.1


@pytest.mark.slow
def test_cached_features_score_as_fresh_ones_also_with_the_bare_backbone_as_a_space() -> None:
    """EASE's spaces only ever grow at the end, so what was computed at an earlier stage may be kept."""
    from zeroflow.data import class_incremental, even_increments, load_dataset, transforms
    from zeroflow.methods import EASE
    from zeroflow.models.factory import create_backbone
    from zeroflow.trial.evaluation import Evaluation

    for frozen_space in (False, True):
        model = EASE(create_backbone(), EASE.Options(bottleneck=2, frozen_space=frozen_space, beta=frozen_space / 2))
        stream = class_incremental(load_dataset("some-drawings"), even_increments(20, 10), transforms.get("plain"), 28)
        kept = Evaluation(model, lambda view: view.plain_batches(64))
        generator = torch.Generator().manual_seed(0)
        for task in stream.tasks[:3]:
            model.begin_task(task.classes, generator)
            with torch.no_grad():
                for adapter in model.adapters[-1]:
                    adapter.up.weight.normal_(generator=generator)
            model.freeze()
            model.end_task(task.train.plain_batches())
            fresh = Evaluation(model, lambda view: view.plain_batches(64))
            for seen in stream.tasks[: task.index + 1]:
                assert torch.equal(kept.scores(seen.test, seen.index), fresh.scores(seen.test, seen.index))
        assert model.prototypes.shape == (3 + frozen_space, 6, 192)


def test_the_memory_meter_counts_every_tensor_once() -> None:
    """On a model whose parameters share one storage, as the optimizers make them."""
    from zeroflow.optim import create_optimizer
    from zeroflow.trial.meters import peak_memory

    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 100))
    create_optimizer("zo-sgd", model, lr=0.1)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert peak_memory(lambda: None, model, torch.device("cpu"))[1] == size
    assert peak_memory(lambda: torch.zeros(1000), model, torch.device("cpu"))[1] == size + 4000


@pytest.mark.slow
def test_memory_of_forward_passes_is_far_below_that_of_backpropagation() -> None:
    peaks = {
        optimizer: run_trial(
            TrialConfig.from_dict({**SMALL, "method": "aper-adapter", "optimizer": optimizer, "batch_size": 24})
        ).summary["peak_memory_bytes"]
        for optimizer in ("zo-sgd", "fo-sgd")
    }
    assert peaks["zo-sgd"] < 0.6 * peaks["fo-sgd"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "alike"),
    [
        # One step a task; a second step that is a rest of one image; exact gradients in the first step alone.
        ({"optimizer": "fo-sgd", "epochs": 1, "batch_size": 60}, {"optimizer": "fo-sgd", "batch_size": 60}),
        ({"optimizer": "fo-sgd", "batch_size": 59}, {"optimizer": "fo-sgd", "batch_size": 60}),
        (
            {"optimizer": "zo-sgd", "batch_size": 30, "optimizer_options": {"hybrid": 1}},
            {"optimizer": "fo-sgd", "batch_size": 30},
        ),
    ],
)
def test_peak_memory_is_that_of_the_largest_step(settings: dict, alike: dict) -> None:
    cell = {**SMALL, "method": "aper-adapter", "stop_after": 1}
    found, expected = (
        run_trial(TrialConfig.from_dict({**cell, **values})).summary["peak_memory_bytes"]
        for values in (settings, alike)
    )
    assert 0.9 * expected < found <= expected


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["zo-sgd", "zo-per-example", "zo-adam-conserve"])
def test_peak_memory_is_the_same_after_an_interruption(optimizer: str, tmp_path: Path) -> None:
    class Stopped(Exception): ...

    def on_progress(what: str, done: int, total: int) -> None:
        if done:
            raise Stopped

    config = TrialConfig.from_dict(
        {**SMALL, "method": "aper-adapter", "optimizer": optimizer, "stop_after": 1, "batch_size": 25}
    )
    with pytest.raises(Stopped):
        run_trial(config, folder=tmp_path, on_progress=on_progress)
    found, whole = run_trial(config, folder=tmp_path), run_trial(config)
    assert any(step.seconds is None for step in found.steps)
    assert found.summary["peak_memory_bytes"] == whole.summary["peak_memory_bytes"]


def test_steps_of_a_hybrid_run_have_the_rate_that_they_were_made_with() -> None:
    cell = {**SMALL, "method": "finetune", "method_options": {"tune": "none"}, "schedule": "constant"}
    cell |= {"stop_after": 1, "epochs": 4}
    hybrid, exact = (
        run_trial(TrialConfig.from_dict({**cell, **values})).steps
        for values in (
            {"optimizer": "zo-sgd", "lr": 0.01, "hybrid_epochs": 2, "optimizer_options": {"hybrid_lr": 0.3}},
            {"optimizer": "fo-sgd", "lr": 0.3},
        )
    )
    half = len(hybrid) // 2
    assert [step.loss for step in hybrid[:half]] == [step.loss for step in exact[:half]]
    assert [step.lr for step in hybrid] == pytest.approx([0.3] * half + [0.01] * half)


@pytest.mark.slow
def test_a_diverging_trial_says_so() -> None:
    from zeroflow.optim import NonFiniteLoss

    with pytest.raises(NonFiniteLoss, match="lower lr"):
        run_trial(TrialConfig.from_dict({**SMALL, "method": "aper-adapter", "optimizer": "zo-sgd", "lr": 1e30}))


@pytest.mark.parametrize("device", ["mps", "meta", "gpu"])
def test_a_device_that_nothing_runs_on_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device='{device}': expected auto, cpu, cuda or cuda:<number>"):
        zeroflow.Placement(device=device).torch_device()


def test_numbers_that_only_float64_holds_are_taken_with_it() -> None:
    assert TrialConfig.from_dict({"lr": 1e39, "dtype": "float64"}).lr == 1e39


@pytest.mark.slow
def test_scores_that_are_not_finite_are_no_accuracy() -> None:
    """The last step may leave parameters beyond the range of floats; its loss was finite. The best of NaN is class 0."""
    one_step = {**SMALL, "method": "ease", "optimizer": "zo-sgd", "lr": 1e38, "epochs": 1, "batch_size": 1000}
    with pytest.raises(zeroflow.optim.NonFiniteLoss, match=r"25 of 25 test samples of task 0 .*lower lr or eps"):
        run_trial(TrialConfig.from_dict(one_step))


def test_scores_of_too_few_classes_are_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    method = zeroflow.methods.methods.get("simplecil").build
    whole = method.scores
    monkeypatch.setattr(method, "scores", lambda self, features: whole(self, features)[:, -5:])
    expected = r"SimpleCIL: scores of shape \(25, 5\), expected \(25, 10\): images x classes seen"
    with pytest.raises(ValueError, match=expected):
        run_trial(TrialConfig.from_dict({**SMALL, "method": "simplecil"}))


@pytest.mark.slow
@pytest.mark.parametrize("name", zeroflow.optim.list_optimizers())
def test_every_optimizer_runs_a_trial_and_pays_what_it_says(name: str) -> None:
    options = {"separable": True} if name == "es-cma" else {}  # too many parameters for a full covariance matrix
    config = TrialConfig.from_dict(
        {**SMALL, "method": "aper-adapter", "optimizer": name, "epochs": 1, "optimizer_options": options}
    )
    result = run_trial(config)
    info = zeroflow.optim.optimizers.get(name)
    steps = 4  # 5 classes of 12 drawings in mini-batches of 16, the last one smaller
    extra = {"zo-svrg": 2 * steps, "zo-per-example": 3 + 3}.get(
        name, 0
    )  # a snapshot; two sizes of mini-batches verified
    queries = config.queries or 1
    assert result.summary["forward_passes"] == steps * info.forwards(queries) + extra
    assert all(np.isfinite(step.loss) for step in result.steps) and len(result.steps) == steps
    assert np.isfinite(result.summary["avg"])


@pytest.mark.slow
def test_checkpointing_gives_the_same_steps_for_less_memory() -> None:
    """More blocks than one remember: the activations of the largest are what stays."""
    plain, checkpointed = (
        run_trial(TrialConfig.from_dict({**SMALL, "method": "ease", "optimizer": name, "lr": 0.1}))
        for name in ("fo-sgd", "fo-sgd-checkpoint")
    )
    assert [step.loss for step in plain.steps] == [step.loss for step in checkpointed.steps]
    assert checkpointed.summary["peak_memory_bytes"] < 0.75 * plain.summary["peak_memory_bytes"]


@pytest.mark.slow
def test_a_hybrid_trial_begins_as_first_order_and_goes_on_without() -> None:
    common = {**SMALL, "method": "aper-adapter", "epochs": 3, "schedule": "constant"}
    first_order = run_trial(TrialConfig.from_dict({**common, "optimizer": "fo-sgd", "lr": 0.1}))
    hybrid = run_trial(
        TrialConfig.from_dict(
            {**common, "optimizer": "zo-sgd", "lr": 1e-3, "hybrid_epochs": 2, "optimizer_options": {"hybrid_lr": 0.1}}
        )
    )
    losses, reference = ([step.loss for step in result.steps] for result in (hybrid, first_order))
    assert losses[:8] == reference[:8] and losses[8:] != reference[8:]
    assert hybrid.summary["forward_passes"] == 8 + 2 * 4
    assert TrialConfig.from_dict({**common, "optimizer": "fo-sgd", "hybrid_epochs": 2}).hybrid_epochs == 0
    both = {"hybrid_epochs": 2, "optimizer_options": {"hybrid_lr": 0.1}}
    assert TrialConfig.from_dict({**common, "optimizer": "fo-sgd", **both}).cell_id == (
        TrialConfig.from_dict({**common, "optimizer": "fo-sgd"}).cell_id
    ), "every step is exact, at lr"
    with pytest.raises(ConfigError, match=r"hybrid_epochs=2: optimizer_options.hybrid=5 says it in steps"):
        TrialConfig.from_dict({**common, "optimizer": "zo-sgd", "hybrid_epochs": 2, "optimizer_options": {"hybrid": 5}})
    with pytest.raises(ConfigError, match="hybrid_epochs=4: expected an integer from 0 to epochs=3"):
        TrialConfig.from_dict({**common, "optimizer": "zo-sgd", "hybrid_epochs": 4})


class Stopped(BaseException):
    """Stands for whatever ends a process."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optimizer", "more"),
    [
        ("aper-adapter", "zo-sgd", {"queries": 2}),
        ("ease", "zo-sgd", {"queries": 2}),
        ("ease", "zo-per-example", {}),
        ("ease", "zo-adam-conserve", {}),
        ("ease", "zo-svrg", {"optimizer_options": {"history": 0.3, "snapshot_every": 3}}),
        ("ease", "fo-sgd", {"lr": 0.1, "optimizer_options": {"momentum": 0.9}}),
        ("ease", "zo-sgd", {"hybrid_epochs": 1, "optimizer_options": {"hybrid_lr": 0.1}}),
    ],
)
def test_an_interrupted_trial_goes_on_to_the_same_bits(
    method: str, optimizer: str, more: dict, tiny_vit: dict, tmp_path, monkeypatch
) -> None:
    """Stopped at every 17th loss, again and again: nothing but the step or epoch in flight is computed twice."""
    config = TrialConfig.from_dict({**SMALL, **tiny_vit, "tasks": 2, "method": method, "optimizer": optimizer, **more})
    calls = 0
    cls = zeroflow.methods.methods.get(method).build
    original = cls.losses

    def counted(self, inputs):
        nonlocal calls, left
        calls, left = calls + 1, left - 1
        if left < 0:
            raise Stopped
        return original(self, inputs)

    monkeypatch.setattr(cls, "losses", counted)
    left = 10**9
    whole = run_trial(config)
    needed, calls = calls, 0
    for _ in range(50):
        left = 17
        try:
            result = run_trial(config, folder=tmp_path / "unfinished")
            break
        except Stopped:
            continue
    for name in ("accuracy_matrix", "task_incremental", "domain_incremental"):
        np.testing.assert_array_equal(getattr(result, name), getattr(whole, name))
    assert [(s.task, s.epoch, s.step, s.loss, s.lr) for s in result.steps] == [
        (s.task, s.epoch, s.step, s.loss, s.lr) for s in whole.steps
    ]
    assert result.summary["forward_passes"] == whole.summary["forward_passes"]
    twice = calls - needed
    # The step in flight at each stop; an epoch of 8 steps where steps are first-order.
    assert twice <= (calls // 17 + 1) * (8 if optimizer == "fo-sgd" or "hybrid_epochs" in more else 9)


@pytest.mark.slow
def test_what_was_judged_before_an_interruption_stays_judged_in_every_setting(tmp_path) -> None:
    config = TrialConfig.from_dict({"dataset": "some-drawings", "method": "simplecil", "tasks": 4})

    def stop(stage: int, accuracy: np.ndarray, samples: np.ndarray) -> None:
        if stage == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run_trial(config, folder=tmp_path / "unfinished", on_stage=stop)
    result, whole = run_trial(config, folder=tmp_path / "unfinished"), run_trial(config)
    for name in ("accuracy_matrix", "task_incremental", "domain_incremental"):
        np.testing.assert_array_equal(getattr(result, name), getattr(whole, name))
    assert (whole.task_incremental[2, :3] > whole.accuracy_matrix[2, :3]).all()


@pytest.mark.slow
def test_a_killed_process_loses_one_step_at_most(tmp_path) -> None:
    """SIGKILL at a random moment of a real process; the next one gets through."""
    cell = {**SMALL, "method": "ease", "optimizer": "zo-sgd", "epochs": 4}
    program = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}]
import conftest
conftest.some_drawings.__wrapped__()
from zeroflow import TrialConfig, run_trial
config = TrialConfig.from_dict({cell!r})
result = run_trial(config, folder=sys.argv[1], on_stage=lambda *_: print("stage", flush=True))
print("END", result.accuracy_matrix.tobytes().hex(), [s.loss for s in result.steps])
"""
    whole = run_trial(TrialConfig.from_dict(cell))
    rng, folder, outputs = np.random.default_rng(0), tmp_path / "unfinished", []
    for kill in (True, False):
        process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
        until = _bytes(folder) + rng.integers(100, 700)
        while kill and process.poll() is None and _bytes(folder) < until:
            time.sleep(0.005)
        if kill:
            process.kill()
        outputs.append(process.communicate()[0])
    assert ["END" in output for output in outputs] == [False, True]
    expected = f"END {whole.accuracy_matrix.tobytes().hex()} {[s.loss for s in whole.steps]}"
    assert outputs[-1].splitlines()[-1] == expected


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("task-*.losses")) if folder.exists() else 0


@pytest.mark.parametrize("name", json.loads((Path(__file__).parent / "cell_ids.json").read_text()))
def test_cells_of_the_committed_grids_keep_the_ids_under_which_results_are_stored(name: str) -> None:
    """A changed id would run everything anew: the ids of a list that is never made again, but for grids that grow."""
    known = json.loads((Path(__file__).parent / "cell_ids.json").read_text())[name]
    ids = sorted(config.cell_id for config in load_grid(ROOT / "sweeps" / f"{name}.yaml").cells)
    found = {"cells": len(ids), "first": ids[:3], "sha256": hashlib.sha256(" ".join(ids).encode()).hexdigest()}
    assert found == known
