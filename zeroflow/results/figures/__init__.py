"""Plotly figures over the store: functions that get the data, and ``draw_*`` functions that draw it.

| figure | data | drawing |
| --- | --- | --- |
| accuracy per stage | ``stage_curves`` | ``draw_stage_curves`` |
| accuracy per task, a heat map | ``task_accuracies`` | ``draw_task_accuracy`` |
| tasks taken for others, a confusion matrix | ``task_confusions``, by class ``class_confusion`` | ``draw_task_confusion`` |
| last-task accuracy (Figure 4) | ``last_task_accuracy`` | ``draw_last_task_accuracy`` |
| all rows, in place of the radar (Figure 2) | ``tables.summary`` | ``draw_ranking`` |
| Avg against queries (Figure 5) | ``against_queries`` | ``draw_against_queries`` |
| Avg against work | ``tables.summary`` | ``draw_accuracy_against_forwards`` |
| memory and seconds (Table 2) | ``tables.summary`` | ``draw_costs``, ``draw_efficiency`` |
| memory and accuracy, Pareto front | ``trade_off`` | ``draw_trade_off`` |
| history, sparsity (Tables 3, 4) | ``option_curves`` | ``draw_option_curves`` |
| hybrid training | ``hybrid_gains`` | ``draw_hybrid_gains`` |
| trajectories (Figures 3, 6) | ``surfaces``, ``trajectories`` | ``draw_trajectories``, ``animate_trajectories``, ``draw_losses_against_each_other`` |
| function values (Figure 7) | ``function_values`` | ``draw_function_values`` |
| the whole grid | ``parallel_coordinates`` | ``draw_parallel_coordinates`` |
| ours and the paper's | ``published.compare``, ``effects.effects`` | ``draw_comparisons``, ``draw_effects`` |

Rows come from ``tables.summary``. Every figure names its units, shows 95 % t-intervals over seeds where there are several, and
is drawn for the colour-blind and for black and white (``figures.style``); ``to_column`` makes it fit a paper's column.
"""

from zeroflow.results.figures.accuracy import (
    Curve,
    Dot,
    TaskAccuracy,
    draw_last_task_accuracy,
    draw_ranking,
    draw_stage_curves,
    draw_task_accuracy,
    last_task_accuracy,
    stage_curves,
    task_accuracies,
    task_accuracy,
)
from zeroflow.results.figures.confusion import Confusion, class_confusion, draw_task_confusion, task_confusions
from zeroflow.results.figures.costs import (
    Line,
    TradeOff,
    against_queries,
    draw_accuracy_against_forwards,
    draw_against_queries,
    draw_costs,
    draw_efficiency,
    draw_trade_off,
    trade_off,
)
from zeroflow.results.figures.enhancements import (
    Gain,
    OptionLine,
    draw_comparisons,
    draw_effects,
    draw_hybrid_gains,
    draw_option_curves,
    hybrid_gains,
    option_curves,
)
from zeroflow.results.figures.grid import Axis, draw_parallel_coordinates, parallel_coordinates
from zeroflow.results.figures.landscapes import (
    FunctionValues,
    Run,
    Surface,
    animate_trajectories,
    draw_function_values,
    draw_losses_against_each_other,
    draw_trajectories,
    function_values,
    surfaces,
    trajectories,
)
from zeroflow.results.figures.style import DASHES, MARKERS, PALETTE, TEMPLATE, to_column

__all__ = [
    "DASHES", "MARKERS", "PALETTE", "TEMPLATE", "Axis", "Confusion", "Curve", "Dot", "FunctionValues", "Gain", "Line", "OptionLine", "Run",
    "Surface", "TaskAccuracy", "TradeOff", "against_queries", "animate_trajectories", "class_confusion", "draw_accuracy_against_forwards",
    "draw_against_queries", "draw_comparisons", "draw_costs", "draw_effects", "draw_efficiency", "draw_function_values",
    "draw_hybrid_gains", "draw_last_task_accuracy", "draw_losses_against_each_other", "draw_option_curves",
    "draw_parallel_coordinates", "draw_ranking", "draw_stage_curves", "draw_task_accuracy", "draw_task_confusion", "draw_trade_off",
    "draw_trajectories", "function_values", "hybrid_gains", "last_task_accuracy", "option_curves", "parallel_coordinates",
    "stage_curves", "surfaces", "task_accuracies", "task_accuracy", "task_confusions", "to_column", "trade_off", "trajectories",
]  # fmt: skip
