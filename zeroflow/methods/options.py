"""Settings that several methods have."""

from __future__ import annotations

from dataclasses import dataclass

from zeroflow.methods.method import Method, positive


@dataclass(frozen=True)
class AdapterOptions(Method.Options):
    """bottleneck: inner width of an adapter. scale: factor on its output. dropout: inside it, while training."""

    bottleneck: int = 64
    scale: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(bottleneck=self.bottleneck, scale=self.scale)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: expected a share in [0, 1)")


@dataclass(frozen=True)
class TuningOptions(Method.Options):
    """subspace: how many random coordinates of the tuning's values are trained in their place; 0: all values themselves."""

    subspace: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subspace < 0:
            raise ValueError(f"subspace={self.subspace!r}: expected an integer >= 0")
