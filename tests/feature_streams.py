"""Tasks of features, and classifiers that learn them, for the tests of closed-form classifiers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zeroflow.classifiers import Classifier, classifiers

Array = NDArray[np.float64]
Stream = list[tuple[Tensor, Tensor]]

SMALL = {"random-projection": {"dimension": 50}}
"""Options that make tests fast."""


def build(name: str, **options: object) -> Classifier:
    info = classifiers.get(name)
    return info.build(info.options(**{**SMALL.get(name, {}), **options}))


def stream(
    *, tasks: int = 3, classes: int = 2, each: int = 30, width: int = 12, seed: int = 0, offset: float = 0.0
) -> Stream:
    """Tasks of Gaussian classes with a common, skewed covariance; the samples of a task are shuffled. float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    found = []
    for task in range(tasks):
        labels = torch.arange(task * classes, (task + 1) * classes).repeat(each)
        labels = labels[torch.randperm(len(labels), generator=generator)]
        means = 2 * torch.randn((task + 1) * classes, width, generator=generator, dtype=torch.float64)
        noise = torch.randn(len(labels), width, generator=generator, dtype=torch.float64) @ mix
        found.append((means[labels] + noise + offset, labels))
    return found


def learn(classifier: Classifier, tasks: Stream, cut: int = 1000) -> Classifier:
    """The whole stream, ``cut`` samples at once."""
    begun = 0
    generator = torch.Generator().manual_seed(7)
    for features, labels in tasks:
        end = int(labels.max()) + 1
        classifier.begin_task(range(begun, end), features.shape[1], generator)
        for part in range(0, len(labels), cut):
            classifier.add(features[part : part + cut], labels[part : part + cut])
        classifier.end_task()
        begun = end
    return classifier


def probes(width: int = 12, count: int = 40) -> Tensor:
    return 3 * torch.randn(count, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
