"""How the figures look: units, hovering, colours, names, widths."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator

import plotly.graph_objects as go
import pyarrow.compute as pc
import pytest
from everything import cell, fill, simplecil

from zeroflow.results import SCHEMAS, Store, figures
from zeroflow.results.effects import effects
from zeroflow.results.figures.style import look
from zeroflow.results.summary import Row, summary
from zeroflow.results.tables import make_tables


def rows_of(store: Store, dataset: str = "quickdraw100") -> list[Row]:
    return summary(store.load("trials").filter(pc.field("dataset") == dataset))


def drawn(store: Store) -> Iterator[tuple[str, go.Figure]]:
    """Every figure there is, by name."""
    rows, trials, stages = rows_of(store), store.load("trials"), store.load("stages")
    accuracy = store.load("accuracy")
    yield "stages", figures.draw_stage_curves(figures.stage_curves(rows, stages))
    yield "tasks", figures.draw_task_accuracy(figures.task_accuracies(rows, accuracy))
    yield "last", figures.draw_last_task_accuracy(figures.last_task_accuracy(rows, accuracy))
    yield (
        "confusion",
        figures.draw_task_confusion(figures.task_confusions(rows, store.load("confusion"), store.load("stages"))),
    )
    yield "ranking", figures.draw_ranking(rows)
    yield "queries", figures.draw_against_queries(figures.against_queries(rows), rows[:1])
    for work in ("forward_passes", "forward_equivalents"):
        yield work, figures.draw_accuracy_against_forwards(rows, work)
    yield "costs", figures.draw_costs(rows)
    yield "trade-off", figures.draw_trade_off(figures.trade_off(rows))
    for option in ("history", "sparsity"):
        yield option, figures.draw_option_curves(figures.option_curves(rows, option), option)
    yield "hybrid", figures.draw_hybrid_gains(figures.hybrid_gains(rows, trials, stages))
    yield "values", figures.draw_function_values(figures.function_values(rows, store.load("probes")))
    yield "grid", figures.draw_parallel_coordinates(rows)
    yield "effects", figures.draw_effects(effects("table1", trials))
    surface, runs = figures.surfaces(store.load("surfaces"))[0], figures.trajectories(store.load("trajectories"))
    yield "trajectories", figures.draw_trajectories(surface, runs)
    yield "animation", figures.animate_trajectories(surface, runs)
    yield "losses", figures.draw_losses_against_each_other(surface, runs)


@pytest.mark.slow
def test_every_figure_is_drawn_with_units_on_every_axis(full: Store) -> None:
    for name, figure in drawn(full):
        assert figure.data, name
        for axis in [*figure.select_xaxes(), *figure.select_yaxes()]:
            if axis.visible is False or axis.type == "category" or (axis.tickvals is not None and not axis.title.text):
                continue  # names, not numbers
            if axis.title.text is None and axis.matches is not None:
                continue  # shared with another panel, which says it
            if axis.title.text is None and name in ("history", "sparsity"):
                continue  # the middle panel says it for all
            assert axis.title.text and re.search(r"\(.+\)$", axis.title.text), (name, axis)


@pytest.mark.slow
def test_every_mark_says_what_it_is_filtered_by(full: Store) -> None:
    wanted = {"optimizer", "queries"}
    for name, figure in drawn(full):
        marked = [trace for trace in figure.data if trace.meta]
        assert len(marked) >= len(figure.data) - 6, f"{name}: contours and named points alone have none"
        for trace in marked:
            points = trace.meta.get("points") or [trace.meta["keys"]]
            assert all(wanted <= set(keys) for keys in points), name
            if "points" in trace.meta:
                assert len(trace.meta["points"]) == len(trace.x) == len(trace.y), name
        json.dumps(figure.to_plotly_json(), allow_nan=False)


@pytest.mark.slow
def test_hovering_says_the_unit_of_the_axis(full: Store) -> None:
    """Differences are in points, not in percent of anything."""
    stands = {"nats": "nats", "points": "points", "points, less is better": "points", "%": "%", "MiB": "MiB", "s": "s"}
    panels = {"ranking": "x", "costs": "x", "effects": "x"}
    for name, figure in drawn(full):
        if name not in (
            "stages",
            "last",
            "ranking",
            "queries",
            "costs",
            "history",
            "sparsity",
            "hybrid",
            "values",
            "effects",
        ):
            continue
        side = panels.get(name, "x" if name == "last" else "y")
        for trace in figure.data:
            if trace.hoverinfo == "skip" or not trace.hovertemplate:
                continue
            axis = figure.layout[f"{side}axis{(trace[f'{side}axis'] or side)[1:]}"]
            unit = stands[re.search(r"\((.+)\)$", axis.title.text)[1]]
            texts = [text for text in trace.text or [""] if text]
            said = trace.hovertemplate.removesuffix("<extra></extra>").replace("%{text}", texts[0] if texts else "")
            assert said.endswith(f" {unit}"), (name, said)


def test_lines_differ_without_colour_and_families_share_one() -> None:
    found = [look(number, "zo-sgd") for number in range(24)]
    assert len({(each.dash, each.marker) for each in found}) == 24
    names = {"fo-sgd": "fo-adam", "zo-sgd": "zo-sgd-sign", "zo-adam": "zo-adam-sign", "zo-cge": "zo-fzoo"}
    for number, (one, other) in enumerate(names.items()):
        assert look(number, one).color == look(number, other).color
    distinct = {look(0, name).color for name in (None, "forward-grad", "my-own", *names)}
    assert len(distinct) == 7 and distinct <= set(figures.PALETTE)


def test_a_row_looks_alike_in_every_figure(full: Store) -> None:
    rows = rows_of(full)
    found = [
        figures.draw_ranking(rows),
        figures.draw_stage_curves(figures.stage_curves(rows, full.load("stages"))),
        figures.draw_trade_off(figures.trade_off(rows)),
    ]
    for group in range(len(rows)):
        marks = {
            (trace.marker.color, trace.marker.symbol)
            for figure in found
            for trace in figure.data
            if trace.meta["group"] == group and trace.marker.symbol
        }
        assert len(marks) == 1


def test_names_are_shown_and_not_read_as_tags(store: Store) -> None:
    fill(store, cell(method="<b>bold</b>"), simplecil())
    for figure in (
        figures.draw_ranking(rows_of(store)),
        figures.draw_task_accuracy(figures.task_accuracies(rows_of(store), store.load("accuracy"))),
        figures.draw_parallel_coordinates(rows_of(store)),
    ):
        text = json.dumps({k: v for k, v in figure.to_plotly_json().items() if k != "meta"})
        shown = re.sub(r'"(label|method)": "[^"]*"', "", text)
        assert "&lt;b&gt;bold" in shown and "<b>bold" not in shown


@pytest.mark.slow
def test_a_figure_for_a_column_is_narrow_and_leaves_the_first_alone(full: Store) -> None:
    wide = figures.draw_ranking(rows_of(full))
    small = figures.to_column(wide)
    assert (small.layout.width, small.layout.font.size) == (340, 9) and wide.layout.width is None
    assert {figures.to_column(figure).layout.width for _, figure in drawn(full)} == {340, 680}


def test_panels_with_axes_of_their_own_come_one_below_the_other_in_a_column(full: Store) -> None:
    wide = figures.draw_option_curves(figures.option_curves(rows_of(full), "history"), "history")
    small = figures.to_column(wide)
    across, upright = ([axis.domain for axis in axes] for axes in (small.select_xaxes(), small.select_yaxes()))
    assert across == [(0, 1)] * 3 and all(low[1] < high[0] for high, low in itertools.pairwise(upright))
    assert [axis.title.text for axis in small.select_xaxes()] == [None, None, "share of the historical estimate (1)"]


def test_large_numbers_are_shown_as_they_are(store: Store) -> None:
    large = cell(optimizer="zo-sgd")
    large.costs.update(
        forward_passes=1_234_567, forward_equivalents=1_851_849, seconds=123_456.7, peak_memory_bytes=45_678.9 * 2**20
    )
    fill(store, large)
    rows = summary(store.load("trials"))
    for work, said in (
        ("forward_passes", "1,234,567 forward passes"),
        ("forward_equivalents", "1,851,849 forward equivalents"),
    ):
        (point,) = figures.draw_accuracy_against_forwards(rows, work).data
        assert point.x == (getattr(rows[0], work),) and point.text[0].startswith(f"{said}<br>")
    assert [bar.text for bar in figures.draw_costs(rows).data] == [("45,678.9",), ("123,456.7",)]
    (_, mark) = figures.draw_trade_off(figures.trade_off(rows)).data
    assert mark.hovertemplate.startswith("45,678.9 MiB")


def test_nothing_measured_draws_empty_figures() -> None:
    for figure in (
        figures.draw_stage_curves([]),
        figures.draw_task_accuracy([]),
        figures.draw_ranking([]),
        figures.draw_against_queries([]),
        figures.draw_accuracy_against_forwards([]),
        figures.draw_costs([]),
        figures.draw_trade_off([]),
        figures.draw_hybrid_gains([]),
        figures.draw_option_curves([], "history"),
        figures.draw_function_values([]),
        figures.draw_effects([]),
        figures.draw_comparisons([]),
        figures.draw_parallel_coordinates([]),
        figures.draw_last_task_accuracy([]),
    ):
        json.dumps(figure.to_plotly_json())


def test_measured_costs_stand_beside_the_papers() -> None:
    result = {
        "model_bytes": 1e9,
        "device": "here",
        "first_task_images": {},
        "rows": [
            {
                "optimizer": name,
                "queries": queries,
                "peak_memory_bytes": memory,
                "in_forwards": time,
                "seconds_per_epoch": {},
                "seconds_per_step": 1.0,
                "forward_passes": 1,
                "forward_equivalents": 1,
            }
            for name, queries, memory, time in (("fo-sgd", None, 8e9, 3.0), ("zo-sgd", 1, 2e9, 2.0))
        ],
    }
    drawn = figures.draw_efficiency(result).data
    paper_saved, saved, paper_time, time = (tuple(trace.x) for trace in drawn)
    # Seconds of an epoch over first order's: from 8.3 / 16.1 to 66.8 / 109.6 over the data sets. No number between is published.
    assert paper_time[1] == pytest.approx(8.3 / 16.1, rel=1e-4) and drawn[2].text[1] == "0.52-0.61"
    assert paper_time[1] + drawn[2].error_x.array[1] == pytest.approx(66.8 / 109.6, rel=1e-4)
    assert saved == (1.0, 4.0) and time == (1.0, pytest.approx(2 / 3, rel=1e-4))
    assert paper_saved == (1.0, pytest.approx(12.08 / 2.41, rel=1e-4))
    # What the page filters by: each bar goes with its optimizer and queries, as the lines of the table do.
    (table,) = [
        table for table in make_tables({"trials": SCHEMAS["trials"].empty_table()}, result) if table.name == "table2"
    ]
    assert all(trace.meta["points"] == [line.mark.filters for line in table.lines] for trace in drawn)
