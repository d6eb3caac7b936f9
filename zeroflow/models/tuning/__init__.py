"""Ways to tune a frozen backbone, one per file."""

from zeroflow.models.tuning.adapters import Adapters
from zeroflow.models.tuning.block_shift import BlockShift
from zeroflow.models.tuning.full import Full
from zeroflow.models.tuning.input_filter import InputFilter
from zeroflow.models.tuning.input_prompt import InputPrompt
from zeroflow.models.tuning.norm_affine import NormAffine
from zeroflow.models.tuning.prompts import DeepPrompts, Prompts
from zeroflow.models.tuning.ssf import SSF, ScaleAndShift
from zeroflow.models.tuning.subspace import Subspace, create_tuning
from zeroflow.models.tuning.tuning import Tuning, Untuned, tunings

_BUILT_IN: dict[str, type[Tuning]] = {
    "none": Untuned, "adapter": Adapters, "vpt-shallow": Prompts, "vpt-deep": DeepPrompts, "ssf": SSF,
    "norm-affine": NormAffine, "block-shift": BlockShift, "full": Full, "input-prompt": InputPrompt,
    "input-filter": InputFilter,
}  # fmt: skip

for _name, _tuning in _BUILT_IN.items():
    tunings.register(_name, _tuning)

__all__ = [
    "SSF", "Adapters", "BlockShift", "DeepPrompts", "Full", "InputFilter", "InputPrompt", "NormAffine", "Prompts",
    "ScaleAndShift", "Subspace", "Tuning", "Untuned", "create_tuning", "tunings",
]  # fmt: skip
