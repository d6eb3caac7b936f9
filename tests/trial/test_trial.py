"""A cell's run on the embedded data: its metrics, its memory, what it pays and learns."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from places import ROOT

import zeroflow.data
import zeroflow.methods
import zeroflow.models.backbone
import zeroflow.optim
import zeroflow.results
from zeroflow import ConfigError, TrialConfig, run_trial
from zeroflow.cli import main
from zeroflow.grid.grid_file import parse_grid
from zeroflow.models.factory import create_backbone
from zeroflow.trial import metrics

SMALL = {"dataset": "some-drawings", "tasks": 4, "epochs": 2, "batch_size": 16}
SMALLER = {**SMALL, "image_size": 14}
"""On a quarter of the pixels."""
pytestmark = pytest.mark.usefixtures("some_drawings")


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


@functools.cache
def frozen_features() -> tuple[np.ndarray, np.ndarray]:
    data, backbone = zeroflow.data.load_dataset("some-drawings"), create_backbone()
    with torch.no_grad():
        train, test = (
            backbone((part.pixels.float() / 255).expand(-1, 3, -1, -1)).double().numpy()
            for part in (data.train, data.test)
        )
    return train, test


def class_mean_cosines(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of each test drawing with each class mean, and its class, under new labels; with NumPy."""
    data, (train, test) = zeroflow.data.load_dataset("some-drawings"), frozen_features()
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
    common = {**SMALLER, "method": method, "optimizer": "zo-sgd", "epochs": 1}
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
        ("ease", "zo-sgd", 32),
        ("aper-adapter", "fo-sgd", 8),
        ("aper-adapter", "forward-grad", 8),
    ],
)
def test_the_same_configuration_gives_the_same_bits(method: str, optimizer: str, forwards: int) -> None:
    values = {**SMALLER, "stop_after": 2, "method": method, "optimizer": optimizer}
    config = TrialConfig.from_dict(values)
    first = run_trial(config)
    torch.rand(7), np.random.rand(3)  # whatever else draws random numbers must not matter
    second = run_trial(config)
    assert [step.loss for step in first.steps] == [step.loss for step in second.steps]
    np.testing.assert_array_equal(first.accuracy_matrix, second.accuracy_matrix)
    assert first.summary["forward_passes"] == forwards
    other = run_trial(TrialConfig.from_dict({**values, "stop_after": 1, "seed": 1}))
    assert first.steps[0].loss != other.steps[0].loss


@pytest.mark.slow
def test_first_order_training_learns_the_first_task() -> None:
    config = {**SMALLER, "method": "aper-adapter", "optimizer": "fo-sgd", "epochs": 20, "lr": 0.5, "stop_after": 1}
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
            TrialConfig.from_dict(
                {**SMALL, "stop_after": 1, "method": "aper-adapter", "optimizer": optimizer, "batch_size": 24}
            )
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
def test_every_optimizer_runs_a_trial_and_pays_what_it_says(name: str, tiny_vit: dict) -> None:
    options = {"separable": True} if name == "es-cma" else {}  # too many parameters for a full covariance matrix
    config = TrialConfig.from_dict(
        {**SMALL, **tiny_vit, "method": "aper-adapter", "optimizer": name, "epochs": 1, "optimizer_options": options}
    )
    result = run_trial(config)
    info = zeroflow.optim.optimizers.get(name)
    steps = 4  # 5 classes of 12 drawings in mini-batches of 16, the last one smaller
    extra = {"zo-svrg": 2 * steps, "zo-per-example": 5 + 5}.get(
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
        run_trial(TrialConfig.from_dict({**SMALL, "method": "ease", "optimizer": name, "lr": 0.1, "stop_after": 1}))
        for name in ("fo-sgd", "fo-sgd-checkpoint")
    )
    assert [step.loss for step in plain.steps] == [step.loss for step in checkpointed.steps]
    assert checkpointed.summary["peak_memory_bytes"] < 0.75 * plain.summary["peak_memory_bytes"]
