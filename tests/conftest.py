"""Data sets made for the tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zeroflow.data import ArraySamples, ImageDataset
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
