"""What of a cell can be checked before its work, beyond what its configuration alone tells."""

from __future__ import annotations

from zeroflow.errors import ConfigError
from zeroflow.methods import methods
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


def check_shards(config: TrialConfig, shards: int) -> None:
    for size in (config.batch_size, config.later.get("batch_size")):
        if size and shards > size:
            raise ConfigError(f"data shards larger than the batch: {shards} shards, batch_size={size}")
    if reason := config.uncut(shards):
        raise ConfigError(reason)
