"""A fresh adapter for every task: the plainest dynamic architecture among the extension-based methods (ZeroFlow, Section 3.2)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from zeroflow.methods.ease import EASE
from zeroflow.methods.method import register_method
from zeroflow.methods.options import AdapterOptions
from zeroflow.models.backbone import Backbone


@register_method("adapter-per-task", "a fresh adapter per task; a class is scored in its own task's space only")
class AdapterPerTask(EASE):
    """EASE without its ensemble: no prototype is used outside the space its class was learned in."""

    Options = AdapterOptions  # type: ignore[assignment]

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, EASE.Options(**asdict(options or self.Options()), diagonal_only=True))
