"""Run a grid of cells with Ray: ``python sweeps/full_grid.py --help``; also as ``ray job submit -- python sweeps/full_grid.py``."""

import os
import sys
from pathlib import Path

# The code beside this file is the code that runs: in a checkout, and in the copy that a job submission uploads.
# Ray's processes, which start with this one's environment, must find the same.
ROOT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

from zeroflow.cli import sweep  # noqa: E402

if __name__ == "__main__":
    sweep(prog_name="full_grid.py")
