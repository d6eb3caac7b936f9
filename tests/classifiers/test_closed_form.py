"""Closed-form classifiers as an axis of cells: which methods take them, what they are called, and what they change."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zeroflow import ConfigError, TrialConfig, TrialResult, run_trial
from zeroflow.classifiers import ClassMeans, classifiers
from zeroflow.grid.grid_file import parse_grid
from zeroflow.methods import EASE, SimpleCIL, methods
from zeroflow.models.factory import create_backbone
from zeroflow.results.summary import summary

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
STREAM = {"dataset": "some-drawings", "transform": "plain", "tasks": 5, "stop_after": 3}
TINY = {**STREAM, "backbone": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14}
TRAINED = {**TINY, "method": "aper-adapter", "optimizer": "fo-sgd", "lr": 0.05, "epochs": 2, "batch_size": 12}
NAMED = {"slda": "lda", "acil": "ridge", "ranpac": "random-projection", "fecam": "qda"}


def config(**values: Any) -> TrialConfig:
    return TrialConfig.from_dict(values)


def run(**values: Any) -> TrialResult:
    return run_trial(config(**values))


@pytest.mark.parametrize(("name", "classifier"), NAMED.items())
def test_a_named_method_is_simplecil_with_its_classifier_and_the_same_cell(name: str, classifier: str) -> None:
    named, chosen = config(**STREAM, method=name), config(**STREAM, method="simplecil", classifier=classifier)
    assert named == chosen and named.cell_id == chosen.cell_id
    assert config(**STREAM, method=name, classifier=classifier) == named
    assert (named.method, named.classifier) == (name, None)


def test_a_classifier_that_is_the_methods_own_changes_no_id() -> None:
    # The id of a cell that was committed before there were classifiers.
    known = config(method="simplecil", dataset="quickdraw100-marker", transform="plain", stop_after=5)
    assert known.cell_id == "5ed05a052de41e74"
    assert config(**{**asdict(known), "classifier": "class-means"}) == known
    assert config(**STREAM, method="ranpac", classifier_options={"dimension": 0, "ridge": 0}).classifier_options == {}


@pytest.mark.slow
def test_second_order_statistics_beat_class_means_where_the_backbone_is_far_from_home() -> None:
    """On the stream and the backbone that users see first, its first two tasks."""
    stream = {"dataset": "quickdraw100-marker", "transform": "plain", "stop_after": 2}
    gained = {name: run(**stream, method=name).summary["avg"] for name in ("simplecil", "slda", "acil", "ranpac")}
    assert min(gained[name] - gained["simplecil"] for name in ("slda", "acil", "ranpac")) > 8, gained


def test_seeds_are_cells_of_their_own_only_where_something_is_drawn() -> None:
    fixed, drawn = ({config(**TINY, method=m, seed=seed).cell_id for seed in (0, 1, 2)} for m in ("slda", "ranpac"))
    assert (len(fixed), len(drawn)) == (1, 3)
    first, again, other = (
        run(**TINY, method="ranpac", classifier_options={"dimension": 30}, seed=seed).accuracy_matrix
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other, equal_nan=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "simplecil", "classifier": "rigde"}, r"unknown classifier 'rigde'; did you mean 'ridge'"),
        ({"method": "simplecil", "classifier": 3}, r"classifier=3: expected a string"),
        ({"method": "finetune", "classifier": "lda"}, r"classifier='lda' with method 'finetune': it classifies in its own way; any is taken by aper-adapter, "),
        ({"method": "ease", "classifier": "ridge"}, r"of an old class there are no images in a newer task's space.*it takes class-means, lda; any is taken by"),
        ({"method": "ranpac", "classifier": "lda"}, r"its classifier is what it is named for; method simplecil takes any classifier; it takes random-projection"),
        ({"method": "acil", "classifier_options": {"rigde": 1.0}}, r"classifier_options: unknown option of classifier 'ridge' 'rigde'; did you mean 'ridge'"),
        ({"method": "acil", "classifier_options": {"ridge": -1.0}}, r"classifier_options: ridge=-1.0: expected"),
        ({"method": "ranpac", "classifier_options": {"dimension": -5}}, r"classifier_options: dimension=-5: expected"),
        ({"method": "ranpac", "classifier_options": {"dimension": 2.5}}, r"classifier_options.dimension=2.5: expected an integer"),
        ({"method": "slda", "classifier_options": {"shrinkage": "fixed", "amount": 2.0}}, r"amount=2.0: expected a share"),
        ({"method": "finetune", "classifier_options": {"ridge": 1.0}}, r"expected no options: there is no classifier"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_any_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**STREAM, **values)


def test_training_does_not_depend_on_the_classifier_but_accuracy_does() -> None:
    means, projected = (
        run(**TRAINED),
        run(**TRAINED, classifier="random-projection", classifier_options={"dimension": 40}),
    )
    assert [step.loss for step in means.steps] == [step.loss for step in projected.steps]
    assert not np.array_equal(means.accuracy_matrix, projected.accuracy_matrix, equal_nan=True)


@pytest.mark.parametrize("classifier", ["lda", "random-projection", "qda"])
def test_an_interrupted_cell_ends_with_the_bits_of_one_that_was_not(classifier: str, tmp_path: Path) -> None:
    cell = config(**TRAINED, classifier=classifier)

    def stop(stage: int, *_: Any) -> None:
        if stage == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(cell, on_stage=stop, folder=tmp_path)
    resumed, whole = run_trial(cell, folder=tmp_path), run_trial(cell)
    np.testing.assert_array_equal(resumed.accuracy_matrix, whole.accuracy_matrix)
    assert resumed.summary["peak_memory_bytes"] == whole.summary["peak_memory_bytes"]


def test_statistics_are_part_of_the_memory() -> None:
    small, large = (
        run(**TINY, method="ranpac", classifier_options={"dimension": size, "ridge": 1.0}).summary["peak_memory_bytes"]
        for size in (100, 700)
    )
    gram = 8 * (700**2 - 100**2)
    assert gram <= large - small <= 1.2 * gram


def test_covariances_of_classes_count_as_they_are_learned() -> None:
    """A covariance for each of 12 classes, float64; the peak of a forward pass is measured at the first 4."""
    grown = (
        run(**TINY, method="fecam").summary["peak_memory_bytes"]
        - run(**TINY, method="simplecil").summary["peak_memory_bytes"]
    )
    assert grown >= 12 * 32 * 32 * 8


def test_ease_takes_the_discriminant_that_lda_would_take_in_each_space() -> None:
    """With one task there is one space and nothing to complete: the same ranking as LDA on its features."""
    backbone = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14)
    ease, generator = EASE(backbone), torch.Generator().manual_seed(0)
    ease.classifier = classifiers.get("lda").build()
    images, labels = torch.rand(60, 3, 14, 14, generator=generator), torch.arange(60) % 4
    images += labels[:, None, None, None] / 4
    ease.begin_task(range(4), generator)
    ease.eval()
    ease.freeze()
    ease.end_task([(images, labels)])
    plain = SimpleCIL(backbone)
    plain.classifier = classifiers.get("lda").build()
    plain.begin_task(range(4), generator)
    plain.freeze()
    plain.end_task([(images, labels)])
    ours, theirs = (method.scores(method.features(images, range(1))) for method in (ease, plain))
    torch.testing.assert_close(ours, theirs.double().log_softmax(1), rtol=1e-4, atol=1e-4)


def test_foro_is_prompts_and_a_random_projection_of_the_prompted_features() -> None:
    cell = {
        **TINY,
        "method": "foro",
        "optimizer": "es-cma",
        "queries": 4,
        "epochs": 1,
        "batch_size": 24,
        "loss": "class-means",
    }
    result = run(**cell)
    assert result.summary["trainable_parameters"] == 3 * 32
    assert result.summary["forward_passes"] == 4 * 2
    info = methods.get("foro")
    assert info.build(create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14)).width == 32


def test_a_grid_has_classifiers_and_their_options_as_axes() -> None:
    grid = parse_grid(
        {
            "name": "own",
            "base": {**TINY, "classifier_options": {"ridge": 2.0}},
            "grid": [
                {"method": "simplecil", "classifier": ["class-means", "ridge"]},
                {"method": "ranpac", "classifier_options.dimension": [10, 20]},
            ],
        },
        where="own.yaml",
    )
    assert [(c.method, c.classifier, dict(c.classifier_options)) for c in grid.cells] == [
        ("simplecil", None, {}),
        ("acil", None, {"ridge": 2.0}),
        ("ranpac", None, {"ridge": 2.0, "dimension": 10}),
        ("ranpac", None, {"ridge": 2.0, "dimension": 20}),
    ]


def test_the_row_to_beat_is_class_means_whatever_else_simplecil_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from zeroflow.classifiers.classifier import ClassifierInfo
    from zeroflow.results.rows import tables

    class Half(ClassMeans):
        """A classifier of somebody else's, which no method is named after."""

    monkeypatch.setitem(classifiers._entries, "half", ClassifierInfo("half", Half, "of the tests"))
    import pyarrow as pa

    found = [
        run(**TINY, method="simplecil"),
        run(**TINY, method="simplecil", classifier="half"),
        run(**TINY, method="slda"),
    ]
    rows = summary(pa.concat_tables([tables(result)["trials"] for result in found]))
    assert [(row.is_baseline, row.label) for row in rows] == [
        (True, "simplecil"),
        (False, "simplecil half"),
        (False, "slda"),
    ]
    assert rows[0].vs_simplecil is None and rows[1].vs_simplecil == 0.0
