"""Cells that are stopped, and whether two came to the same, for the tests."""

from __future__ import annotations

import numpy as np

from zeroflow import TrialResult


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def assert_same_bits(found: TrialResult, whole: TrialResult) -> None:
    def steps(result: TrialResult) -> list[tuple]:
        return [(step.task, step.epoch, step.step, step.loss, step.lr) for step in result.steps]

    assert steps(found) == steps(whole)
    for name in ("accuracy_matrix", "task_incremental", "domain_incremental"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    for counted, expected in zip(found.confusion, whole.confusion, strict=True):
        np.testing.assert_array_equal(counted, expected)
    for name in ("forward_passes", "forward_equivalents", "trainable_parameters"):
        assert found.summary[name] == whole.summary[name], name
