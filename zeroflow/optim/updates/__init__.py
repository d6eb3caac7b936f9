"""Step 3: from a direction to new parameters, by any ``torch.optim`` rule, plain or conserving, or by a method's own rule."""

from zeroflow.optim.updates.adamm import AdaMM
from zeroflow.optim.updates.conserve import Conserve, KeepBest
from zeroflow.optim.updates.plain import Plain
from zeroflow.optim.updates.radazo import RAdaZO
from zeroflow.optim.updates.rule import Rule, Update

__all__ = ["AdaMM", "Conserve", "KeepBest", "Plain", "RAdaZO", "Rule", "Update"]
