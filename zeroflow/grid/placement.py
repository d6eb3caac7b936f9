"""Where the cells of a sweep run: processes and resources of each, by rules, and how many fit on a cluster at a time.

    placement:
      workers_per_trial: 1
      rules:                                   # for the cells that match, later ones win
        - {when: {queries: ">= 8"}, set: {workers_per_trial: 4}}
        - {when: {method: finetune}, set: {memory_per_worker: 8}}
      out_of_memory:                           # tried in turn by a cell that ran out of memory
        - {evaluation_batch: 16}
        - {gpus_per_worker: 1}

None of it is part of what a cell computes: its id does not depend on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zeroflow.errors import ConfigError, unknown
from zeroflow.grid.cell_placement import CellPlacement
from zeroflow.grid.rules import matches, parse_rule
from zeroflow.optim import optimizers
from zeroflow.trial.config import TrialConfig

Changes = Mapping[str, Any]
Node = Mapping[str, float]

_CELL_KEYS = tuple(f.name for f in dataclasses.fields(CellPlacement))


@dataclass(frozen=True)
class SweepPlacement:
    """How the cells of a sweep are placed on a cluster.

    Attributes:
        cell: of a cell that no rule concerns.
        rules: pairs of what a cell must be (see ``rules.matches``) and what is other then.
        forced: what is other for all cells, whatever rules say.
        out_of_memory: what is other at each further try of a cell that ran out of memory.
        max_concurrent: cells at a time; None: as many as fit.
        retries: how often a cell that died (not one that raised an error of its own) is tried again.
        folder: where Python modules that it names are looked for, beside the current one: the grid file's.
    """

    cell: CellPlacement = field(default_factory=CellPlacement)
    rules: Sequence[tuple[Mapping[str, Any], Changes]] = ()
    forced: Changes = field(default_factory=dict)
    out_of_memory: Sequence[Changes] = ()
    max_concurrent: int | None = None
    retries: int = 2
    folder: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_concurrent", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is None and name == "max_concurrent":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"placement.{name}={value!r}: expected an integer >= {least}")

    def of(self, config: TrialConfig, tries: int = 0) -> CellPlacement:
        """The placement of a cell that has run out of memory ``tries`` times.

        Raises:
            ConfigError: more slices than the mini-batch has samples, or a combination that cannot be.
        """
        changes: dict[str, Any] = {}
        for when, change in self.rules:
            if matches(vars(config), when):
                changes |= change
        changes |= self.forced
        for change in self.out_of_memory[:tries]:
            changes |= change
        return _useful(dataclasses.replace(self.cell, **changes), config)


def _useful(placement: CellPlacement, config: TrialConfig) -> CellPlacement:
    """No more workers than a step of this cell has evaluations of slices to share out."""
    if config.optimizer is None:
        return dataclasses.replace(placement, workers_per_trial=1, data_shards=1)
    if placement.data_shards > (config.batch_size or 1):
        raise ConfigError(
            f"{config.label()}: placement.data_shards={placement.data_shards}: more than the {config.batch_size} samples of a "
            "mini-batch"
        )
    if reason := config.uncut(placement.data_shards):
        raise ConfigError(f"{config.label()}: placement.{reason}")
    info = optimizers.get(config.optimizer)
    evaluations = info.estimator.cost(config.queries or 1)
    groups = min(placement.workers_per_trial // placement.data_shards, evaluations)
    return dataclasses.replace(placement, workers_per_trial=groups * placement.data_shards)


def parse_placement(content: Any, where: str, folder: str | None = None) -> SweepPlacement:
    """The ``placement`` section of a grid file, which is in ``folder``.

    Raises:
        ConfigError: it is wrong; the message says where and what is right.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: placement: expected a mapping, got {content!r}")
    own = ("rules", "out_of_memory", "max_concurrent", "retries")
    for key in content:
        if key not in (*_CELL_KEYS, *own):
            raise unknown("placement key", key, [*_CELL_KEYS, *own], where=where)
    try:
        cell = CellPlacement(**{key: content[key] for key in _CELL_KEYS if key in content})
        rules = [_rule(rule, f"placement.rules[{number}]") for number, rule in enumerate(_list(content, "rules"))]
        steps = [
            _changes(change, f"placement.out_of_memory[{number}]")
            for number, change in enumerate(_list(content, "out_of_memory"))
        ]
        given = {key: content[key] for key in ("max_concurrent", "retries") if key in content}
        return SweepPlacement(cell, rules, out_of_memory=steps, folder=folder, **given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    found = content.get(key) or []
    if not isinstance(found, list):
        raise ConfigError(f"placement.{key}: expected a list, got {found!r}")
    return found


def _rule(rule: Any, where: str) -> tuple[Mapping[str, Any], Changes]:
    when, changes = parse_rule(rule, where)
    return when, _changes(changes, where)


def _changes(changes: Any, where: str) -> Changes:
    if not isinstance(changes, Mapping) or not changes:
        raise ConfigError(f"{where}: expected a mapping of placement keys, got {changes!r}")
    for key in changes:
        if key not in _CELL_KEYS:
            raise unknown("placement key", key, _CELL_KEYS, where=where)
    try:
        # Together with what else holds for a cell a change may still be wrong; alone it must be right.
        workers = {"workers_per_trial": changes["data_shards"]} if "data_shards" in changes else {}
        dataclasses.replace(CellPlacement(), **{**workers, **changes})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return changes


def on_cluster(placement: CellPlacement, nodes: Sequence[Node]) -> CellPlacement:
    """Decide what was left to the cluster: a GPU per worker where there is any."""
    if placement.gpus_per_worker is not None:
        return placement
    return dataclasses.replace(placement, gpus_per_worker=1.0 if any(n.get("GPU", 0) for n in nodes) else 0.0)


def cells_that_fit(placement: CellPlacement, nodes: Sequence[Node]) -> int:
    """How many cells fit at a time: whole workers on whole nodes.

    Raises:
        ConfigError: not even one fits; the message has the numbers.
    """
    need = placement.worker

    def fits(node: Node) -> int:
        room = [int(node.get(name, 0) / need[name]) for name in ("CPU", "memory") if name in need]
        if "GPU" in need:
            gpus = int(node.get("GPU", 0))
            # A share never spans two GPUs.
            room.append(gpus * int(1 / need["GPU"]) if need["GPU"] < 1 else gpus // int(need["GPU"]))
        return min(room)

    cells = sum(fits(node) for node in nodes) // placement.workers_per_trial
    if not cells:
        raise ConfigError(
            f"no cell fits: it needs {placement.workers_per_trial} worker(s) with {_amounts(need)} each; the nodes have "
            + ", ".join(_amounts({k: node.get(k, 0) for k in ("CPU", "GPU", *need)}) for node in nodes)
        )
    return cells


def _amounts(resources: Node) -> str:
    named = {"CPU": "CPU(s)", "GPU": "GPU(s)", "memory": "GiB of memory"}
    amounts = {"CPU": 0.0, "GPU": 0.0, **resources}
    return ", ".join(f"{v / 2**30 if k == 'memory' else v:g} {named[k]}" for k, v in amounts.items())
