"""Step 3: from a direction to new parameters: any ``torch.optim`` rule, bare or guarded, and rules of methods' own."""

from zeroflow.optim.updates.adamm import AdaMM
from zeroflow.optim.updates.conserve import Conserve, KeepBest
from zeroflow.optim.updates.plain import Plain
from zeroflow.optim.updates.radazo import RAdaZO
from zeroflow.optim.updates.rule import Rule, Update

__all__ = ["AdaMM", "Conserve", "KeepBest", "Plain", "RAdaZO", "Rule", "Update"]
