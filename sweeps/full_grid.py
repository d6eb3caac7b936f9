"""Run a grid of cells with Ray: ``python sweeps/full_grid.py --help``; also as ``ray job submit -- python sweeps/full_grid.py``."""

import sys
from pathlib import Path

# The code beside this file is the code that runs: in a checkout, and in the copy that a job submission uploads.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zeroflow.cli import sweep

if __name__ == "__main__":
    sweep(prog_name="full_grid.py")
