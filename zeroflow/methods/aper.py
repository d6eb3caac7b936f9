"""APER: adapt to the first task, then merge frozen and adapted features into class means.

Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", IJCV 2024, Section 5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zeroflow.data.scenario import Batch
from zeroflow.methods.method import Method, MiniBatch, positive, register_method, whole_example
from zeroflow.methods.simplecil import SimpleCIL
from zeroflow.models.backbone import Backbone, Prefix
from zeroflow.models.frozen import Known
from zeroflow.models.heads import CosineHead
from zeroflow.models.tuning import Tuning, tunings
from zeroflow.optim import OptimizerInfo


class APER(SimpleCIL):
    """Task 0 trains a tuning and a cosine head; afterwards a SimpleCIL over ``[backbone(x); tuned(x)]``."""

    trains = True
    any_loss = True
    takes = "both"
    tuned_by: ClassVar[str]
    """What is trained, a name in ``zeroflow.models.tuning.tunings``."""

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        self.register_buffer("prototypes", torch.empty(0, 2 * backbone.width))
        self.tuning: Tuning | None = None
        self.head: CosineHead | None = None

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        super().begin_task(classes, generator)
        if classes.start == 0:
            self.tuning = tunings.get(self.tuned_by).of(self.backbone, generator, asdict(self.options))
            self.head = CosineHead(self.backbone.width, len(classes), generator=generator)
        else:
            # The head served its purpose, and the merged model stays as it is from now on.
            self.head = None
            self.requires_grad_(False).eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad} if self.head is not None else {}

    def prepare(self, batch: MiniBatch) -> tuple[Any, Tensor]:
        assert self.tuning is not None, "no task has begun"
        return self.tuning.prefix(self.backbone, batch.images), batch.labels

    def losses(self, inputs: tuple[Any, Tensor]) -> Tensor:
        assert self.tuning is not None and self.head is not None, "only the first task is trained"
        prefix, labels = inputs
        return self.criterion(self.head(self.tuning(self.backbone, prefix)), labels)

    @classmethod
    def tunes(cls, options: Any) -> str:
        return cls.tuned_by

    @classmethod
    def refusal(cls, optimizer: OptimizerInfo, options: Any) -> str | None:
        return whole_example(optimizer, cls.tuned_by)

    @torch.no_grad()
    def features(self, images: Tensor, spaces: range) -> Tensor:
        assert self.tuning is not None, "no task has begun"
        known = images if isinstance(images, Known) else None
        images = images if known is None or known.images is None else known.images
        prefix = self.tuning.prefix(self.backbone, images)
        frozen = self.backbone(prefix if isinstance(prefix, Prefix) else images) if known is None else known
        return torch.cat([frozen, self.tuning(self.backbone, prefix)], dim=1)[:, None]


@register_method("aper-adapter", "adapters trained on the first task; class means of [frozen; adapted] features")
class APERAdapter(APER):
    """APER with an adapter beside every block's MLP."""

    tuned_by = "adapter"

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


@register_method("aper-vpt-shallow", "as aper-adapter, with learnable tokens that enter the first block")
class APERPrompts(APER):
    """APER with visual prompts."""

    tuned_by = "vpt-shallow"

    @dataclass(frozen=True)
    class Options(Method.Options):
        """tokens: learnable tokens at each place."""

        tokens: int = 5

        def __post_init__(self) -> None:
            positive(tokens=self.tokens)


@register_method("aper-vpt-deep", "as aper-adapter, with learnable tokens that enter every block")
class APERDeepPrompts(APERPrompts):
    """APER with visual prompts in every block."""

    tuned_by = "vpt-deep"


@register_method("aper-ssf", "as aper-adapter, with scales and shifts behind every layer")
class APERSSF(APER):
    """APER with scaled and shifted features."""

    tuned_by = "ssf"


@register_method("aper-finetune", "as aper-adapter, with every weight of a copy of the backbone")
class APERFineTune(APER):
    """APER with full fine-tuning."""

    tuned_by = "full"


@register_method("aper-input-prompt", "as aper-adapter, with a pattern added to the image: nothing inside is touched")
class APERInputPrompt(APER):
    """APER for a backbone of which only the input can be reached."""

    tuned_by = "input-prompt"

    @dataclass(frozen=True)
    class Options(Method.Options):
        """border: width of the frame, pixels. rank: of the pattern over the whole image."""

        border: int = 2
        rank: int = 2

        def __post_init__(self) -> None:
            positive(border=self.border, rank=self.rank)
