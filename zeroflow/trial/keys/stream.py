"""The keys of the stream: how a data set's classes are ordered and cut into tasks, and how much of them is run."""

from __future__ import annotations

from typing import Any

from zeroflow.data.scenario import check_increments, check_order, class_order, even_increments
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.keys.values import is_list_of_integers, is_natural, is_number, is_positive, require


def stream_keys(config: TrialConfig, classes: int | None) -> dict[str, Any]:
    """The keys in normal form.

    Args:
        config: the cell.
        classes: of its data set; None: that is known only once it is opened.

    Raises:
        ConfigError: which key, its value and what was expected.
    """
    keys = {**_tasks(config, classes), **_class_order(config, classes)}
    share, stop, tasks = config.validation, config.stop_after, keys["tasks"]
    require("validation", share, is_number(share) and 0 <= share < 1, "a share in [0, 1)")
    require("stop_after", stop, stop is None or (is_positive(stop) and stop <= tasks), f"1..{tasks} tasks")
    return {**keys, "validation": float(share), "stop_after": None if stop == tasks else stop}


def _tasks(config: TrialConfig, classes: int | None) -> dict[str, Any]:
    """The keys that cut the stream into tasks: the fewest that say the same, where the number of classes is known."""
    tasks, base, increments = config.tasks, config.base_classes, config.increments
    require("tasks", tasks, is_positive(tasks), "an integer >= 1")
    require("base_classes", base, base is None or is_positive(base), "an integer >= 1, the classes of the first task")
    require(
        "increments",
        increments,
        increments is None or is_list_of_integers(increments),
        "a list of the classes of every task; where a list is an axis of a grid: [[50, 25, 25]]",
    )
    if increments is not None:
        require("base_classes", base, base is None, "no value beside increments, which says the same")
        tasks = len(increments)
    if classes is not None:
        counts = even_increments(classes, tasks, base) if increments is None else increments
        check_increments(counts, classes)
        base = counts[0] if len(set(counts)) > 1 and len(set(counts[1:])) == 1 else None
        increments = counts if len(set(counts[1:])) > 1 else None
    return {"tasks": tasks, "base_classes": base, "increments": increments}


def _class_order(config: TrialConfig, classes: int | None) -> dict[str, Any]:
    """The keys of the class order; an order that has a name goes by it, where the number of classes is known."""
    seed, fixed = config.class_order_seed, config.fixed_class_order
    require("class_order_seed", seed, is_natural(seed) and seed < 2**32, "an integer in 0..2^32-1")
    if fixed is None:
        return {}
    require(
        "fixed_class_order",
        fixed,
        fixed == "sorted" or is_list_of_integers(fixed),
        "'sorted' or a list of the data set's labels; where a list is an axis of a grid: [[2, 0, 1]]",
    )
    if not isinstance(fixed, str):
        check_order(fixed, classes or len(fixed))
    if classes is not None:
        own = list(range(classes))
        labels = own if isinstance(fixed, str) else fixed
        usual = labels == class_order(classes, TrialConfig.class_order_seed).tolist()
        fixed = None if usual else "sorted" if labels == own else labels
    return {"fixed_class_order": fixed, "class_order_seed": TrialConfig.class_order_seed}
