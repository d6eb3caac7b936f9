"""FoRo: prompts found by evolution, then a random projection of the features and recursive least squares.

Source: Chen et al., "Forward-Only Continual Learning", arXiv 2509.01533. The paper fixes three parts: prompts at the input
layer, optimised by CMA-ES; a nonlinear random projection; a classifier by recursive least squares that needs no earlier data.
Our choices where it is silent: prompts are trained on the first task only, so that features stay fixed and least squares stay
exact; their loss is the cell's (``loss: class-means`` needs no head); the projection is RanPAC's.
"""

from __future__ import annotations

from dataclasses import dataclass

from zeroflow.methods.aper import APERPrompts
from zeroflow.methods.method import register_method


@register_method("foro", "prompts trained on the first task, best by es-cma; ridge regression on a random projection")
class FoRo(APERPrompts):
    """APER with visual prompts at the input, the prompted features alone, and RanPAC's classifier."""

    own_classifier = "random-projection"
    takes_classifiers = ("random-projection",)
    why_these = "its classifier is what it is named for; method aper-vpt-shallow takes any classifier"

    @dataclass(frozen=True)
    class Options(APERPrompts.Options):
        """Options of APER with prompts, with other defaults.

        Attributes:
            tokens: learnable tokens at the input.
            merge: classify ``[frozen; prompted]`` features; otherwise the prompted ones alone.
        """

        tokens: int = 3
        merge: bool = False
