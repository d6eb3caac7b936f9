"""Joint training: every task is trained together with all tasks before it. The upper bound of one-head methods."""

from __future__ import annotations

from zeroflow.methods.finetune import FineTuning
from zeroflow.methods.method import register_method


@register_method("joint", "as finetune, each task together with all samples of the tasks before: the upper bound")
class Joint(FineTuning):
    """Fine-tuning on all samples seen so far; values go on from those after the task before."""

    all_tasks = True
    needs_head = "class means of old tasks would not follow what is trained on all of them"
