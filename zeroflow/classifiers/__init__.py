"""Closed-form classifiers on features, one per file. Importing the package registers the built-in ones."""

from zeroflow.classifiers.class_means import ClassMeans
from zeroflow.classifiers.classifier import Classifier, ClassifierInfo, classifiers, register_classifier
from zeroflow.classifiers.lda import LDA
from zeroflow.classifiers.qda import QDA
from zeroflow.classifiers.random_projection import RandomProjection
from zeroflow.classifiers.ridge import Ridge

__all__ = [
    "LDA",
    "QDA",
    "ClassMeans",
    "Classifier",
    "ClassifierInfo",
    "RandomProjection",
    "Ridge",
    "classifiers",
    "register_classifier",
]
