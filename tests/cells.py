"""Small cells and parts of them, and whether two came to the same, for the tests of what runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from zeroflow import TrialResult
from zeroflow.data import ImageDataset, class_incremental, load_dataset, transforms
from zeroflow.methods import MiniBatch
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import create_backbone
from zeroflow.trial.features import FrozenFeatures


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def assert_same_bits(found: TrialResult, whole: TrialResult) -> None:
    def steps(result: TrialResult) -> list[tuple]:
        return [(step.task, step.epoch, step.step, step.loss, step.lr) for step in result.steps]

    assert steps(found) == steps(whole)
    for name in ("accuracy_matrix", "task_incremental", "domain_incremental"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    for counted, expected in zip(found.confusion, whole.confusion, strict=True):
        np.testing.assert_array_equal(counted, expected)
    for name in ("forward_passes", "forward_equivalents", "trainable_parameters"):
        assert found.summary[name] == whole.summary[name], name


PROMPTED = {
    "backbone": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14, "dataset": "some-drawings", "tasks": 10,
    "stop_after": 2, "epochs": 1, "batch_size": 8, "optimizer": "zo-sgd", "lr": 0.01, "method": "finetune",
    "method_options": {"tune": "input-prompt"},
}  # fmt: skip
"""Two tasks of the tiny transformer, of which an input prompt alone is trained."""


def drawings(count: int, first: int = 0) -> MiniBatch:
    """Some training drawings of the classes 0..4, in turn."""
    samples = load_dataset("some-drawings").train
    chosen = np.array([np.flatnonzero(samples.labels == i % 5)[first + i // 5] for i in range(count)])
    images = (samples.images(chosen).float() / 255).expand(-1, 3, -1, -1).contiguous()
    return MiniBatch(images, torch.from_numpy(samples.labels[chosen]))


def features_of(dataset: ImageDataset, backbone: Backbone | None = None, **how: Any) -> FrozenFeatures:
    settings = {"batch_size": 8, "cache_bytes": 10**9, "names": {}, **how}
    return FrozenFeatures(
        backbone or create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14),
        dataset,
        torch.device("cpu"),
        torch.float32,
        **settings,
    )


def by_image(dataset: ImageDataset, found: FrozenFeatures, increments: list[int], **how: Any) -> dict[Any, bytes]:
    """The bits of every image's features as a stream of tasks asks for them."""
    bits = {}
    for task in class_incremental(dataset, increments, transforms.get("plain"), 14, **how).tasks:
        for view in (task.train, task.test):
            part = "train" if view.samples is dataset.train else "test"
            features = found.of(view)
            assert features.shape == (len(view), 32)
            bits |= {(part, int(i)): row.numpy().tobytes() for i, row in zip(view.indices, features, strict=True)}
    return bits
