"""The keys of the model: the backbone and how it is reached, what it is shown, the method and its classifier."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zeroflow import options
from zeroflow.classifiers import classifiers
from zeroflow.data import Preprocessing, datasets, transform_of, transforms
from zeroflow.errors import ConfigError
from zeroflow.methods import MethodInfo, methods
from zeroflow.methods.closed_form import NAMED
from zeroflow.models.access import accesses
from zeroflow.models.factory import EMBEDDED, check_backbone, default_image_size, preprocessing_of
from zeroflow.models.own import EXPORTED
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.keys.values import changed, is_positive, one_of, require


def model_keys(config: TrialConfig) -> dict[str, Any]:
    """The keys in normal form.

    Raises:
        ConfigError: which key, its value and what was expected.
    """
    size, access = config.image_size, one_of("access", config.access, accesses)
    require("image_size", size, size is None or is_positive(size), "an integer >= 1")
    if not accesses[access or "white-box"].remote:
        check_backbone(config.backbone, config.checkpoint)
    elif size is None:
        check_backbone(config.backbone, None)  # with an image size it may be anything that an endpoint calls its own
    methods.get(config.method).parse(dict(config.method_options))
    dataset = datasets.get(config.dataset)
    keys = {
        "access": access,
        "method_options": changed(config.method_options, _method_defaults(config.method)),
        **_classifier_keys(config),
        "transform": None if config.transform == dataset.transform else config.transform,
        "preprocessing": _preprocessing(config, dataset.transform if config.transform is None else config.transform),
        "image_size": None if size == default_image_size(config.backbone) else size,
    }
    for key in ("checkpoint", "backbone"):
        keys[key] = with_whole_path(key, getattr(config, key))
    if config.checkpoint == "hub" and config.backbone != EMBEDDED:
        keys["checkpoint"] = None  # where weights come from unless something else is said
    return keys


def check_access(config: TrialConfig, method: MethodInfo, differentiates: str | None, per_example: bool) -> None:
    """Refuse what the way to the backbone does not allow.

    Args:
        config: the cell.
        method: its own.
        differentiates: what takes derivatives; None: nothing does.
        per_example: whether the optimizer wants a loss of each example.

    Raises:
        ConfigError: why not.
    """
    if config.access in (None, "white-box"):
        return
    method_options = method.parse(dict(config.method_options))
    why = accesses[str(config.access)].refusal(
        tuning=method.build.tunes(method_options),
        differentiates=differentiates,
        per_example=per_example,
        dtype=config.dtype,
        options=vars(method_options),
    )
    if why:
        raise ConfigError(f"access={config.access!r} with method {config.method!r}: {why}")


def draws_at_random(config: TrialConfig) -> bool:
    """Whether the cell's closed-form classifier draws random numbers."""
    name = config.classifier or methods.get(config.method).build.own_classifier
    return name is not None and classifiers.get(name).draws


def _classifier_keys(config: TrialConfig) -> dict[str, Any]:
    """The keys of the closed-form classifier.

    Where a method is ``simplecil`` with the chosen classifier, the cell goes by that method's name.
    """
    build, chosen = methods.get(config.method).build, config.classifier
    require("classifier", chosen, chosen is None or isinstance(chosen, str), "a string")
    if chosen is not None:
        classifiers.get(chosen)
        if build.takes_classifiers is not None and chosen not in build.takes_classifiers:
            able = [name for name, info in methods.items() if info.build.takes_classifiers is None]
            takes = f"it takes {', '.join(build.takes_classifiers)}; " if build.takes_classifiers else ""
            raise ConfigError(
                f"classifier={chosen!r} with method {config.method!r}: {build.why_these}; {takes}any is taken by {', '.join(able)}"
            )
    name = chosen or build.own_classifier
    if name is None:
        none = not config.classifier_options
        require("classifier_options", config.classifier_options, none, "no options: there is no classifier")
        return {}
    info = classifiers.get(name)
    options.parse(info.options, config.classifier_options, owner=f"classifier {name!r}", where="classifier_options")
    named = NAMED.get(name) if config.method == NAMED["class-means"] else None
    return {
        "method": named or config.method,
        "classifier": None if named or name == build.own_classifier else name,
        "classifier_options": changed(config.classifier_options, options.defaults(info.options)),
    }


def _preprocessing(config: TrialConfig, transform: str) -> dict[str, Any]:
    """All of it where the transform takes it: what the cell says, else what the backbone's weights ask for."""
    transform_of(transform, config.preprocessing)
    if transforms.get(transform).with_preprocessing is None:
        return {}
    try:
        return Preprocessing.of({**preprocessing_of(config.backbone), **config.preprocessing}).values()
    except ConfigError as error:
        raise ConfigError(f"backbone {config.backbone!r}: its weights ask for {error}; give another value") from None


def with_whole_path(key: str, value: Any) -> Any:
    """A value of ``checkpoint`` or ``backbone``: a file by its whole path, since cells run in folders of their own; others as they are."""
    is_file = isinstance(value, str) and (
        (key == "checkpoint" and value not in ("hub", "none")) or (key == "backbone" and value.endswith(EXPORTED))
    )
    return str(Path(value).expanduser().absolute()) if is_file else value


@functools.cache
def _method_defaults(name: str) -> Mapping[str, Any]:
    return options.defaults(methods.get(name).options)
