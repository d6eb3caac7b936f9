"""APER with adapters: adapt to the first task, then merge frozen and adapted features into class means.

Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", IJCV 2024, Section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeroflow.methods.method import Method, positive, register_method
from zeroflow.methods.simplecil import SimpleCIL
from zeroflow.models.adapters import AdapterStack
from zeroflow.models.backbone import Backbone, Prefix
from zeroflow.models.heads import CosineHead


@register_method("aper-adapter", "adapters trained on the first task; class means of [frozen; adapted] features")
class APERAdapter(SimpleCIL):
    """Task 0 trains adapters and a cosine head; afterwards a SimpleCIL over ``[backbone(x); adapted(x)]``."""

    trains = True

    @dataclass(frozen=True)
    class Options(Method.Options):
        """bottleneck: inner width of an adapter. scale: factor on its output. dropout: inside it, while training."""

        bottleneck: int = 64
        scale: float = 0.1
        dropout: float = 0.1

        def __post_init__(self) -> None:
            positive(bottleneck=self.bottleneck, scale=self.scale)
            if not 0 <= self.dropout < 1:
                raise ValueError(f"dropout={self.dropout!r}: expected a share in [0, 1)")

    def __init__(self, backbone: Backbone, options: Options | None = None) -> None:
        super().__init__(backbone)
        self.options = options or self.Options()
        self.register_buffer("prototypes", torch.empty(0, 2 * backbone.width))
        self.adapters: AdapterStack | None = None
        self.head: CosineHead | None = None

    def begin_task(self, classes: range, generator: torch.Generator) -> None:
        super().begin_task(classes, generator)
        if classes.start == 0:
            opt, backbone = self.options, self.backbone
            self.adapters = AdapterStack(
                backbone.depth, backbone.width, opt.bottleneck,
                scale=opt.scale, dropout=opt.dropout, generator=generator,
            )  # fmt: skip
            self.head = CosineHead(backbone.width, len(classes), generator=generator)
        else:
            # The head served its purpose, and the merged model stays as it is from now on.
            self.head = None
            self.requires_grad_(False).eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad} if self.head is not None else {}

    def losses(self, images: Tensor | Prefix, labels: Tensor) -> Tensor:
        assert self.head is not None, "only the first task is trained"
        logits = self.head(self.backbone(images, self.adapters))
        return F.cross_entropy(logits, labels, reduction="none")

    @torch.no_grad()
    def features(self, images: Tensor, spaces: range) -> Tensor:
        prefix = self.backbone.prefix(images)
        return torch.cat([self.backbone(prefix), self.backbone(prefix, self.adapters)], dim=1)[:, None]
