"""Data sets, transforms and the class-incremental scenario. Importing the package registers the built-in ones."""

from zeroflow.data import cifar, folders, parquet, quickdraw, shifts  # noqa: F401
from zeroflow.data.ahead import prefetched
from zeroflow.data.dataset import ArraySamples, ImageDataset, datasets, load_dataset, register_dataset
from zeroflow.data.folders import image_folder
from zeroflow.data.parquet import parquet_images
from zeroflow.data.preprocessing import Preprocessing
from zeroflow.data.scenario import Scenario, Task, class_incremental, class_order, even_increments
from zeroflow.data.transforms import Transform, transform_of, transforms

__all__ = [
    "ArraySamples", "ImageDataset", "Preprocessing", "Scenario", "Task", "Transform", "class_incremental", "class_order",
    "datasets", "even_increments", "image_folder", "load_dataset", "parquet_images", "prefetched", "register_dataset",
    "transform_of", "transforms",
]  # fmt: skip
