"""A finished cell: what came out, what it cost, and where it came from."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zeroflow.trial import metrics
from zeroflow.trial.config import TrialConfig


@dataclass(frozen=True)
class Step:
    """One training step: task, epoch within the task, step within the trial, loss, learning rate, seconds if timed."""

    task: int
    epoch: int
    step: int
    loss: float
    lr: float
    seconds: float | None = None


@dataclass(frozen=True)
class Probe:
    """What was seen before one step: number of the task, step within the trial, name, losses on old and new tasks."""

    task: int
    step: int
    probe: str
    loss_old: float | None
    loss_new: float | None


@dataclass(frozen=True)
class TrialResult:
    """The result of one cell.

    Attributes:
        accuracy_matrix: percent, stage x task ``[T, T]``, NaN above the diagonal; class-incremental.
        task_incremental: the same where a sample's task is told, and where only the place within the task must be
            right; see ``metrics.SETTINGS``. The latter is None where tasks have different numbers of classes.
        domain_incremental: the same where a sample's task is told, and where only the place within the task must be
            right; see ``metrics.SETTINGS``. The latter is None where tasks have different numbers of classes.
        test_samples: samples and classes of each task ``[T]``.
        task_classes: samples and classes of each task ``[T]``.
        class_order: ``class_order[new label]`` = the data set's own label.
        class_names: by new label.
        steps: every training step.
        probes: what was looked at between them.
        costs: forward passes, bytes, seconds.
        provenance: versions, device, commit, times.
        confusion: of each stage, test samples by true class and predicted class ``[classes seen, classes seen]``.
        named: hashes of weights and images of one's own by their names in the configuration, see ``named_files``.
    """

    config: TrialConfig
    accuracy_matrix: metrics.Matrix
    task_incremental: metrics.Matrix
    domain_incremental: metrics.Matrix | None
    test_samples: npt.NDArray[np.int64]
    task_classes: npt.NDArray[np.int64]
    class_order: npt.NDArray[np.int64]
    class_names: Sequence[str]
    steps: Sequence[Step]
    probes: Sequence[Probe]
    costs: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(repr=False)
    confusion: Sequence[npt.NDArray[np.int64]] = field(default=(), repr=False)
    named: Mapping[str, str] = field(default_factory=dict)

    @property
    def cell_id(self) -> str:
        """Hash of the configuration."""
        return self.config.cell_id

    @property
    def stage_accuracy(self) -> npt.NDArray[np.float64]:
        """Pooled class-incremental accuracy of each stage, percent ``[T]``."""
        return metrics.stage_accuracy(self.accuracy_matrix, self.test_samples)

    @property
    def summary(self) -> dict[str, Any]:
        """avg, last, fgt, bwt and those of the other settings (``metrics.DEFINITIONS``), and every cost."""
        others = {"task_incremental": self.task_incremental, "domain_incremental": self.domain_incremental}
        average = metrics.average(self.accuracy_matrix, self.test_samples)
        return {
            "avg": average,
            "last": metrics.last(self.accuracy_matrix, self.test_samples),
            "fgt": metrics.forgetting(self.accuracy_matrix),
            "bwt": metrics.backward_transfer(self.accuracy_matrix),
            **{
                f"{name}_{setting}": None if matrix is None else metric(matrix, self.test_samples)
                for setting, matrix in others.items()
                for name, metric in (("avg", metrics.average), ("last", metrics.last))
            },
            "final_loss": self.steps[-1].loss if self.steps else None,
            **self.costs,
            # What the method needs, whichever cell of the results it was that asked.
            "images_per_point": asked / average if average and (asked := _asked(self.costs)) else None,
        }


def _asked(costs: Mapping[str, Any]) -> int:
    return int((costs.get("queried_images") or 0) + (costs.get("reused_images") or 0))


def provenance(device: torch.device, placement: Mapping[str, Any]) -> dict[str, Any]:
    """What one needs to know to trust or repeat a result."""
    commit = checkout_commit()
    return {
        "zeroflow_version": _version("zeroflow"),
        "torch_version": torch.__version__,
        "timm_version": _version("timm"),
        "python_version": platform.python_version(),
        "git_commit": commit.removesuffix("-dirty") if commit else None,
        "git_dirty": commit.endswith("-dirty") if commit else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": placement.get("threads"),
        "finished_at": datetime.now(UTC),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def checkout_commit() -> str | None:
    """The commit of the checkout this code is in, with ``-dirty`` behind it where files differ; None outside one.

    ``ZEROFLOW_GIT_COMMIT`` comes first: whoever submits a job knows it, the uploaded copy of the files does not.
    """
    if commit := os.environ.get("ZEROFLOW_GIT_COMMIT"):
        return commit
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not (Path(git("rev-parse", "--show-toplevel")) / "zeroflow").samefile(here.parent):
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def code_state(commit: str | None) -> str:
    """A short name of the code as it is: commit, and a hash of what differs from it; the version outside a checkout."""
    if commit is None:
        return f"v{_version('zeroflow')}"
    name = commit.removesuffix("-dirty")[:12]
    if not commit.endswith("-dirty"):
        return name
    command = ["git", "-C", str(Path(__file__).parent), "diff", "HEAD"]
    try:
        changes = subprocess.run(command, capture_output=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        changes = b""
    return f"{name}-{hashlib.sha256(changes).hexdigest()[:8]}"
