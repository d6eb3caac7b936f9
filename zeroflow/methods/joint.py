"""Joint training: train every task together with all earlier tasks. What methods with one head are held against."""

from __future__ import annotations

from zeroflow.methods.finetune import FineTuning
from zeroflow.methods.method import register_method


@register_method(
    "joint", "as finetune, each task together with all samples of the tasks before: the reference for forgetting"
)
class Joint(FineTuning):
    """Fine-tuning on all samples seen so far, starting from the values after the previous task."""

    all_tasks = True
    needs_head = "class means of old tasks would not follow what is trained on all of them"
