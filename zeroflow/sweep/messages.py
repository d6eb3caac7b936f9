"""What goes between the processes of a sweep: cells to run, and what came of them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from zeroflow.grid.cell_placement import CellPlacement
from zeroflow.imports import SourceFile
from zeroflow.trial.config import TrialConfig


@dataclass(frozen=True)
class SweepContext:
    """What all cells of a sweep have in common.

    Attributes:
        results: root of the store, a folder or a URI.
        data_dir: folder of the data sets that are not embedded, on every node.
        commit: of the checkout that the sweep was started in; None: of none.
        code: tells versions of the code apart: unfinished work of another one is not resumed from.
        scratch: folder for what Tune and Train insist on writing.
        retries: deaths of a cell's processes until it has failed.
        module_folder: where Python modules that the grid names are looked for, beside the current one.
        imports: Python files that were imported where the sweep was started.
    """

    results: str
    data_dir: str | None = None
    commit: str | None = None
    code: str = ""
    scratch: str = ""
    retries: int = 0
    module_folder: str | None = None
    imports: tuple[SourceFile, ...] = ()


@dataclass(frozen=True)
class CellTask:
    """A cell to run: what, with which processes, and in which sweep."""

    config: TrialConfig
    placement: CellPlacement
    sweep: SweepContext


class FailureKind(enum.Enum):
    """Why a cell has no result."""

    ERROR = enum.auto()
    """It raised an error of its own, and would again."""
    OUT_OF_MEMORY = enum.auto()
    """More memory may help."""
    DISK_FULL = enum.auto()
    """No cell can be written."""
    PROCESS_DIED = enum.auto()
    """Its process died in the middle of it."""
    NOT_BEGUN = enum.auto()
    """Its process died before it began with the cell."""


@dataclass(frozen=True)
class CellDone:
    """A cell is finished, and its result is in the store. Accuracies in percent, as in ``TrialResult.summary``."""

    avg: float
    last: float
    fgt: float


@dataclass(frozen=True)
class CellFailed:
    """A cell has no result.

    Attributes:
        kind: why.
        error: name of the exception's class.
        message: its text.
        traceback: of it, as text.
    """

    kind: FailureKind
    error: str
    message: str
    traceback: str


Outcome = CellDone | CellFailed
