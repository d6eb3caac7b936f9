"""Signals to a whole process group, as a terminal, ``timeout`` and batch systems send them: a sweep ends in order."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from real_sweeps import LONG_CELL, Sweep, logged, wait_for

import zeroflow.results
from zeroflow.results.store import Store
from zeroflow.results.sweeps import sweeps


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, *(pytest.param(sent, marks=pytest.mark.long) for sent in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_signal_to_the_process_group_ends_a_sweep_in_order(sent: signal.Signals, tmp_path: Path) -> None:
    file, out = tmp_path / "long.yaml", tmp_path / "out"
    file.write_text(LONG_CELL)
    sweep = Sweep(file, out, start_new_session=True)
    wait_for(lambda: logged(out) >= 240 or sweep.process.poll() is not None)
    sweep.below()
    os.killpg(sweep.process.pid, sent)
    os.killpg(sweep.process.pid, sent)  # `timeout` sends it to the process, then to its group
    try:
        said = sweep.wait(60)
    finally:
        sweep.process.kill()
    assert sweep.process.returncode == 1 and "the sweep was stopped: interrupted; the same command goes on" in said, (
        said
    )
    assert "0 of 1 cells done, 0 failed, 1 missing" in said and "Traceback" not in said, said
    assert sweep.gone() and logged(out) >= 240
    assert [s["state"] for s in sweeps(Store(out))] == ["interrupted"]
    if sent == signal.SIGHUP:  # once: the end is the same for all
        again = Sweep(file, out)
        assert "1 of 1 cells done" in again.wait(), again.output()
        assert zeroflow.results.load(out, "steps")["seconds"].null_count >= 10, "24 bytes of the log are a step"
