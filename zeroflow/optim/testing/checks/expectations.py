"""Expectations of checks: an unmet one raises ``ConformanceError`` with what was found and what was expected."""

from __future__ import annotations

from torch import Tensor

from zeroflow.optim.testing.subject import ConformanceError

SEED = 11


def expect(right: bool, message: str) -> None:
    if not right:
        raise ConformanceError(message)


def close(found: Tensor, expected: Tensor, what: str, source: str, tolerance: float) -> None:
    off = float((found.double() - expected).abs().max() / expected.double().abs().max().clamp_min(1e-12))
    expect(
        off <= tolerance,
        f"{what} differs from {source} by {off:.3g} of its largest component; expected at most {tolerance:g}. "
        f"Found {_short(found)}, expected {_short(expected)}",
    )


def _short(vector: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in vector.reshape(-1).tolist()[:8]) + "]"
