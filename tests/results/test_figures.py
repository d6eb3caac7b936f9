"""The figures: what they hold, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from everything import CONFUSION, HALF_WIDTH, cell, fill, landscape, seeds, simplecil

from zeroflow.results import Store, figures, published
from zeroflow.results.effects import effects
from zeroflow.results.estimates import estimate
from zeroflow.results.schema import CONFIG_KEYS
from zeroflow.results.summary import Row, summary
from zeroflow.trial.result import Probe


def rows_of(store: Store, dataset: str = "quickdraw100") -> list[Row]:
    return summary(store.load("trials").filter(pc.field("dataset") == dataset))


def test_stage_curves_average_over_seeds(store: Store) -> None:
    fill(store, *seeds(80.0), simplecil(70.0))
    baseline, trained = figures.stage_curves(rows_of(store), store.load("stages"))
    assert (baseline.label, baseline.classes) == ("simplecil", (2, 4))
    assert [point.mean for point in trained.accuracy] == [80.0, 70.0]
    assert trained.accuracy[0].half_width == pytest.approx(HALF_WIDTH)
    figure = figures.draw_stage_curves([baseline, trained])
    band, line = (trace for trace in figure.data if trace.legendgroup == trained.label)
    assert tuple(line.y) == (80.0, 70.0)
    assert band.y == pytest.approx((80 + HALF_WIDTH, 70 + HALF_WIDTH, 70 - HALF_WIDTH, 80 - HALF_WIDTH), rel=1e-4)
    assert len(figure.data) == 3, "one band: a single seed has no interval"


def test_confusion_is_counted_over_seeds_and_shared_out_by_task(store: Store) -> None:
    fill(store, *seeds(80.0), simplecil(70.0))
    table = store.load("confusion")
    for stage, counts in enumerate(CONFUSION):
        np.testing.assert_array_equal(figures.class_confusion(table, simplecil(70.0).cell_id, stage), counts)
    found = figures.task_confusions(rows_of(store), table, store.load("stages"))
    assert [each.row.label for each in found] == [row.label for row in rows_of(store)]
    np.testing.assert_array_equal(
        figures.class_confusion(table, found[1].row.cells), 3 * figures.class_confusion(table, found[0].row.cells)
    )
    for each in found:
        np.testing.assert_allclose(each.matrix, [[60.0, 40.0], [10.0, 90.0]])
    first, second = figures.draw_task_confusion(found).data
    assert [*map(list, first.z)] == [[60.0, 40.0], [10.0, 90.0]] and first.visible and not second.visible
    assert not figures.task_confusions(rows_of(store), table.slice(0, 0), store.load("stages"))


@pytest.mark.parametrize("lost", ["stages", "classes"])
def test_confusion_without_the_classes_of_its_tasks_is_left_out(store: Store, lost: str) -> None:
    fill(store, cell())
    rows, confusion, stages = summary(store.load("trials")), store.load("confusion"), store.load("stages")
    assert len(figures.task_confusions(rows, confusion, stages)) == 1
    if lost == "stages":
        stages = stages.slice(0, 0)
    else:
        confusion = confusion.filter(pc.field("true_class") < 2)
        confusion = confusion.filter(pc.field("predicted_class") < 2)
    assert not figures.task_confusions(rows, confusion, stages)


def test_the_heat_map_is_the_mean_matrix(store: Store) -> None:
    fill(store, cell(), cell(60.0, seed=1))
    accuracy = store.load("accuracy")
    np.testing.assert_array_equal(figures.task_accuracy(accuracy, cell().cell_id), cell().accuracy_matrix)
    (found,) = figures.task_accuracies(rows_of(store), accuracy)
    np.testing.assert_array_equal(found.matrix, [[70.0, np.nan], [50.0, 70.0]])
    (trace,) = figures.draw_task_accuracy([found]).data
    assert trace.z[0][1] is None and trace.z[1][0] == 50.0


def test_last_task_accuracy_is_the_end_of_the_diagonal(store: Store) -> None:
    fill(store, *seeds(80.0), simplecil(70.0))
    baseline, trained = figures.last_task_accuracy(rows_of(store), store.load("accuracy"))
    assert (baseline.value.mean, trained.value.mean) == (70.0, 80.0)
    assert trained.value.half_width == pytest.approx(HALF_WIDTH)


@pytest.mark.slow
def test_lines_against_queries_join_what_differs_in_queries_alone(full: Store) -> None:
    lines = {line.label: line for line in figures.against_queries(rows_of(full))}
    assert set(lines) == {"ease zo-sgd", "aper-adapter zo-sgd"}, "history, sparsity and hybrid are other lines"
    line = lines["ease zo-sgd"]
    assert line.x == (1, 4, 16) and [row.avg.mean for row in line.rows if row.avg] == [67.0, 70.0, 72.0]


def test_tuned_rates_along_a_line_are_allowed_and_several_for_a_point_are_not(store: Store) -> None:
    fill(store, *(cell(optimizer="zo-sgd", queries=q, lr=0.1 / q) for q in (1, 4)))
    (line,) = figures.against_queries(rows_of(store))
    assert line.x == (1, 4)
    fill(store, *(cell(optimizer="zo-sgd", queries=q, lr=0.3) for q in (1, 4)))
    (line,) = figures.against_queries(rows_of(store))
    assert line.label == "ease zo-sgd lr=0.3" and line.x == (1, 4), "rates that were tried at one number only stay out"


def test_rates_that_read_alike_in_six_digits_make_lines_of_their_own(store: Store) -> None:
    for level, lr in ((50.0, 10**-2.5), (60.0, 0.00316228)):
        fill(store, *(cell(level + q, optimizer="zo-sgd", queries=q, lr=lr) for q in (1, 4)))
    rows = rows_of(store)
    lines = figures.against_queries(rows)
    found = {line.label: (line.x, [row.avg.mean for row in line.rows if row.avg]) for line in lines}
    assert found == {
        "ease zo-sgd lr=0.003162278": ((1, 4), [46.0, 49.0]),
        "ease zo-sgd lr=0.00316228": ((1, 4), [56.0, 59.0]),
    }
    assert len({row.label for row in rows}) == 4
    renamed = [dataclasses.replace(row, shown={**row.shown, "lr": "0.00316228"}) for row in rows]
    assert len(figures.against_queries(renamed)) == 2, "whatever they are called"


def test_null_and_what_says_the_same_are_on_one_line(store: Store) -> None:
    """Other tools may name the usual loss."""
    fill(store, *(cell(optimizer="zo-sgd", queries=q) for q in (1, 4)))
    one, four = rows_of(store)
    named = dataclasses.replace(four, config={**four.config, "loss": "cross-entropy"})
    (line,) = figures.against_queries([one, named])
    assert line.x == (1, 4)


def test_settings_on_another_stream_are_no_rivals(store: Store) -> None:
    fill(store, cell(80.0, optimizer="zo-sgd", memory=3.0), cell(75.0, optimizer="fo-sgd", queries=None, memory=9.0))
    fill(
        store,
        cell(95.0, optimizer="zo-sgd", memory=2.0, stop_after=1),
        cell(99.0, optimizer="zo-adam", memory=8.0, stop_after=1),
    )
    points = figures.trade_off(rows_of(store))
    front = {(p.row.config["optimizer"], p.row.config["stop_after"]) for p in points if p.on_front}
    assert front == {("zo-sgd", None), ("zo-sgd", 1), ("zo-adam", 1)}
    lines = [trace for trace in figures.draw_trade_off(points).data if trace.name == "Pareto front"]
    assert sorted(tuple(line.y) for line in lines) == [(75.0,), (90.0, 94.0)]


def test_nothing_on_the_pareto_front_is_beaten(store: Store) -> None:
    levels = {
        "zo-sgd": (70.0, 2.0),
        "zo-adam": (75.0, 3.0),
        "fo-sgd": (74.0, 4.0),
        "fo-adam": (80.0, 5.0),
        "zo-scd": (70.0, 2.5),
    }
    fill(store, *(cell(level, optimizer=name, memory=memory) for name, (level, memory) in levels.items()))
    points = figures.trade_off(rows_of(store))
    assert {p.row.config["optimizer"] for p in points if p.on_front} == {"zo-sgd", "zo-adam", "fo-adam"}
    front = figures.draw_trade_off(points).data[0]
    assert (tuple(front.x), tuple(front.y)) == ((2.0, 3.0, 5.0), (65.0, 70.0, 75.0))


@pytest.mark.parametrize("option", ["history", "sparsity"])
def test_option_curves_start_without_the_option(full: Store, option: str) -> None:
    (line,) = figures.option_curves(rows_of(full), option)
    assert line.x == (0.0, 0.2, 0.4)
    assert [row.avg.mean for row in line.rows if row.avg] == pytest.approx([67.0, 69.0, 71.0])


def test_hybrid_gains_are_paired_by_seed(full: Store) -> None:
    (gain,) = figures.hybrid_gains(rows_of(full), full.load("trials"), full.load("stages"))
    assert gain.label == "ease: 7 epochs fo-sgd + 3 zo-sgd" and gain.classes == (2, 4)
    assert [(d.mean, d.half_width, d.n) for d in gain.difference] == [(2.0, 0.0, 3)] * 2, (
        "seeds differ alike, so pairs do not"
    )


def gains_of(store: Store) -> list[figures.Gain]:
    return figures.hybrid_gains(rows_of(store), store.load("trials"), store.load("stages"))


def test_hybrid_gains_stay_within_a_class_order(store: Store) -> None:
    for order, level in ((1, 50.0), (2, 70.0)):
        fill(store, cell(level, optimizer="zo-sgd", hybrid_epochs=7, class_order_seed=order))
        fill(store, cell(level - 1, optimizer="fo-sgd", queries=None, class_order_seed=order))
    gains = gains_of(store)
    assert [[point.mean for point in gain.difference] for gain in gains] == [[1.0, 1.0]] * 2
    names = {trace.name for trace in figures.draw_hybrid_gains(gains).data if trace.name}
    label = "ease: 7 epochs fo-sgd + 3 zo-sgd"
    assert {f"{label} class_order_seed={order}" for order in (1, 2)} <= names


@pytest.mark.parametrize("options", [{}, {"hybrid_lr": 0.1}])
def test_first_order_alone_is_that_of_the_exact_gradients_rate(store: Store, options: dict[str, float]) -> None:
    first = {"optimizer": "fo-sgd", "queries": None}
    fill(store, cell(51.0, optimizer="zo-sgd", hybrid_epochs=7, lr=0.01 if options else 0.1, optimizer_options=options))
    for config in ({"lr": 1e-6}, {"lr": 0.01}, {"lr": 0.1, "later": {"task": 2, "optimizer": "zo-sgd"}}):
        fill(store, cell(20.0, **first, **config))
    for config in ({"stop_after": 1}, {"batch_size": 7}, {"schedule": "constant"}, {"loss": "error-rate"}):
        fill(store, cell(20.0, **first, lr=0.1, **config))
    assert not gains_of(store)
    fill(store, cell(50.0, **first, lr=0.1))
    (gain,) = gains_of(store)
    assert [point.mean for point in gain.difference] == [1.0, 1.0] and gain.alone.config["lr"] == 0.1


def test_function_values_average_over_seeds_and_break_between_tasks(full: Store) -> None:
    ease = next(
        v for v in figures.function_values(rows_of(full), full.load("probes")) if v.row.config["method"] == "ease"
    )
    assert (ease.steps, ease.tasks) == ((0, 5, 10, 15), (0, 0, 1, 1))
    assert ease.old[:2] == (None, None), "at first there is no old task"
    assert ease.old[2] is not None and ease.old[2].mean == 3.0 and ease.old[2].half_width == pytest.approx(HALF_WIDTH)
    assert [point.mean for point in ease.new if point] == [3.0, 2.5, 2.0, 1.5]
    (new,) = (t for t in figures.draw_function_values([ease]).data if t.name == "new task")
    assert tuple(new.x) == (0, 5, None, 10, 15, None)


def looked_at(store: Store, looks: dict[tuple[int, int], float], *, seeds: int = 2) -> list[figures.FunctionValues]:
    """Function values of one row whose probes saw the losses of ``looks``, by task and step, and more by 1 with every seed."""
    for seed in range(seeds):
        probes = [Probe(task, step, "function_value", None, loss + seed) for (task, step), loss in looks.items()]
        fill(store, dataclasses.replace(cell(seed=seed), probes=probes))
    return figures.function_values(rows_of(store), store.load("probes"))


def test_function_values_of_a_task_reach_to_its_end_where_the_next_one_starts(store: Store) -> None:
    """The last look of a task and the first one of the next are at the same step."""
    looks = {(0, 0): 9.0, (0, 50): 5.0, (0, 100): 3.0, (1, 100): 8.0, (1, 200): 4.0, (2, 200): 7.0}
    *_, band, line = figures.draw_function_values(looked_at(store, looks)).data
    assert tuple(line.x) == (0, 50, 100, None, 100, 200, None, 200, None)
    assert tuple(line.y) == (9.5, 5.5, 3.5, None, 8.5, 4.5, None, 7.5, None)
    assert tuple(band.x) == (0, 50, 100, 100, 50, 0, None, 100, 200, 200, 100, None, 200, 200, None)


def test_points_of_fewer_seeds_than_their_line_say_so(store: Store) -> None:
    (values,) = looked_at(store, {(0, 0): 1.0, (0, 50): 2.0})
    lost = dataclasses.replace(values, new=(values.new[0], estimate([2.0])))
    texts = [figures.draw_function_values([each]).data[-1].text for each in (values, lost)]
    whole = "1.50 ± 6.35 nats"
    assert texts == [(whole, "2.50 ± 6.35 nats", ""), (whole, "2.00 nats, 1 of 2 seeds", "")]
    (curve,) = figures.stage_curves(rows_of(store), store.load("stages"))
    lost_stage = dataclasses.replace(curve, accuracy=(curve.accuracy[0], estimate([60.0])))
    line = figures.draw_stage_curves([lost_stage]).data[-1]
    assert (line.text, line.hovertemplate) == (("80.00 ± 0.00 %", "60.00 %, 1 of 2 seeds"), "%{x} classes: %{text}")


def test_surfaces_and_runs_come_back_as_they_were_written(store: Store) -> None:
    store.write_landscape(*landscape())
    (surface,) = figures.surfaces(store.load("surfaces"))
    assert surface.loss_old.shape == (7, 9) == (len(surface.y), len(surface.x))
    x, y = np.meshgrid(surface.x, surface.y)
    np.testing.assert_allclose(surface.loss_old, (x + 1) ** 2 + y**2)
    assert surface.points["old optimum"] == (-1.0, 0.0)
    runs = figures.trajectories(store.load("trajectories"))
    assert len(runs) == 4 * 2 * 2 and runs[0].label == "fo-sgd" and runs[-1].label == "zo-sgd q=8"
    assert runs[0].steps == tuple(range(0, 101, 5)) and (runs[0].x[0], runs[0].y[0]) == (0.0, 2.0)


def test_runs_whose_rates_read_alike_in_six_digits_have_names_of_their_own() -> None:
    trajectories, _ = landscape()
    lines = [
        line | {"lr": lr}
        for line in trajectories.to_pylist()
        if line["optimizer"] == "fo-sgd"
        for lr in (10**-2.5, 0.00316228)
    ]
    runs = figures.trajectories(pa.Table.from_pylist(lines, schema=trajectories.schema))
    assert {run.label for run in runs} == {"fo-sgd lr=0.003162278", "fo-sgd lr=0.00316228"}


def test_the_animation_ends_where_the_still_figure_is(full: Store) -> None:
    surface, runs = figures.surfaces(full.load("surfaces"))[0], figures.trajectories(full.load("trajectories"))
    still = figures.draw_trajectories(surface, runs, objective="both")
    moving = figures.animate_trajectories(surface, runs, objective="both")
    assert [frame.name for frame in moving.frames] == [str(step) for step in range(0, 101, 5)]
    for figure in (still, moving):
        assert [t.name for t in figure.data[-4:]] == ["fo-sgd", "forward-grad q=1", "zo-sgd q=1", "zo-sgd q=8"]
    first, last = moving.frames[0], moving.frames[-1]
    assert all(len(trace.x) == 1 for trace in first.data)
    for number, trace in zip(last.traces, last.data, strict=True):
        assert tuple(trace.x) == tuple(still.data[number].x) and len(trace.x) == 21
    assert [b.label for b in moving.layout.updatemenus[0].buttons] == ["play", "pause"]
    assert len(moving.layout.sliders[0].steps) == 21


@pytest.mark.slow
def test_a_long_run_is_animated_in_few_frames(store: Store) -> None:
    trajectories, surface = landscape()
    many = trajectories.to_pylist()[0]
    rows = [{**many, "step": step} for step in range(5000)]
    store.write_landscape(trajectories.from_pylist(rows, schema=trajectories.schema), surface)
    found = figures.animate_trajectories(
        figures.surfaces(store.load("surfaces"))[0], figures.trajectories(store.load("trajectories"))
    )
    assert len(found.frames) == 40 and (found.frames[0].name, found.frames[-1].name) == ("0", "4999")


def test_axes_of_the_grid_hold_every_row(full: Store) -> None:
    rows = rows_of(full)
    axes = {axis.title: axis for axis in figures.parallel_coordinates(rows)}
    assert list(axes)[:3] == ["method", "optimizer", "queries (number)"] and list(axes)[-1] == "Avg (%)"
    queries = axes["queries (number)"]
    assert queries.heights[0] is None, "SimpleCIL has no queries"
    at = {row.config["queries"]: height for row, height in zip(rows, queries.heights, strict=True)}
    assert (at[1], at[4], at[16]) == pytest.approx((0.0, 0.5, 1.0)), "by the logarithm"
    passes = axes["forward passes (batches)"]
    assert passes.heights[0] == 0.0 and min(h for h in passes.heights[1:] if h is not None) == pytest.approx(0.12)


def test_effects_carry_what_they_are_filtered_by(full: Store) -> None:
    trials = full.load("trials")
    found = {e.name: e.filters for table in ("table1", "table3", "figure5", "hybrid") for e in effects(table, trials)}
    assert found["ease: zo-sgd - fo-sgd"] == {"method": "ease", "optimizer": "zo-sgd", "queries": "1"}
    assert found["history 20% - 0%"] == {"method": "ease", "optimizer": "zo-sgd", "queries": "1"}
    assert found["ease, zo-sgd: q = 16 - q = 1"]["queries"] == "16"
    assert found["ease: 7 + 3 zo-sgd - 10 fo-sgd"]["method"] == "ease"


def test_comparisons_show_both_numbers() -> None:
    row = published.published("ease", "zo-sgd-sign", "cifar100")
    ours = {metric: estimate([70.0, 72.0]) for metric in row.values}
    config = {**dict.fromkeys(CONFIG_KEYS), **row.config}
    figure = figures.draw_comparisons([published.Comparison(row, config, ("a", "b"), ours)])
    paper, measured = figure.data
    assert (tuple(paper.x), tuple(measured.x)) == ((83.21,), (71.0,)) and measured.error_x.array[0] > 0
