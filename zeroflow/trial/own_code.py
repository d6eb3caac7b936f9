"""What a cell computes with that somebody may have added: its parts in the registries, and the modules that define them.

A part counts whether a key names it or is left out, so that it stands there by default.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from zeroflow import options
from zeroflow.classifiers import classifiers
from zeroflow.data import datasets, transforms
from zeroflow.data.dataset import ImageDataset
from zeroflow.imports import MODULE, imports_with
from zeroflow.methods import methods
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import own_backbones
from zeroflow.models.tuning import tunings
from zeroflow.optim import optimizers
from zeroflow.trial.config import TrialConfig

_BEGAN = time.time()
_KNOWN = frozenset(["zeroflow", "torch", "torchvision", "timm", *sys.stdlib_module_names])
"""Packages whose code a version stands for."""
# Hold no code, or too much to look through.
_PLAIN = (str, bytes, int, float, type(None), Tensor, np.ndarray)


class Part(NamedTuple):
    """Something that a cell takes from a registry.

    Attributes:
        name: that it is registered under.
        entry: what is registered.
        options: all that it takes, with their values in this cell.
    """

    name: str
    entry: Any
    options: Mapping[str, Any] = {}


def parts_of(config: TrialConfig) -> list[Part]:
    """All parts of a cell; of its backbone, what builds it."""
    method = methods.get(config.method)
    chosen = method.parse(dict(config.method_options))
    tuning = method.build.tunes(chosen)
    found = [*feature_parts(config), Part(config.method, method, vars(chosen)), Part(tuning, tunings.get(tuning))]
    if classifier := config.classifier or method.build.own_classifier:
        info = classifiers.get(classifier)
        found.append(Part(classifier, info, {**options.defaults(info.options), **config.classifier_options}))
    for settings in (config, config.at(config.later["task"] - 1)) if config.later else (config,):
        if settings.optimizer:
            optimizer = optimizers.get(settings.optimizer)
            found.append(Part(settings.optimizer, optimizer, {**optimizer.options, **settings.optimizer_options}))
    return found


def feature_parts(config: TrialConfig) -> list[Part]:
    """The parts of a cell that its frozen features come from."""
    dataset = datasets.get(config.dataset)
    transform = config.transform or dataset.transform
    return [
        Part(config.dataset, dataset),
        Part(transform, transforms.get(transform)),
        Part(config.backbone, _builder(config.backbone)),
    ]


def feature_code(config: TrialConfig, dataset: ImageDataset, backbone: Backbone) -> dict[str, str] | None:
    """Hashes of the code of somebody's own that a cell's frozen features come from.

    Args:
        config: the cell.
        dataset: its data set, opened.
        backbone: its backbone, built.

    Returns:
        The hashes of imported files, and of modules with all loaded ones of their packages, by name; nothing where all is built
        in. None where a text is not known: that of a notebook, or of a module that was edited while this process runs.
    """
    parts, classes = feature_parts(config), {type(module) for module in backbone.modules()}
    modules = modules_of([*(part.entry for part in parts), type(dataset.train), type(dataset.test), *classes])
    found: dict[str, str] = imports_with({part.name for part in parts}, modules)
    for name in {own for module in modules for own in _with_package(module)}:
        if (digest := _digest(name)) is None:
            return None
        found[name] = digest
    return found


def modules_of(things: Iterable[Any]) -> set[str]:
    """Names of the modules that define functions, classes and objects, what these extend, and what they hold."""
    found: set[str] = set()
    seen: dict[int, Any] = {}
    left = list(things)
    while left:
        thing = left.pop()
        if isinstance(thing, _PLAIN) or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, type):
            found |= {base.__module__ for base in thing.__mro__}
        elif isinstance(thing, FunctionType):
            found.add(thing.__module__)
            left += [held for cell in thing.__closure__ or () for held in _contents(cell)]
        elif isinstance(thing, ModuleType):
            found.add(thing.__name__)
        elif isinstance(thing, MethodType):
            left += [thing.__func__, thing.__self__]
        elif isinstance(thing, functools.partial):
            left += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, Mapping):
            left += thing.values()
        elif isinstance(thing, list | tuple):
            left += thing
        else:
            left += [type(thing), *getattr(thing, "__dict__", {}).values()]
    return found


def _builder(backbone: str) -> Any:
    """What builds a backbone of another package or of timm; None: it is built in another way."""
    if backbone in own_backbones():
        return own_backbones()[backbone]
    models = sys.modules.get("timm.models")  # whoever registers a model there has imported it
    return models.model_entrypoint(backbone) if models and models.is_model(backbone) else None


def _with_package(module: str) -> Iterator[str]:
    """A module of somebody's own, and the loaded ones of its package; none where an imported file or a version stands for it."""
    package = getattr(sys.modules.get(module), "__package__", None) or module
    top = package.partition(".")[0]
    if top in _KNOWN or top.startswith(MODULE):
        return
    yield module
    for name, other in list(sys.modules.items()):
        only_a_folder = hasattr(other, "__path__") and not _file(name)
        if name.partition(".")[0] == top and not only_a_folder:
            yield name


def _file(module: str) -> str | None:
    return getattr(sys.modules.get(module), "__file__", None)


def _digest(module: str) -> str | None:
    """Hash of the file of a module; None: there is none, or an edit came after this process may have read it."""
    file = Path(_file(module) or "")
    if not file.is_file() or (stat := file.stat()).st_mtime > _BEGAN:
        return None
    return _hash(file, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _hash(file: Path, size: int, time_ns: int) -> str:
    """Hash of a file, read once while its size and time stay."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _contents(cell: CellType) -> list[Any]:
    """What a function holds in a cell, if it holds anything yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []
