"""What a method or classifier of one's own remembers: what an interrupted cell would lose is refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from zeroflow import TrialConfig, run_trial
from zeroflow.classifiers import classifiers
from zeroflow.classifiers.class_means import ClassMeans
from zeroflow.errors import ConfigError


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Iterator[str]:
    """A classifier that counts the samples of its tasks, and keeps the count as it is told to."""

    class Counting(ClassMeans):
        def begin_task(self, *arguments) -> None:
            super().begin_task(*arguments)
            self.scratch = torch.zeros(3)  # made anew for each task: nothing is lost

        def end_task(self) -> None:
            super().end_task()
            if request.param == "buffer":
                self.register_buffer("seen", self.means.sum(0))
            elif request.param == "attribute":
                self.seen = self.means.sum(0)
            else:
                self.seen = {"of tasks": [self.means.sum(0)]}

    Counting.__module__ = "mine"
    name = f"counting-{request.param}"
    if name not in classifiers.names():
        from zeroflow.classifiers import register_classifier

        register_classifier(name, "made by the tests")(Counting)
    yield name


@pytest.fixture
def config(own: str, some_drawings: str, tiny_vit: dict) -> TrialConfig:
    cell = {**tiny_vit, "dataset": some_drawings, "tasks": 10, "stop_after": 3}
    return TrialConfig.from_dict({**cell, "method": "simplecil", "classifier": own})


@pytest.mark.parametrize("own", ["attribute", "container"], indirect=True)
def test_a_tensor_that_would_be_lost_is_refused_by_name(config: TrialConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"Counting\.seen hands a tensor from one task to the next .*register_buffer\('seen'"
    ):
        run_trial(config)


@pytest.mark.parametrize("own", ["buffer"], indirect=True)
def test_a_buffer_comes_back_after_an_interruption(config: TrialConfig, tmp_path) -> None:

    def stop(stage: int, *_: object) -> None:
        if stage == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(config, folder=tmp_path, on_stage=stop)
    np.testing.assert_array_equal(run_trial(config, folder=tmp_path).accuracy_matrix, run_trial(config).accuracy_matrix)
