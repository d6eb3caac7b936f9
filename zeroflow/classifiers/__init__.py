"""Closed-form classifiers on features, a file each. Importing the package registers the built-in ones."""

from zeroflow.classifiers.class_means import ClassMeans
from zeroflow.classifiers.classifier import Classifier, ClassifierInfo, classifiers, register_classifier

__all__ = ["ClassMeans", "Classifier", "ClassifierInfo", "classifiers", "register_classifier"]
