"""What of a cell can be checked before its work, beyond what its configuration alone tells."""

from __future__ import annotations

from zeroflow.errors import ConfigError
from zeroflow.methods import methods
from zeroflow.models.access import accesses
from zeroflow.models.backbone import Backbone
from zeroflow.models.probe import check_tuning
from zeroflow.models.tuning import tunings
from zeroflow.optim import optimizers
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


def check_tunable(config: TrialConfig, backbone: Backbone) -> None:
    """Refuse a cell whose backbone, which is open, lacks what its method will ask of it: it would train less than it says.

    Raises:
        ConfigError: which backbone, which method, and why.
    """
    method = methods.get(config.method)
    tuning = method.build.tunes(method.parse(dict(config.method_options)))
    if why := backbone.lacks(tunings.get(tuning).needs):
        raise ConfigError(
            f"method {config.method!r} with backbone {config.backbone!r}: it cannot be tuned by {tuning!r}: {why}"
        )


def check_shards(config: TrialConfig, shards: int) -> None:
    for size in (config.batch_size, config.later.get("batch_size")):
        if size and shards > size:
            raise ConfigError(f"data shards larger than the batch: {shards} shards, batch_size={size}")
    if reason := config.uncut(shards):
        raise ConfigError(reason)


def forward_only(config: TrialConfig) -> bool:
    """Whether nothing in a cell needs a gradient of reverse mode: it runs under ``gradient_ban`` then."""
    return trains_forward_only(config) and (not config.later or trains_forward_only(config.at(config.later["task"])))


def trains_forward_only(config: TrialConfig) -> bool:
    """The same of the tasks before a branch."""
    if config.optimizer is None:
        return True
    exact = optimizers.get(config.optimizer).estimator.exact
    return not (exact or config.hybrid_epochs or config.optimizer_options.get("hybrid"))
