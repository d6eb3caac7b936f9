"""Frozen features are computed once per machine: never another bit in a result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from cells import by_image, features_of
from torch import Tensor

from zeroflow import ConfigError, Placement, TrialConfig, TrialResult, run_trial
from zeroflow.classifiers import register_classifier
from zeroflow.classifiers.class_means import ClassMeans
from zeroflow.data import ArraySamples, ImageDataset, class_order, load_dataset, transforms
from zeroflow.methods.aper import APERAdapter
from zeroflow.methods.shared_adapter import SharedAdapter
from zeroflow.methods.simplecil import SimpleCIL
from zeroflow.models.access import open_backbone
from zeroflow.models.factory import create_backbone
from zeroflow.models.frozen import fingerprint
from zeroflow.models.timm_backbone import TransformerBackbone

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
TINY = {"backbone": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14}
SMALL = {**TINY, "dataset": "some-drawings", "tasks": 10, "stop_after": 2, "method": "simplecil"}
IMAGES = 4 * (12 + 5)
"""Of the four classes of two tasks."""
BESIDE = 2 + 48 // 2
"""Images that a cell passes whatever is known: two for the key, a task's 24 for its memory."""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zeroflow" / "features"


def cell(place: dict[str, Any] | None = None, **settings: Any) -> TrialResult:
    return run_trial(TrialConfig.from_dict({**SMALL, **settings}), Placement(device="cpu", **(place or {})))


def test_a_classifier_may_work_on_features_in_place(some_drawings: str) -> None:
    """The features of test images are kept from stage to stage, those of a view until another one is asked for."""
    found = []
    for inside in (False, True):

        class Shifted(ClassMeans):
            def _shifted(self, features: Tensor, inside: bool = inside) -> Tensor:
                return features.sub_(0.3).mul_(1.5) if inside else (features - 0.3) * 1.5

            def add(self, features: Tensor, labels: Tensor) -> None:
                super().add(self._shifted(features), labels)

            def scores(self, features: Tensor) -> Tensor:
                return super().scores(self._shifted(features))

        register_classifier(f"shifted-{inside}", "shifts features")(Shifted)
        found.append(cell(method="simplecil", classifier=f"shifted-{inside}", optimizer=None, stop_after=4))
    copied, inside = found
    assert np.array_equal(copied.accuracy_matrix, inside.accuracy_matrix, equal_nan=True)


# Bits


class Together(TransformerBackbone):
    """A backbone whose features tell which images were passed together, as a product's last bits may."""

    def forward(self, images: Any, adapters: Any = None) -> Tensor:
        return super().forward(images, adapters) + images.mean()


@pytest.mark.slow
def test_a_class_is_computed_alone_whatever_the_order_the_tasks_the_cache_and_what_is_held_out() -> None:
    dataset = load_dataset("some-drawings")
    backbone = Together(create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14).model)
    expected = {}
    with torch.no_grad():
        for part, samples in (("train", dataset.train), ("test", dataset.test)):
            for label in range(20):
                rows = np.flatnonzero(samples.labels == label)
                for own in (rows[:8], rows[8:]):
                    images = transforms.get("plain").test(samples.images(own), 14)
                    expected |= {
                        (part, int(i)): row.numpy().tobytes() for i, row in zip(own, backbone(images), strict=True)
                    }
    streams: list[dict[str, Any]] = [
        {"increments": [2] * 10},
        {"increments": [20], "order": class_order(20, 7)},
        {"increments": [1, 19], "validation": 0.4},
        {"increments": [5, 10, 5], "order": np.arange(20), "threads": 2},
    ]
    for stream in streams:
        for cache_bytes in (0, 10**9, 10**9):
            found = by_image(dataset, features_of(dataset, backbone, cache_bytes=cache_bytes), **stream)
            assert found == {key: expected[key] for key in found}
            assert len(found) == (20 * 12 if "validation" in stream else 20 * 17)


