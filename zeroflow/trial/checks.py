"""What of a cell can be checked before its work, beyond what its configuration alone tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from zeroflow.errors import ConfigError
from zeroflow.methods import Method, methods
from zeroflow.models.access import accesses
from zeroflow.models.probe import check_tuning
from zeroflow.trial.config import TrialConfig


def check_backbone_of(config: TrialConfig) -> None:
    """Refuse a cell whose backbone cannot be built here, or cannot do what its method will ask of it; downloads nothing.

    Raises:
        ConfigError: which backbone, which method, why, and what would work.
    """
    access = accesses[config.access or "white-box"]
    access.check_installed()
    if access.remote:
        return
    method = methods.get(config.method)
    options = method.parse(dict(config.method_options))
    try:
        check_tuning(
            config.backbone,
            config.checkpoint,
            config.image_size,
            config.access,
            method.build.tunes(options),
            vars(options),
        )
    except ConfigError as error:
        raise ConfigError(f"method {config.method!r} with {error}") from error


Held = dict[str, list[Tensor]]
"""Tensors that are neither buffers nor parameters, by class and attribute."""


def plain_tensors(method: Method) -> Held:
    """What a method or classifier of somebody's own holds in plain attributes; of zeroflow's own nothing."""
    held: Held = {}
    if type(method).state is not Method.state:
        return held  # it says itself what is saved
    for part in (method, getattr(method, "classifier", None)):
        if part is not None and not type(part).__module__.startswith("zeroflow."):
            for name, value in vars(part).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    held[f"{type(part).__name__}.{name}"] = list(_tensors(value))
    return held


def check_resumable(before: Held, after: Held) -> None:
    """Refuse tensors in plain attributes that one task hands to the next: an interrupted cell would lose them.

    Buffers and parameters are saved with a finished task. Without the others a resumed cell would go on to other numbers.

    Args:
        before: at the end of a task.
        after: when the next one has begun.

    Raises:
        ConfigError: which class and attribute, and what to write.
    """
    for name, tensors in after.items():
        if any(tensor is other for tensor in tensors for other in before.get(name, [])):
            attribute = name.rpartition(".")[2]
            raise ConfigError(
                f"{name} hands a tensor from one task to the next in a plain attribute, which an interrupted cell would lose; "
                f"keep it as a buffer: self.register_buffer({attribute!r}, ...)"
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
