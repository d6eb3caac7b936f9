"""What Tune tells a sweep of its trials, and what it has to be told about processes that died."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune

from zeroflow.sweep.progress import Progress
from zeroflow.sweep.trainable import OUTCOME, SECONDS


class ProgressCallback(tune.Callback):  # type: ignore[misc]
    """Feeds a sweep's progress.

    Args:
        progress: of the sweep.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.progress.begun(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        if OUTCOME in result:  # or it was stopped in the middle
            self.progress.ended(trial.trial_id, result[OUTCOME], result[SECONDS])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.progress.died(trial.trial_id, f"the process of the trial died: {_last_error_of(trial)}")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        # Tune gives some trials up without a word, such as one whose process would not be reset.
        if iteration % 100 == 0:
            for trial in trials:
                if trial.trial_id in self.progress.queue.running and trial.status == "ERROR":
                    self.on_trial_error(iteration, trials, trial)


@contextmanager
def deaths_told_to_tune() -> Iterator[None]:
    """Let Tune count a process that Ray killed for its memory as one that died.

    Ray says so by an error of its own, which Tune 2.60 does not expect: it would end all trials.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import RayActorError, RayError, RayTaskError

    known = RayActorManager._actor_task_failed

    def told(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        known(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = told
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = known


def _last_error_of(trial: Any) -> str:
    """What Tune knows of a trial's last error; it has not reached its storage yet, so from the file on this node."""
    try:
        from ray import cloudpickle

        return str(cloudpickle.loads(Path(trial.pickled_error_file).read_bytes()))
    except Exception:
        return "its log says more"