@pytest.mark.parametrize("settings", [{}, {"validation": 0.25}, {"access": "spiking"}, {"access": "int8"}])
def test_a_cell_has_the_same_result_with_a_cold_a_warm_and_no_cache(
    settings: dict[str, Any], passed: list[int]
) -> None:
    first = cell(**settings)
    assert sum(passed) >= IMAGES
    results = [first, cell(**settings), cell({"cache_bytes": 0}, **settings)]
    for found in results[1:]:
        np.testing.assert_array_equal(found.accuracy_matrix, first.accuracy_matrix)
        assert found.summary["peak_memory_bytes"] == first.summary["peak_memory_bytes"] > 0
    assert "queried_images" not in first.summary


def test_a_second_cell_computes_only_what_no_cell_has_needed_before(passed: list[int]) -> None:
    order = [*range(20)]
    cell(fixed_class_order=order)
    assert sum(passed) == IMAGES + BESIDE
    passed.clear()
    cell(fixed_class_order=order)
    assert sum(passed) == BESIDE
    passed.clear()
    cell(fixed_class_order=[19, 3, 18, 1, *[c for c in order if c not in (19, 3, 18, 1)]])
    assert sum(passed) == 2 * 17 + BESIDE, "classes 1 and 3 are known"


def test_aper_looks_its_frozen_half_up_and_ends_as_without_a_cache() -> None:
    more = {"method": "aper-adapter", "optimizer": "zo-sgd", "lr": 0.01, "epochs": 1, "batch_size": 8}
    cell()
    warm, none = cell(**more), cell({"cache_bytes": 0}, **more)
    np.testing.assert_array_equal(warm.accuracy_matrix, none.accuracy_matrix)
    assert [s.loss for s in warm.steps] == [s.loss for s in none.steps]


def test_spiking_features_are_those_of_their_own_first_task() -> None:
    """What a neuron fires at most is found on the first task: features of another first task are others."""
    for seed in (1993, 5):
        found = [cell(place, access="spiking", class_order_seed=seed) for place in ({}, {}, {"cache_bytes": 0})]
        for other in found[1:]:
            np.testing.assert_array_equal(other.accuracy_matrix, found[0].accuracy_matrix)
    assert len({path.parent for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("train-*")}) == 2


def test_a_class_with_features_of_its_own_takes_images_unless_it_says_otherwise() -> None:
    class Moves(SimpleCIL):
        def features(self, images: Tensor, spaces: range) -> Tensor:
            return images.flatten(1)[:, None]

    class Inherits(SimpleCIL):
        pass

    assert (Moves.takes, Inherits.takes, SharedAdapter.takes) == ("images", "features", "images")


@pytest.mark.parametrize(("merge", "takes"), [(True, "both"), (False, "images")])
def test_aper_needs_frozen_features_where_it_keeps_them(merge: bool, takes: str) -> None:
    backbone = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14)
    assert APERAdapter(backbone, APERAdapter.Options(merge=merge)).takes == takes


# What tells features apart


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"transform": "timm"}, {}), ({"image_size": 7}, {}), ({"access": "int8"}, {}), ({"dtype": "float64"}, {}),
        ({}, {"evaluation_batch": 10}), ({}, {"threads": 2}),
    ],
)  # fmt: skip
def test_what_changes_features_makes_them_anew(settings: dict[str, Any], place: dict[str, Any], cache: Path) -> None:
    cell()
    cell(place, **settings)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_weights_tell_features_apart_and_the_name_of_their_file_does_not(tmp_path: Path, cache: Path) -> None:
    state, keys = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14).model.state_dict(), []
    for number, change in enumerate((0.0, 0.0, 1e-6)):
        file = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file({**state, "norm.bias": state["norm.bias"] + change}, file)
        cell(checkpoint=str(file))
        keys.append(len([path for path in cache.iterdir() if path.is_dir()]))
    assert keys == [1, 1, 2]


def test_a_program_in_a_file_is_known_by_what_it_computes_not_by_its_path(tmp_path: Path, cache: Path) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.layer, self.scale = torch.nn.Linear(3 * 14 * 14, 8), scale

        def forward(self, images: Tensor) -> Tensor:
            bright = images.flatten(1)
            return self.layer(torch.where(bright > 0.9, self.scale * bright, bright))

    keys, files = [], [tmp_path / name for name in ("one.pt2", "copy.pt2", "other.pt2")]
    for file, scale in ((files[0], 1.0), (files[2], -1.0)):
        torch.manual_seed(0)
        images, free = torch.rand(2, 3, 14, 14), {0: torch.export.Dim.DYNAMIC}
        torch.export.save(torch.export.export(Scaled(scale), (images,), dynamic_shapes=(free,)), file)
    files[1].write_bytes(files[0].read_bytes())
    for file in files:
        cell(backbone=str(file), checkpoint=None)
        keys.append(len([path for path in cache.iterdir() if path.is_dir()]))
    assert keys == [1, 1, 2]


