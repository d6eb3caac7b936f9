"""``python -m zeroflow.optim.testing [NAME...]``: the conformance report of named optimizers, all by default."""

from __future__ import annotations

import sys

from zeroflow.optim.factory import list_optimizers
from zeroflow.optim.testing import run_conformance, subject


def main(names: list[str]) -> int:
    """Print a report of each; 1 if anything failed, else 0."""
    failed = False
    for name in names or list_optimizers():
        outcomes = run_conformance(subject(name))
        failed |= any(outcome.passed is False for outcome in outcomes)
        print(name, *outcomes, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
