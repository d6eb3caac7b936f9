"""The preprocessing that a backbone's weights expect, whatever the data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from zeroflow.errors import ConfigError, unknown
from zeroflow.options import finite

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
CROP_MODES = ("center", "squash", "border")
# Far beyond what any weights expect; outside of them float32 or the memory for a resized image overflows.
RANGES = {"mean": (-1e3, 1e3), "std": (1e-6, 1e6), "crop_pct": (0.1, 1.0)}

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """Resizing, cropping and normalisation, with timm's names and defaults.

    Attributes:
        mean: of each channel, for pixels in [0, 1]; -1000 to 1000.
        std: of each channel; the network gets ``(pixels - mean) / std``; 1e-6 to 1e6.
        interpolation: one of ``INTERPOLATIONS``.
        crop_pct: share of the resized image's side that the test crop keeps, 0.1 to 1.
        crop_mode: what is resized before the centre crop. ``center``: the shorter side; ``squash``: both sides, ignoring the
            aspect ratio; ``border``: the longer side, padded with the mean.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    mean: Colour = (0.485, 0.456, 0.406)
    std: Colour = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for key in ("mean", "std"):
            value, (least, most) = getattr(self, key), RANGES[key]
            three = isinstance(value, list | tuple) and len(value) == 3 and all(map(_number, value))
            if not three or min(value) < least or max(value) > most:
                raise ConfigError(f"preprocessing.{key}={value!r}: expected three numbers in [{least:g}, {most:g}]")
            object.__setattr__(self, key, tuple(map(float, value)))
        least, most = RANGES["crop_pct"]
        if not _number(self.crop_pct) or not least <= self.crop_pct <= most:
            raise ConfigError(f"preprocessing.crop_pct={self.crop_pct!r}: expected a share in [{least:g}, {most:g}]")
        object.__setattr__(self, "crop_pct", float(self.crop_pct))
        for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if getattr(self, key) not in known:
                raise unknown(f"preprocessing.{key}", getattr(self, key), known)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Preprocessing:
        """Build from a mapping; missing keys take their defaults.

        Raises:
            ConfigError: a key is unknown (the message names the nearest one), or a value is wrong.
        """
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                raise unknown("key", key, known, where="preprocessing")
        return cls(**given)

    def values(self) -> dict[str, Any]:
        """All keys, as plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:g}" for value in colour) for colour in (self.mean, self.std))
        return f"mean {mean}, std {std}, {self.interpolation}, {self.crop_mode} crop {self.crop_pct:g}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and finite(value)
