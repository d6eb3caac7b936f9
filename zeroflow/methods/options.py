"""Options shared by several methods."""

from __future__ import annotations

from dataclasses import dataclass

from zeroflow.methods.method import Method, positive


@dataclass(frozen=True)
class AdapterOptions(Method.Options):
    """Options of adapters.

    Attributes:
        bottleneck: inner width of an adapter.
        scale: factor on its output.
        dropout: probability inside it while training.
    """

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
    """Options of every tuning.

    Attributes:
        subspace: number of random coordinates that are trained instead of the tuning's values; 0: the values themselves.
    """

    subspace: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subspace < 0:
            raise ValueError(f"subspace={self.subspace!r}: expected an integer >= 0")
