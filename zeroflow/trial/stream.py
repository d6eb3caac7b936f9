"""The stream of tasks that a cell runs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from zeroflow.data import Scenario, class_incremental, class_order, datasets, even_increments, load_dataset
from zeroflow.data.dataset import ImageDataset
from zeroflow.data.transforms import transform_of
from zeroflow.defaults import CACHE_BYTES
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.keys.training import check_batches


def scenario_of(config: TrialConfig, dataset: ImageDataset, size: int, threads: int = 0) -> Scenario:
    """Cut a data set into a cell's tasks.

    Args:
        config: the cell.
        dataset: the one that it names, opened.
        size: of the images, pixels.
        threads: that prepare mini-batches ahead; 0: each is made when it is asked for.

    Raises:
        ConfigError: classes that do not divide into such tasks, or mini-batches too small for the loss.
    """
    classes, order = len(dataset.class_names), config.fixed_class_order
    if order is None:
        chosen = class_order(classes, config.class_order_seed)
    else:
        chosen = np.arange(classes) if order == "sorted" else np.array(order)
    increments = config.increments or even_increments(classes, config.tasks, config.base_classes)
    check_batches(config, increments)
    transform = config.transform or datasets.get(config.dataset).transform
    whole = class_incremental(
        dataset,
        increments,
        transform_of(transform, config.preprocessing),
        size,
        order=chosen,
        validation=config.validation,
        threads=threads,
    )
    return dataclasses.replace(whole, tasks=whole.tasks[: config.stop_after])


def training_batches(config: TrialConfig, data_dir: str | None, cache_bytes: int = CACHE_BYTES) -> list[int]:
    """Count the mini-batches of an epoch of each task that a cell runs. Opens the data set.

    Raises:
        ConfigError: the data is not there.
    """
    tasks = scenario_of(config, load_dataset(config.dataset, data_dir, cache_bytes=cache_bytes), 1).tasks
    return [math.ceil(len(task.train) / (config.batch_size or 1)) for task in tasks]
