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
from zeroflow.methods.method import MiniBatch, odd, positive, register_method, whole_example
from zeroflow.methods.options import AdapterOptions, TuningOptions
from zeroflow.methods.simplecil import SimpleCIL
from zeroflow.models.backbone import Backbone, Prefix
from zeroflow.models.frozen import Known
from zeroflow.models.tuning import Tuning, create_tuning
from zeroflow.optim import OptimizerInfo


class APER(SimpleCIL):
    """Task 0 trains a tuning and a cosine head; afterwards a SimpleCIL over ``[backbone(x); tuned(x)]``, or ``tuned(x)``."""

    trains = True
    first_task_only = True
    any_loss = True
    needs_head = ""
    tuned_by: ClassVar[str]
    """What is trained, a name in ``zeroflow.models.tuning.tunings``."""

    @dataclass(frozen=True)
    class Options(TuningOptions):
        """Options of APER.

        Attributes:
            merge: classify ``[frozen; adapted]`` features; otherwise the adapted ones alone.
        """

        merge: bool = True

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        self.takes = "both" if self.options.merge else "images"
        self.tuning: Tuning | None = None
        self.head: nn.Module | None = None

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        if classes.start == 0:
            self.tuning = create_tuning(self.tuned_by, self.backbone, generator, asdict(self.options))
            self.head = self.new_head(len(classes), generator)
        else:
            # The head is no longer needed, and the merged model is frozen from now on.
            self.head = None
            self.requires_grad_(False).eval()
        super().begin_task(classes, generator)  # last, so that no initial value depends on the classifier

    @property
    def width(self) -> int:
        return (1 + self.options.merge) * self.backbone.width

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
        return whole_example(optimizer, cls.tuned_by, options.subspace)

    @torch.no_grad()
    def features(self, images: Tensor, spaces: range) -> Tensor:
        assert self.tuning is not None, "no task has begun"
        known = images if isinstance(images, Known) else None
        images = images if known is None or known.images is None else known.images
        prefix = self.tuning.prefix(self.backbone, images)
        adapted = self.tuning(self.backbone, prefix)
        if not self.options.merge:
            return adapted[:, None]
        frozen = self.backbone(prefix if isinstance(prefix, Prefix) else images) if known is None else known
        return torch.cat([frozen, adapted], dim=1)[:, None]


@register_method("aper-adapter", "adapters trained on the first task; class means of [frozen; adapted] features")
class APERAdapter(APER):
    """APER with an adapter beside every block's MLP."""

    tuned_by = "adapter"

    @dataclass(frozen=True)
    class Options(AdapterOptions, APER.Options):
        """Options of APER and of adapters."""


@register_method("aper-vpt-shallow", "as aper-adapter, with learnable tokens that enter the first block")
class APERPrompts(APER):
    """APER with visual prompts."""

    tuned_by = "vpt-shallow"

    @dataclass(frozen=True)
    class Options(APER.Options):
        """Options of APER, and the number of prompts.

        Attributes:
            tokens: learnable tokens at each place.
        """

        tokens: int = 5

        def __post_init__(self) -> None:
            super().__post_init__()
            positive(tokens=self.tokens)


@register_method("aper-vpt-deep", "as aper-adapter, with learnable tokens that enter every block")
class APERDeepPrompts(APERPrompts):
    """APER with visual prompts in every block."""

    tuned_by = "vpt-deep"


@register_method("aper-ssf", "as aper-adapter, with scales and shifts behind every layer")
class APERSSF(APER):
    """APER with scaled and shifted features."""

    tuned_by = "ssf"


@register_method("aper-norm-affine", "as aper-adapter, with the scales and shifts that the backbone's norms have")
class APERNormAffine(APER):
    """APER that trains the scales and shifts of the backbone's norms."""

    tuned_by = "norm-affine"


@register_method("aper-block-shift", "as aper-adapter, with a vector added behind every block")
class APERBlockShift(APER):
    """APER with shifted blocks."""

    tuned_by = "block-shift"


@register_method("aper-finetune", "as aper-adapter, with every weight of a copy of the backbone")
class APERFineTune(APER):
    """APER with full fine-tuning."""

    tuned_by = "full"


@register_method("aper-input-prompt", "as aper-adapter, with a pattern added to the image: nothing inside is touched")
class APERInputPrompt(APER):
    """APER for a backbone whose input alone is accessible."""

    tuned_by = "input-prompt"

    @dataclass(frozen=True)
    class Options(APER.Options):
        """Options of APER, and the size of the pattern.

        Attributes:
            border: width of the frame, pixels.
            rank: of the pattern over the whole image.
        """

        border: int = 2
        rank: int = 2

        def __post_init__(self) -> None:
            super().__post_init__()
            positive(border=self.border, rank=self.rank)


@register_method(
    "aper-input-filter", "as aper-adapter, with a small filter that every image passes: a handful of values"
)
class APERInputFilter(APER):
    """APER with a filter in front of a backbone whose input alone is accessible."""

    tuned_by = "input-filter"

    @dataclass(frozen=True)
    class Options(APER.Options):
        """Options of APER, and the shape of the filter.

        Attributes:
            size: side of the filter, pixels, odd.
            shared: one filter for all channels, otherwise one for each.
        """

        size: int = 5
        shared: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            odd(size=self.size)
