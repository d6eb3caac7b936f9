"""Ways to access a backbone: as it is, or in one of the ways that give no gradient.

The key ``access`` of a cell. ``open_backbone`` builds the backbone; ``Access.refusal`` tells before any work what it cannot do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zeroflow.errors import ConfigError
from zeroflow.models.backbone import Backbone
from zeroflow.models.endpoint import open_black_box
from zeroflow.models.exported import ExportedBackbone
from zeroflow.models.factory import create_backbone
from zeroflow.models.int8 import quantised
from zeroflow.models.spiking import SpikingBackbone
from zeroflow.models.timm_backbone import TransformerBackbone
from zeroflow.models.tuning import tunings


@dataclass(frozen=True)
class Access:
    """A way to access a backbone.

    Attributes:
        name: as users write it.
        description: one line.
        build: builds the backbone, from the arguments of ``create_backbone``.
        tunings: supported tunings, names in ``tuning.tunings``; None: all.
        why: why other tunings are unsupported, as a clause.
        derivatives: whether a gradient can be computed, even if it is zero.
        float32_cpu: whether it computes on a CPU in float32 only.
        dropout: whether adapters may have dropout.
        per_example: whether adapters may differ from example to example.
        needs: packages beyond those that zeroflow requires.
        remote: whether it is reached through an endpoint.
        transformers_only: why only a plain vision transformer can be accessed this way, as a clause; empty: any can.
        transformer_tunings: tunings that it supports for plain vision transformers only.
    """

    name: str
    description: str
    build: Callable[..., Backbone]
    tunings: tuple[str, ...] | None = None
    why: str = ""
    derivatives: bool = True
    float32_cpu: bool = False
    dropout: bool = True
    per_example: bool = True
    needs: tuple[str, ...] = ()
    remote: bool = False
    transformers_only: str = ""
    transformer_tunings: tuple[str, ...] = ()

    def lacks(self, backbone: Backbone, tuning: str) -> str | None:
        """Why a white-box backbone, accessed this way, cannot be tuned by ``tuning``; None: it can."""
        if tuning in self.transformer_tunings and not isinstance(backbone, TransformerBackbone):
            return "only a plain vision transformer's graph takes adapters"
        return backbone.lacks(tunings.get(tuning).needs)

    def able(self, backbone: Backbone) -> list[str]:
        """The tunings of a white-box backbone that is accessed this way."""
        return [name for name in self.tunings or tunings.names() if not self.lacks(backbone, name)]

    def refusal(
        self, *, tuning: str, differentiates: str | None, per_example: bool, dtype: str, options: Mapping[str, Any]
    ) -> str | None:
        """Why a cell cannot be run this way; None: it can.

        Args:
            tuning: what is trained, see ``Method.tunes``.
            differentiates: the part of the cell that takes derivatives, if any.
            per_example: whether the optimizer perturbs every example on its own.
            dtype: precision of the cell.
            options: all options of the method.
        """
        if self.tunings is not None and tuning not in self.tunings:
            return f"it trains {tuning!r}, and {self.why}; this can be trained: {', '.join(self.tunings)}"
        if differentiates and not self.derivatives:
            return f"{differentiates} differentiates, and {self.why}; take an optimizer of forward passes (zo-*)"
        if per_example and not self.per_example:
            return "its optimizer moves every example of a mini-batch on its own, which needs the layers themselves"
        if self.float32_cpu and dtype != "float32":
            return f"dtype={dtype!r}: it computes in float32"
        if not self.dropout and tuning == "adapter" and options.get("dropout"):
            return f"dropout={options['dropout']}: its graph has none; set method_options.dropout to 0"
        return None

    def device(self, wanted: torch.device) -> torch.device:
        """The device that the cell computes on."""
        return torch.device("cpu") if self.float32_cpu else wanted

    def check_installed(self) -> None:
        """Raise ``ConfigError`` where a package it needs is missing."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f"access={self.name!r} needs {' and '.join(missing)}: pip install 'zeroflow[bans]'")


_SPIKES = "spikes travel between the blocks of a plain vision transformer"


def _spiking(*arguments: Any, **named: Any) -> Backbone:
    backbone = create_backbone(*arguments, **named)
    if not isinstance(backbone, TransformerBackbone):
        raise ConfigError(f"access='spiking': {_SPIKES}; expected one")
    return SpikingBackbone(backbone.model, backbone.channels)


def _int8(*arguments: Any, **named: Any) -> Backbone:
    return quantised(create_backbone(*arguments, **named))


_HARDWARE: Mapping[str, Any] = {"derivatives": False, "float32_cpu": True}


accesses: Mapping[str, Access] = {
    access.name: access
    for access in (
        Access("white-box", "the backbone as it is, in this process", create_backbone),
        Access(
            "spiking",
            "every block and the features answer in spikes: hard thresholds, no slope anywhere",
            _spiking,
            transformers_only=_SPIKES,
        ),
        Access(
            "black-box",
            "an endpoint in another process: images go in, features come out",
            open_black_box,
            tunings=("none", "input-prompt", "input-filter"),
            why="a black box takes images and gives features, nothing else of it can be reached",
            derivatives=False,
            per_example=False,
            remote=True,
        ),
        Access(
            "int8",
            "weights and activations of eight bits, on torch's quantised CPU kernels",
            _int8,
            tunings=("none", "adapter", "vpt-shallow", "vpt-deep", "block-shift", "input-prompt", "input-filter"),
            why="int8 weights cannot be trained and have no derivative",
            **_HARDWARE,
        ),
        Access(
            "exported",
            "an ONNX graph, run by ONNX Runtime; adapters' weights are inputs",
            ExportedBackbone,
            tunings=("none", "adapter", "input-prompt", "input-filter"),
            why="an exported graph has no derivative, and inputs for images and adapters alone",
            dropout=False,
            per_example=False,
            needs=("onnx", "onnxruntime"),
            transformer_tunings=("adapter",),
            **_HARDWARE,
        ),
    )
}
"""By name; the first one is the default."""


def open_backbone(
    access: str | None, name: str, endpoint: Any = None, timeout: float = 30.0, **arguments: Any
) -> Backbone:
    """Build a backbone with the access of a cell; arguments as in ``create_backbone``, or ``open_black_box`` for a black box.

    Raises:
        ConfigError: see ``create_backbone``; a package is missing.
    """
    found = accesses[access or "white-box"]
    found.check_installed()
    if found.remote:
        arguments |= {"endpoint": endpoint, "timeout": timeout}
    return found.build(name, **arguments)
