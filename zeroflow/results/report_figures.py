"""Which figures a report shows of some tables, in which order, and the sentences that say how to read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.progress import Progress, silent
from zeroflow.results import figures, published
from zeroflow.results.effects import by_stream, effects
from zeroflow.results.summary import Row, same_problem, shared, summary


@dataclass(frozen=True)
class Entry:
    """A figure of the page: what it is, and how to read it."""

    title: str
    caption: str
    figure: go.Figure


@dataclass(frozen=True)
class Section:
    """Figures below a heading; ``dataset``: the only one they show; ``above``: sentences that hold for all of them."""

    heading: str
    dataset: str | None
    entries: Sequence[Entry]
    above: Sequence[str] = ()


@dataclass
class Drawn:
    """The figures of the page, in sections, and why others are missing."""

    sections: list[Section] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def by_dataset(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each data set, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.config["dataset"]), []).append(row)
    return found


def choose(
    tables: Mapping[str, pa.Table],
    rows: Sequence[Row],
    efficiency: Mapping[str, Any] | None,
    on_progress: Progress = silent,
) -> Drawn:
    """The figures that some tables have something for.

    Args:
        tables: as ``Store.load`` gives them.
        rows: of ``trials``, from ``summary.summary``.
        efficiency: what ``zeroflow efficiency --json`` wrote.
        on_progress: as in ``report.write_report``.
    """
    drawn = Drawn()
    trials = tables["trials"]
    datasets = by_dataset(rows)
    for number, dataset in enumerate(datasets):
        on_progress(f"figures: {dataset}", number, len(datasets) + 2)
        own = trials.filter(pc.field("dataset") == dataset)
        alike = summary(own)
        entries = list(_of_dataset(alike, own, tables))
        drawn.sections.append(Section(f"Figures: {dataset}", dataset, entries, shared(alike)))
    on_progress("figures of everything", len(datasets), len(datasets) + 2)
    if len(trials):
        for name, what in (
            ("stages", "accuracy along the stream"),
            ("accuracy", "accuracy per task and on the last task"),
        ):
            if not len(tables[name]):
                drawn.missing.append(f"The store has no table {name}, so there is no figure of {what}.")
        compared = [found for found in published.compare(trials) if found.verified]
        if compared:
            title = "Ours beside the paper's numbers"
            caption = (
                "A line per published row that has been run: the open diamond is the paper's Avg, the dot ours, with its 95 % "
                "interval."
            )
            drawn.sections.append(Section(title, None, [Entry(title, caption, figures.draw_comparisons(compared))]))
    if efficiency is not None:
        title = "What a step costs"
        caption = f"Memory saved and time of a step, each against first order's, here (on {efficiency['device']}) and published in Table 2."
        drawn.sections.append(Section(title, None, [Entry(title, caption, figures.draw_efficiency(efficiency))]))
    ways = list(_landscapes(tables))
    if ways:
        drawn.sections.append(Section("The way over both losses", None, ways))
    return drawn


_SEEDS = "Bars and bands are 95 % t-intervals over seeds; a single seed has none."


def _of_dataset(rows: list[Row], trials: pa.Table, tables: Mapping[str, pa.Table]) -> Iterator[Entry]:
    """The figures that there is something for, of one data set."""
    yield from _accuracies(rows, tables)
    yield from _costs(rows)
    yield from _changes(rows, trials, tables)
    if len(rows) > 1:
        yield Entry(
            "The whole grid",
            "A line per setting through its keys, its costs and its Avg, in the colours of the other figures. "
            "Dotted: SimpleCIL.",
            figures.draw_parallel_coordinates(rows),
        )


def _accuracies(rows: list[Row], tables: Mapping[str, pa.Table]) -> Iterator[Entry]:
    streams = {same_problem(row.config) for row in rows}
    line = (
        "dots right of the dotted line, SimpleCIL, are better than it. Forgetting: less is better, dots left of the line forget less."
        if len(streams) == 1
        else f"of {len(streams)} streams, named by what tells them apart; only rows of one stream compare. Forgetting: less is better."
    )
    yield Entry(
        "All settings beside each other",
        f"Average accuracy and accuracy at the end: {line} {_SEEDS}",
        figures.draw_ranking(rows),
    )
    curves = figures.stage_curves(rows, tables["stages"])
    if curves:
        yield Entry(
            "Accuracy along the stream",
            f"How accuracy on all classes seen so far falls as classes arrive. {_SEEDS}",
            figures.draw_stage_curves(curves),
        )
    dots = figures.last_task_accuracy(rows, tables["accuracy"])
    if dots:
        yield Entry(
            "Accuracy on the last task",
            f"How well a setting still learns what comes last, right after it has learned it. {_SEEDS}",
            figures.draw_last_task_accuracy(dots),
        )
    matrices = figures.task_accuracies(rows, tables["accuracy"])
    if matrices:
        yield Entry(
            "Accuracy per task",
            "A line of squares per stage, a column per task; a column that darkens downwards is a task being "
            "forgotten. Means over seeds.",
            figures.draw_task_accuracy(matrices),
        )
    confusions = figures.task_confusions(rows, tables["confusion"], tables["stages"])
    if confusions:
        yield Entry(
            "Tasks taken for others",
            "After the last stage, where the samples of each task are put: a line adds up to 100 %. A column that is bright from "
            "top to bottom is a task that draws the samples of all others, as the last one does where classes are forgotten. All seeds.",
            figures.draw_task_confusion(confusions),
        )


def _costs(rows: list[Row]) -> Iterator[Entry]:
    lines = figures.against_queries(rows)
    streams = {same_problem(row.config) for line in lines for row in line.rows}
    baselines = [row for row in rows if row.is_baseline and same_problem(row.config) in streams]
    if lines:
        yield Entry(
            "Accuracy against queries",
            f"What more directions per step bring, at the same number of steps. {_SEEDS}",
            figures.draw_against_queries(lines, baselines),
        )
    if any(row.forward_passes for row in rows):
        counted = all(row.forward_equivalents is not None for row in rows)
        yield Entry(
            "Accuracy against work",
            f"What accuracy costs in forward passes{', a backward pass counting as two' if counted else ''}; up and "
            f"left is better. Settings of the same optimizer on the same stream are joined. {_SEEDS}",
            figures.draw_accuracy_against_forwards(rows, "forward_equivalents" if counted else "forward_passes"),
        )
    if any(row.peak_memory is not None for row in rows):
        yield Entry(
            "What it costs",
            "Peak memory of a training step with what the classifier keeps, none where nothing is trained, and wall time of a whole cell; means over seeds.",
            figures.draw_costs(rows),
        )
        yield Entry(
            "Accuracy against memory",
            "Up and left is better. No setting beats those on the dotted line, the Pareto front of what passes the filters, "
            f"in both. {_SEEDS}",
            figures.draw_trade_off(figures.trade_off(rows)),
        )


def _changes(rows: list[Row], trials: pa.Table, tables: Mapping[str, pa.Table]) -> Iterator[Entry]:
    """What options and enhancements change, and how old and new tasks compete."""
    for option, table in (("history", 3), ("sparsity", 4)):
        found = figures.option_curves(rows, option)
        if found:
            yield Entry(
                f"{option.capitalize()} (Table {table})",
                f"What the optimizer's option {option} changes, everything else being equal. {_SEEDS}",
                figures.draw_option_curves(found, option),
            )
    gains = figures.hybrid_gains(rows, trials, tables["stages"])
    if gains:
        yield Entry(
            "Hybrid training",
            "Exact gradients first, forward passes alone for the last epochs: accuracy minus that of first order "
            f"alone for as many epochs, paired by seed. Above 0 it helped. {_SEEDS}",
            figures.draw_hybrid_gains(gains),
        )
    values = figures.function_values(rows, tables["probes"])
    if values:
        yield Entry(
            "Function values of old and new tasks",
            "Loss on fixed training samples of the task being learned and of all before it, step by step: what one "
            f"gains, the others lose. {_SEEDS}",
            figures.draw_function_values(values),
        )
    changes = [
        replace(e, name=", ".join(filter(None, [stream, e.name])))
        for _, stream, own in by_stream(trials)
        for name in ("table1", "table3", "table4", "figure5", "hybrid")
        for e in effects(name, own)
        if e.metric == "avg" and e.ours
    ]
    if changes:
        yield Entry(
            "What one change does, ours beside the paper's",
            "Change of Avg. The paper's data sets are others, so sizes may differ; its finding holds here where "
            "both marks lie on the same side of 0 and the interval does not touch it.",
            figures.draw_effects(changes),
        )


def _landscapes(tables: Mapping[str, pa.Table]) -> Iterator[Entry]:
    runs = figures.trajectories(tables["trajectories"])
    kinds = {
        "both": "both tasks at once",
        "old-then-new": "the old task first, then the new one",
    }
    for surface in figures.surfaces(tables["surfaces"]):
        name = {"two-parameters": "two parameters", "adapter": "the trained values of an adapter"}.get(
            surface.landscape, surface.landscape
        )
        for objective, how in kinds.items():
            if not any(run.objective == objective and run.landscape_id == surface.landscape_id for run in runs):
                continue
            title = f"{name.capitalize()}: {how}"
            yield Entry(
                title,
                f"Contours are the losses of the old task (solid) and the new one (dotted) over {name}; each line "
                "is the way of one optimizer, first seed. Play, or drag the slider.",
                figures.animate_trajectories(surface, runs, objective=objective),
            )
            yield Entry(
                f"{title}: one loss against the other",
                "What a run gives up of the old task for what it gains on the new one; down and left is better.",
                figures.draw_losses_against_each_other(surface, runs, objective=objective),
            )
