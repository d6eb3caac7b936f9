"""Conformance checks for forward-pass optimizers, of this library or any other.

from zeroflow.optim.testing import Subject, run_conformance
for outcome in run_conformance(Subject(lambda model, seed: MyOptimizer(model, seed=seed))):
    print(outcome)
"""

from zeroflow.optim.testing.conformance import CHECKS, Outcome, run_conformance
from zeroflow.optim.testing.subject import ConformanceError, Reference, Stepper, Subject, subject

__all__ = ["CHECKS", "ConformanceError", "Outcome", "Reference", "Stepper", "Subject", "run_conformance", "subject"]
