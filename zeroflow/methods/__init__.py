"""Class-incremental methods, one per file. Importing the package registers the built-in ones."""

from zeroflow.methods.adapter_per_task import AdapterPerTask
from zeroflow.methods.aper import (
    APERSSF,
    APERAdapter,
    APERBlockShift,
    APERDeepPrompts,
    APERFineTune,
    APERInputFilter,
    APERInputPrompt,
    APERNormAffine,
    APERPrompts,
)
from zeroflow.methods.closed_form import ACIL, SLDA, FeCAM, RanPAC
from zeroflow.methods.ease import EASE
from zeroflow.methods.ewc import EWC
from zeroflow.methods.experience_replay import ExperienceReplay
from zeroflow.methods.finetune import FineTuning
from zeroflow.methods.foro import FoRo
from zeroflow.methods.generative_replay import GenerativeReplay
from zeroflow.methods.joint import Joint
from zeroflow.methods.l2sp import L2SP
from zeroflow.methods.lwf import LwF
from zeroflow.methods.method import Method, MethodInfo, MiniBatch, methods, register_method
from zeroflow.methods.shared_adapter import SharedAdapter
from zeroflow.methods.simplecil import SimpleCIL

__all__ = [
    "ACIL", "APERSSF", "EASE", "EWC", "L2SP", "SLDA", "APERAdapter", "APERBlockShift", "APERDeepPrompts", "APERFineTune", "APERInputFilter",
    "APERInputPrompt", "APERNormAffine", "APERPrompts", "AdapterPerTask", "ExperienceReplay", "FeCAM", "FineTuning", "FoRo", "GenerativeReplay",
    "Joint", "LwF", "Method", "MethodInfo", "MiniBatch", "RanPAC",
    "SharedAdapter", "SimpleCIL", "methods", "register_method",
]  # fmt: skip
