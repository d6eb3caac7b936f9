"""Data sets made for the tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zeroflow.data import ArraySamples, ImageDataset, load_dataset
from zeroflow.data.dataset import datasets, register_dataset


@pytest.fixture(scope="session")
def few_images() -> str:
    """A registered data set of 4 classes with 2 training and 1 test image each, 40 x 40 RGB."""
    name = "few-images"
    if name not in datasets.names():

        @register_dataset(
            name, classes=4, transform="plain", image_size=40, where="made by the tests", description="4 classes"
        )
        def load(data_dir=None) -> ImageDataset:
            generator = torch.Generator().manual_seed(0)

            def part(per_class: int) -> ArraySamples:
                labels = np.repeat(np.arange(4), per_class)
                pixels = torch.randint(0, 256, (len(labels), 3, 40, 40), generator=generator, dtype=torch.uint8)
                return ArraySamples(pixels, labels)

            return ImageDataset(name, ("a", "b", "c", "d"), part(2), part(1))

    return name


@pytest.fixture(scope="session")
def some_drawings() -> str:
    """A registered part of QuickDraw-100: its first 20 classes with 12 training and 5 test drawings each."""
    name = "some-drawings"
    if name not in datasets.names():

        @register_dataset(
            name, classes=20, transform="drawings", image_size=28, where="made by the tests", description="20 classes"
        )
        def load(data_dir=None) -> ImageDataset:
            whole = load_dataset("quickdraw100")

            def part(samples, per_class: int) -> ArraySamples:
                chosen = np.concatenate([np.flatnonzero(samples.labels == label)[:per_class] for label in range(20)])
                return ArraySamples(samples.images(chosen), samples.labels[chosen])

            return ImageDataset(name, whole.class_names[:20], part(whole.train, 12), part(whole.test, 5))

    return name
