"""Closed-form classifiers on frozen features, under the names their papers give them. Nothing is trained.

Each is ``simplecil`` with another classifier of ``zeroflow.classifiers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeroflow.methods.method import register_method
from zeroflow.methods.simplecil import SimpleCIL


class OneClassifier(SimpleCIL):
    """``simplecil`` with the classifier of a paper: ``class Name(OneClassifier, classifier="lda")``."""

    why_these = "its classifier is what it is named for; method simplecil takes any classifier"

    def __init_subclass__(cls, classifier: str = "", **named: Any) -> None:
        super().__init_subclass__(**named)
        if classifier:
            cls.own_classifier, cls.takes_classifiers = classifier, (classifier,)


@register_method("slda", "linear discriminant of frozen features: class means and one pooled covariance; no training")
class SLDA(OneClassifier, classifier="lda"):
    """Source: Hayes & Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPRW 2020.

    Its covariance is shrunk by a fixed amount, here by what the samples suggest; see ``LDA``.
    """


@register_method("acil", "recursive ridge regression on frozen features; no training")
class ACIL(OneClassifier, classifier="ridge"):
    """Source: Zhuang et al., "ACIL: Analytic Class-Incremental Learning", NeurIPS 2022; without its expansion layer.

    Its lambda is fixed, here chosen for each task unless ``classifier_options.ridge`` is given; see ``Ridge``.
    """


@register_method("ranpac", "ridge regression on a random projection of frozen features; no training")
class RanPAC(OneClassifier, classifier="random-projection"):
    """Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023.

    Its first phase, adaptation to the first task, is ``aper-*`` with ``classifier: random-projection``.
    """


@register_method("fecam", "a covariance for each class of frozen features, Mahalanobis distance; no training")
class FeCAM(OneClassifier, classifier="qda"):
    """Source: Goswami et al., "FeCAM: Heterogeneity of Class Distributions in Exemplar-Free Learning", NeurIPS 2023."""


NAMED: Mapping[str, str] = {
    "class-means": "simplecil", "lda": "slda", "ridge": "acil", "random-projection": "ranpac", "qda": "fecam",
}  # fmt: skip
"""The method that is ``simplecil`` with a classifier, both by name."""
