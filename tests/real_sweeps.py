"""Real sweeps in processes of their own, for the tests of what becomes of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from places import ROOT

import zeroflow.results

LONG_CELL = """
name: long
base: {checkpoint: none, image_size: 14, tasks: 5, stop_after: 1, epochs: 2, batch_size: 16, method: aper-adapter, lr: 1e-4,
       eps: 1e-2}
grid: [{optimizer: zo-sgd}]
placement: {gpus_per_worker: 0}
"""


AGENT = re.compile(r"ray::(Dashboard|RuntimeEnv)Agent\b")


class Sweep:
    """A real sweep in processes of its own; ``start_new_session``: whose signals reach nobody else."""

    def __init__(self, file: Path, out: Path | str, *arguments: str, start_new_session: bool = False) -> None:
        command = [sys.executable, str(ROOT / "sweeps" / "full_grid.py"), "--grid", str(file), "--results", str(out)]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, "--no-report", *arguments],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=start_new_session,
        )
        self._seen: dict[int, str] = {}

    def below(self) -> dict[int, str]:
        """Process ids below the sweep's with what they call themselves."""
        parents, titles = {}, {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    titles[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
                except OSError:
                    continue
        found: dict[int, str] = {}
        for candidate in parents:
            above = candidate
            while above in parents and above != self.process.pid:
                above = parents[above]
            if above == self.process.pid and candidate != self.process.pid:
                found[candidate] = titles.get(candidate, "")
        self._seen |= found
        return found

    def named(self, *names: str) -> dict[str, list[int]]:
        """By name: ids of processes that call themselves so, or that run a program of Ray's of that name."""
        found = self.below().items()
        return {
            name: [
                pid
                for pid, title in found
                if title.startswith(f"ray::{name}") or title.partition(" ")[0].endswith(f"/core/src/ray/{name}")
            ]
            for name in names
        }

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def wait(self, seconds: float = 300) -> str:
        self.process.wait(timeout=seconds)
        return self.output()

    def gone(self, seconds: float = 60, *, agents: bool = False) -> bool:
        """Whether all processes that were ever seen below it have ended, after some time.

        Args:
            agents: Ray's own two, which are idle and look for a killed GCS for another minute, included.
        """
        deadline = time.monotonic() + seconds
        watched = [pid for pid, title in self._seen.items() if agents or not AGENT.match(title)]
        while time.monotonic() < deadline:
            if not any(_is_running(pid) for pid in watched):
                return True
            time.sleep(0.2)
        return False


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def logged(out: Path) -> int:
    """Bytes of the logs of unfinished cells."""
    return sum(log.stat().st_size for log in out.glob("unfinished/*/task-*.losses"))


def wait_for(condition, seconds: float = 240, *, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)


def rows_of(out: Path) -> dict[str, tuple]:
    """By cell: losses of all steps, and what came out."""
    trials = zeroflow.results.load(out, "trials").to_pylist()
    steps = zeroflow.results.load(out, "steps").sort_by("step").to_pylist()
    return {
        t["cell_id"]: (
            [s["loss"] for s in steps if s["cell_id"] == t["cell_id"]],
            t["avg"],
            t["last"],
            t["forward_passes"],
        )
        for t in trials
    }


def expected(config) -> tuple:
    here = zeroflow.run_trial(config)
    return [s.loss for s in here.steps], here.summary["avg"], here.summary["last"], here.summary["forward_passes"]


def assert_clean(out: Path) -> None:
    assert not list((out / "unfinished").glob("*"))
    assert not [p for p in out.rglob("*") if p.name.endswith((".tmp", ".cells.json"))]
