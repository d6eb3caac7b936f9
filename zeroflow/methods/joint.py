"""Joint training: train every task together with all earlier tasks. The upper bound of methods with one head."""

from __future__ import annotations

from zeroflow.methods.finetune import FineTuning
from zeroflow.methods.method import register_method


@register_method("joint", "as finetune, each task together with all samples of the tasks before: the upper bound")
class Joint(FineTuning):
    """Fine-tuning on all samples seen so far, starting from the values after the previous task."""

    all_tasks = True
    needs_head = "class means of old tasks would not follow what is trained on all of them"
