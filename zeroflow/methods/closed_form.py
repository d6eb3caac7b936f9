"""Closed-form classifiers on frozen features, under the names their papers give them. Nothing is trained.

Each is ``simplecil`` with another classifier of ``zeroflow.classifiers``.
"""

from __future__ import annotations

from collections.abc import Mapping

from zeroflow.methods.method import register_method
from zeroflow.methods.simplecil import SimpleCIL


@register_method("slda", "linear discriminant of frozen features: class means and one pooled covariance; no training")
class SLDA(SimpleCIL):
    """Source: Hayes & Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPRW 2020."""

    own_classifier = "lda"
    takes_classifiers = ("lda",)
    why_these = "that is what it is; simplecil takes any"


@register_method("acil", "recursive ridge regression on frozen features; no training")
class ACIL(SimpleCIL):
    """Source: Zhuang et al., "ACIL: Analytic Class-Incremental Learning", NeurIPS 2022; without its expansion layer."""

    own_classifier = "ridge"
    takes_classifiers = ("ridge",)
    why_these = "that is what it is; simplecil takes any"


@register_method("ranpac", "ridge regression on a random projection of frozen features; no training")
class RanPAC(SimpleCIL):
    """Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023.

    Its first phase, adaptation to the first task, is ``aper-*`` with ``classifier: random-projection``.
    """

    own_classifier = "random-projection"
    takes_classifiers = ("random-projection",)
    why_these = "that is what it is; simplecil takes any"


@register_method("fecam", "a covariance for each class of frozen features, Mahalanobis distance; no training")
class FeCAM(SimpleCIL):
    """Source: Goswami et al., "FeCAM: Heterogeneity of Class Distributions in Exemplar-Free Learning", NeurIPS 2023."""

    own_classifier = "qda"
    takes_classifiers = ("qda",)
    why_these = "that is what it is; simplecil takes any"


NAMED: Mapping[str, str] = {
    "class-means": "simplecil", "lda": "slda", "ridge": "acil", "random-projection": "ranpac", "qda": "fecam",
}  # fmt: skip
"""The method that is ``simplecil`` with a classifier, both by name."""
