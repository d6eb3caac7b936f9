"""The stream of tasks that a cell runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from zeroflow.data import Scenario, class_incremental, class_order, datasets, even_increments, load_dataset
from zeroflow.data.dataset import ImageDataset
from zeroflow.data.transforms import transform_of
from zeroflow.defaults import CACHE_BYTES
from zeroflow.errors import ConfigError
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.keys.training import check_tasks
from zeroflow.trial.keys.values import as_json

_OF_TASKS = (
    "method", "method_options", "tasks", "base_classes", "increments", "class_order_seed", "fixed_class_order", "stop_after",
    "validation", "loss", "batch_size", "later",
)  # fmt: skip
"""What decides whether a data set can be cut into a cell's tasks, and whether these can be learned."""


def scenario_of(config: TrialConfig, dataset: ImageDataset, size: int, threads: int = 0) -> Scenario:
    """Cut a data set into a cell's tasks.

    Args:
        config: the cell.
        dataset: the one that it names, opened.
        size: of the images, pixels.
        threads: that prepare mini-batches ahead; 0: each is made when it is asked for.

    Raises:
        ConfigError: classes that do not divide into such tasks, tasks that the method cannot learn, or mini-batches too small for
            the loss.
    """
    classes, order = len(dataset.class_names), config.fixed_class_order
    if order is None:
        chosen = class_order(classes, config.class_order_seed)
    else:
        chosen = np.arange(classes) if order == "sorted" else np.array(order)
    increments = config.increments or even_increments(classes, config.tasks, config.base_classes)
    check_tasks(config, increments)
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


def check_streams(cells: Iterable[TrialConfig], dataset: ImageDataset) -> None:
    """Refuse cells whose tasks an opened data set cannot be cut into.

    Args:
        cells: all of them of this data set.
        dataset: opened.

    Raises:
        ConfigError: the problems, each with a cell that has it.
    """
    problems: dict[str, str] = {}
    seen = set()
    for config in cells:
        keys = as_json({key: getattr(config, key) for key in _OF_TASKS})
        if keys not in seen:
            seen.add(keys)
            try:
                scenario_of(config, dataset, 1)
            except ConfigError as error:
                problems.setdefault(str(error), config.label())
    if problems:
        raise ConfigError("\n".join(f"{label}: {problem}" for problem, label in problems.items()))


def training_batches(config: TrialConfig, data_dir: str | None, cache_bytes: int = CACHE_BYTES) -> list[int]:
    """Count the mini-batches of an epoch of each task that a cell runs. Opens the data set.

    Raises:
        ConfigError: the data is not there.
    """
    tasks = scenario_of(config, load_dataset(config.dataset, data_dir, cache_bytes=cache_bytes), 1).tasks
    return [math.ceil(len(task.train) / (config.batch_size or 1)) for task in tasks]
