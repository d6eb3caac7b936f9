"""A cell's method from its configuration."""

from __future__ import annotations

from zeroflow.classifiers import classifiers
from zeroflow.methods import Method, methods
from zeroflow.models.backbone import Backbone
from zeroflow.models.criteria import criteria
from zeroflow.trial.config import TrialConfig


def method_of(config: TrialConfig, backbone: Backbone) -> Method:
    """A cell's method, with its classifier and its loss."""
    info = methods.get(config.method)
    method = info.build(backbone, info.parse(dict(config.method_options)))
    if config.classifier or config.classifier_options:
        classifier = classifiers.get(config.classifier or str(method.own_classifier))
        method.classifier = classifier.build(classifier.options(**config.classifier_options))
    if config.loss:
        method.criterion = criteria[config.loss]
    return method