@pytest.mark.parametrize("access", ["white-box", "spiking", "int8", "exported"])
def test_a_fingerprint_changes_with_any_weight(access: str, tmp_path: Path) -> None:
    if access == "exported":
        pytest.importorskip("onnxruntime")
    state = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14).model.state_dict()
    prints = []
    for change in (None, "blocks.1.mlp.fc2.weight", "patch_embed.proj.bias", "norm.weight", None):
        other = {name: value.clone() for name, value in state.items()}
        if change:
            other[change].view(-1)[-1] += 0.125
        file = tmp_path / f"{len(prints)}.safetensors"
        safetensors.torch.save_file(other, file)
        arguments = {"checkpoint": str(file), "image_size": 14}
        prints.append(fingerprint(open_backbone(access, "zeroflow_tiny_vit", **arguments)))
    assert len(set(prints)) == 4 and prints[0] == prints[-1]


def test_another_pixel_or_label_is_another_data_set(passed: list[int]) -> None:
    whole, counts = load_dataset("some-drawings"), []
    pixels, labels = whole.test.images(np.arange(100)), whole.test.labels
    changed = pixels.clone()
    changed[99, 0, 0, 0] += 1
    turned = labels.copy()
    turned[[0, -1]] = turned[[-1, 0]]
    for part in (ArraySamples(pixels, labels), ArraySamples(changed, labels), ArraySamples(pixels, turned)):
        dataset = ImageDataset(whole.name, whole.class_names, whole.train, part)
        by_image(dataset, features_of(dataset), [20])
        counts.append(sum(passed))
        passed.clear()
    assert counts == [2 + 20 * 17, 2 + 5, 2 + 20 * 17], "beside two for the key: all, those of one class, all"


# Features that are none


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    state = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14).model.state_dict()
    state["norm.weight"][3] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(ConfigError, match=r"broken.safetensors: weights that are not finite: norm.weight$"):
        create_backbone("zeroflow_tiny_vit", checkpoint=str(tmp_path / "broken.safetensors"), image_size=14)


@pytest.mark.parametrize(
    ("name", "value", "blame"),
    [
        ("blocks.1.norm1.bias", float("nan"), "its weights model.blocks.1.norm1.bias are not finite"),
        ("blocks.0.mlp.fc1.bias", 1e38, "its weights are finite, the output of model.blocks.0.mlp.fc2 is not"),
    ],
)
def test_features_that_are_not_finite_are_refused_with_what_is_to_blame(name: str, value: float, blame: str) -> None:
    dataset, backbone = (
        load_dataset("some-drawings"),
        create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14),
    )
    with torch.no_grad():
        backbone.model.get_parameter(name)[:] = value
        backbone.model.blocks[0].mlp.fc2.weight.fill_(1.0)
    first = class_order(20)[0]
    where = rf"data set 'some-drawings', train, class '{dataset.class_names[first]}', image 0: the backbone's features"
    for cache_bytes in (0, 10**9):
        with pytest.raises(ConfigError, match=f"{where} are not finite: {blame}"):
            by_image(dataset, features_of(dataset, backbone, cache_bytes=cache_bytes), [20])


def test_the_image_is_named_whose_features_are_not_finite() -> None:
    dataset, plain = (
        load_dataset("some-drawings"),
        create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14),
    )
    odd = transforms.get("plain").test(dataset.test.images(np.array([3 * 5 + 2])), 14)

    class Odd(TransformerBackbone):
        def forward(self, images: Any, adapters: Any = None) -> Tensor:
            same = (images == odd).flatten(1).all(1)
            return super().forward(images, adapters).masked_fill(same[:, None], float("inf"))

    with pytest.raises(ConfigError, match=rf"test, class '{dataset.class_names[3]}', image 2: .* not finite$"):
        by_image(dataset, features_of(dataset, Odd(plain.model), batch_size=2), [20])
