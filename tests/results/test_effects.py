"""What one change does, in the paper and in a made-up store: paired by seed, each setting by itself, and equal is equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_results import trials

from zeroflow.results import published
from zeroflow.results.effects import effects, order
from zeroflow.results.estimates import estimate
from zeroflow.results.findings import findings
from zeroflow.results.summary import summary
from zeroflow.results.tables import make_tables

SMALL = {"dataset": "quickdraw100", "method": "ease", "optimizer": "zo-sgd"}


def test_effects_are_paired_by_seed(tmp_path: Path) -> None:
    def cell(seed: int, history: float, accuracy: float) -> tuple[dict[str, Any], float]:
        return {**SMALL, "seed": seed, "optimizer_options": {"history": history}}, accuracy

    plain = [cell(0, 0, 20.0), cell(1, 0, 40.0), cell(2, 0, 60.0)]
    up = [cell(0, 0.2, 21.0), cell(1, 0.2, 41.1), cell(2, 0.2, 61.2)]  # always about one more, whatever the seed
    down = [cell(0, 0.4, 19.0), cell(1, 0.4, 38.9), cell(2, 0.4, 58.8)]
    noisy = [cell(0, 0.6, 30.0), cell(1, 0.6, 30.0)]
    table = trials(tmp_path, *plain, *up, *down, *noisy)
    found = {(effect.name, effect.metric): effect for effect in effects("table3", table)}
    assert len(found) == 4 * 3
    first = found["history 20% - 0%", "avg"]
    assert first.ours is not None and first.paper == 1.03 and first.verdict == "yes"
    paired = estimate([1.0, 1.1, 1.2])
    assert (first.ours.mean, first.ours.half_width) == pytest.approx((paired.mean, paired.half_width))
    assert found["history 40% - 0%", "avg"].verdict == "no"
    sixty = found["history 60% - 0%", "avg"]
    assert sixty.verdict == "n.s." and sixty.ours is not None and sixty.ours.n == 2
    assert (
        found["history 80% - 0%", "avg"].verdict == "not measured" and found["history 80% - 0%", "avg"].expected == -1
    )


def test_an_effect_of_several_settings_is_not_measured(tmp_path: Path) -> None:
    cells = [({**SMALL, "lr": lr, "queries": q}, 50.0 + q) for lr in (0.1, 0.2) for q in (1, 4)]
    assert [effect.ours for effect in effects("figure5", trials(tmp_path / "two", *cells))] == [None]
    found = effects("figure5", trials(tmp_path / "one", *cells[:2]))
    (four,) = [effect for effect in found if effect.ours]
    assert (four.name, four.paper, four.ours.mean, four.verdict) == (
        "ease, zo-sgd: q = 4 - q = 1",
        None,
        3.0,
        "one seed",
    )


def effect_of_zeroth_order(trials: pa.Table) -> tuple[float, int] | None:
    """Mean and number of pairs of the first effect of Table 1."""
    found = next(e for e in effects("table1", trials) if e.name == "ease: zo-sgd - fo-sgd" and e.metric == "avg")
    return None if found.ours is None else (found.ours.mean, found.ours.n)


@pytest.mark.parametrize(
    "change",
    [
        {"stop_after": 5}, {"tasks": 20}, {"epochs": 3}, {"batch_size": 7}, {"schedule": "constant"}, {"class_order_seed": 7},
        {"loss": "error-rate"}, {"validation": 0.1}, {"method_options": {"bottleneck": 16}}, {"seed": 1}, {"dtype": "float64"},
        {"transform": "plain"}, {"dataset": "quickdraw100-marker"}, {"later": {"task": 3, "optimizer": "zo-sgd-sign"}},
    ],
)  # fmt: skip
def test_cells_of_different_streams_make_no_effect(tmp_path: Path, change: dict[str, Any]) -> None:
    table = trials(tmp_path, ({**SMALL, **change}, 80.0), ({**SMALL, "optimizer": "fo-sgd"}, 60.0))
    assert effect_of_zeroth_order(table) is None


def test_a_classifier_is_no_optimizers_effect(tmp_path: Path) -> None:
    first = {**SMALL, "method": "aper-adapter", "optimizer": "fo-sgd"}
    other = {**SMALL, "method": "aper-adapter", "classifier": "lda"}
    assert not any(effect.ours for effect in effects("table1", trials(tmp_path, (other, 80.0), (first, 60.0))))


def test_effects_are_paired_within_each_class_order_and_branches_left_out(tmp_path: Path) -> None:
    first = {**SMALL, "optimizer": "fo-sgd"}
    cells = [
        ({**config, "class_order_seed": order, "seed": seed}, level + order * 20 + seed)
        for order in (1, 2)
        for seed in (0, 1)
        for config, level in ((SMALL, 31.0), (first, 30.0))
    ]
    branch = ({**first, "class_order_seed": 1, "later": {"task": 3, "optimizer": "zo-sgd"}}, 90.0)
    assert effect_of_zeroth_order(trials(tmp_path / "both", *cells, branch)) == (1.0, 4)
    tried = ({**first, "class_order_seed": 1, "lr": 0.5}, 90.0)
    assert effect_of_zeroth_order(trials(tmp_path / "tried", *cells, tried)) == (1.0, 2), "the order with one rate"


def test_the_order_of_optimizers_is_that_on_streams_that_all_have_run(tmp_path: Path) -> None:
    same = [({**SMALL, "optimizer": name}, 90.0 - 5 * number) for number, name in enumerate(published.ORDER)]
    short = ({**SMALL, "optimizer": published.ORDER[-1], "stop_after": 2}, 99.0)
    alone = order("ease", trials(tmp_path / "same", *same))
    assert alone[0] is not None and order("ease", trials(tmp_path / "more", *same, short)) == alone
    assert order("ease", trials(tmp_path / "other", *same[:-1], short))[0] is None


def test_a_hybrid_effect_is_against_the_rate_of_its_exact_gradients(tmp_path: Path) -> None:
    hybrid = {**SMALL, "lr": 1e-4, "hybrid_epochs": 7, "optimizer_options": {"hybrid_lr": 0.1}}
    first = {**SMALL, "optimizer": "fo-sgd"}
    table = trials(tmp_path, (hybrid, 61.0), ({**first, "lr": 0.1}, 60.0), ({**first, "lr": 1e-6}, 20.0))
    (avg, _) = effects("hybrid", table)
    assert avg.ours is not None and avg.ours.mean == 1.0
    lost = trials(tmp_path / "lost", (hybrid, 61.0), ({**first, "lr": 1e-6}, 20.0))
    assert [effect.ours for effect in effects("hybrid", lost)] == [None, None], "another rate is another change"


def test_an_enhancement_is_compared_at_one_rate_and_with_one_rule(tmp_path: Path) -> None:
    for number, other in enumerate(({"lr": 1e-5}, {"eps": 0.1}, {"optimizer_options": {"momentum": 0.9}})):
        pair = ({**SMALL, "optimizer_options": {"history": 0.2}}, 80.0), ({**SMALL, **other}, 50.0)
        assert not any(effect.ours for effect in effects("table3", trials(tmp_path / str(number), *pair))), other
    kept = {"momentum": 0.9}
    pair = (
        ({**SMALL, "optimizer_options": {"history": 0.2, **kept}}, 80.0),
        ({**SMALL, "optimizer_options": kept}, 50.0),
    )
    found = {e.name: e.ours for e in effects("table3", trials(tmp_path / "one", *pair)) if e.metric == "avg" and e.ours}
    assert {name: ours.mean for name, ours in found.items()} == {"history 20% - 0%": 30.0}


def test_streams_are_not_seeds(tmp_path: Path) -> None:
    """One seed on three streams is no interval: each stream has its own effects, named by what tells it apart."""
    first = {**SMALL, "optimizer": "fo-sgd"}
    streams: list[tuple[dict[str, Any], float]] = [({}, 1.0), ({"stop_after": 5}, 2.0), ({"tasks": 5}, 3.0)]
    cells = [
        ({**config, **keys}, 50.0 + gain * up) for keys, gain in streams for config, up in ((SMALL, 1), (first, 0))
    ]
    table = make_tables({"trials": trials(tmp_path, *cells)})
    (found,) = [each for each in table if each.name == "effects"]
    lines = [[cell.text for cell in line.cells] for line in found.lines]
    avg = {line[0]: (line[4], line[5], line[6]) for line in lines if line[2] == "Avg"}
    assert avg == {
        "quickdraw100, tasks=10 stop_after=default": ("+1.00", "1", "one seed"),
        "quickdraw100, tasks=10 stop_after=5": ("+2.00", "1", "one seed"),
        "quickdraw100, tasks=5 stop_after=default": ("+3.00", "1", "one seed"),
    }


def test_queries_are_compared_within_a_method_and_at_as_many_epochs(tmp_path: Path) -> None:
    def cell(method: str, optimizer: str, queries: int, epochs: int, accuracy: float) -> tuple[dict[str, Any], float]:
        return {**SMALL, "method": method, "optimizer": optimizer, "queries": queries, "epochs": epochs}, accuracy

    cells = [
        cell("aper-adapter", "zo-adam", 1, 2, 50.0),
        cell("aper-adapter", "zo-adam", 8, 2, 54.0),
        cell("aper-adapter", "zo-adam", 1, 16, 60.0),  # as many forward passes as the former, not the same epochs
        cell("ease", "zo-adam", 1, 2, 30.0),
        cell("ease", "zo-adam", 8, 2, 29.0),
        cell("ease", "zo-sgd", 8, 2, 77.0),  # nothing beside it
    ]
    found = effects("figure5", trials(tmp_path, *cells))
    assert [(effect.name, effect.ours and effect.ours.mean) for effect in found] == [
        ("aper-adapter, zo-adam: q = 8 - q = 1", 4.0),
        ("ease, zo-adam: q = 8 - q = 1", -1.0),
        ("ease, zo-sgd: q = 8 - q = 1", None),
    ]


def test_order_of_optimizers_and_hybrid_runs(tmp_path: Path) -> None:
    names = published.ORDER
    paper = [
        sum(published.published("ease", name, d).values["avg"] for d in published.DATASETS.values()) for name in names
    ]
    same = [({**SMALL, "optimizer": name}, value / 4) for name, value in zip(names, paper, strict=True)]
    hybrid = ({**SMALL, "epochs": 10, "hybrid_epochs": 7, "optimizer_options": {"hybrid_lr": 0.1}}, 61.0)
    table = trials(tmp_path, *same, hybrid)
    tau, between = order("ease", table)
    assert tau == pytest.approx(1.0) and -1 < between < 1
    assert order("aper-adapter", table)[0] is None
    (avg, last) = effects("hybrid", table)
    assert avg.name == "ease: 7 + 3 zo-sgd - 10 fo-sgd" and avg.metric == "avg" and last.metric == "last"
    assert avg.ours is not None and avg.ours.mean == pytest.approx(61.0 - paper[0] / 4)
    first = next(e for e in effects("table1", table) if e.name == "ease: zo-sgd - fo-sgd" and e.metric == "avg")
    assert first.ours is not None and first.ours.mean == pytest.approx((paper[1] - paper[0]) / 4)
    assert first.paper == pytest.approx((paper[1] - paper[0]) / 4, abs=1e-4)


def told(table: pa.Table, name: str) -> dict[str, tuple[float, int, str]]:
    """Effects on Avg that were measured: mean, pairs, verdict."""
    found = (effect for effect in effects(name, table) if effect.metric == "avg" and effect.ours)
    return {e.name: (round(e.ours.mean, 6), e.ours.n, e.verdict) for e in found if e.ours}


def test_settings_are_not_seeds(tmp_path: Path) -> None:
    """What helps in one setting and hurts in another has two effects, each of its own seeds, named by what tells them apart."""
    cells = [
        ({**SMALL, "method_options": {"bottleneck": width}, "optimizer": name, "seed": seed}, level + seed * slope)
        for width, gain in ((16, -10.0), (4, 10.0))
        for name, level, slope in (("fo-sgd", 50.0, 1.0), ("zo-sgd", 50.0 + gain, 1.1))
        for seed in range(3)
    ]
    assert told(trials(tmp_path, *cells), "table1") == {
        "ease: zo-sgd - fo-sgd, bottleneck=16": (-9.9, 3, "yes"),
        "ease: zo-sgd - fo-sgd, bottleneck=4": (10.1, 3, "no"),
    }


def test_epochs_of_more_queries_and_queries_of_hybrid_runs_are_named(tmp_path: Path) -> None:
    queries = [
        ({**SMALL, "queries": q, "epochs": epochs, "seed": seed}, 45.0 + gain * (q > 1) + seed + 0.1 * seed * (q > 1))
        for epochs, gain in ((2, 2.0), (8, -1.0))
        for q in (1, 4)
        for seed in range(3)
    ]
    assert told(trials(tmp_path / "queries", *queries), "figure5") == {
        "ease, zo-sgd: q = 4 - q = 1, epochs=2": (2.1, 3, "yes"),
        "ease, zo-sgd: q = 4 - q = 1, epochs=8": (-0.9, 3, "no"),
    }
    hybrid = [({**SMALL, "lr": 0.1, "epochs": 4, "hybrid_epochs": 2, "queries": q}, 50.0 + q) for q in (1, 4)]
    first = ({**SMALL, "lr": 0.1, "optimizer": "fo-sgd", "epochs": 4}, 50.0)
    assert told(trials(tmp_path / "hybrid", *hybrid, first), "hybrid") == {
        "ease: 2 + 2 zo-sgd - 4 fo-sgd": (1.0, 1, "one seed"),
        "ease: 2 + 2 zo-sgd q=4 - 4 fo-sgd": (4.0, 1, "one seed"),
    }


def test_an_optimizer_without_queries_has_hybrid_effects_too(tmp_path: Path) -> None:
    hybrid = ({**SMALL, "optimizer": "zo-cge", "lr": 0.1, "epochs": 4, "hybrid_epochs": 2}, 52.0)
    first = ({**SMALL, "lr": 0.1, "optimizer": "fo-sgd", "epochs": 4}, 50.0)
    assert told(trials(tmp_path, hybrid, first), "hybrid") == {"ease: 2 + 2 zo-cge - 4 fo-sgd": (2.0, 1, "one seed")}


def test_seeds_at_different_rates_make_no_pair(tmp_path: Path) -> None:
    hybrid = {**SMALL, "epochs": 4, "hybrid_epochs": 2}
    first = {**SMALL, "optimizer": "fo-sgd", "epochs": 4}
    cells = [({**hybrid, "lr": 0.1 if seed < 3 else 0.01, "seed": seed}, 60.0 + seed) for seed in range(6)]
    cells += [({**first, "lr": 0.01 if seed < 3 else 0.1, "seed": seed}, 50.0 + 2 * seed) for seed in range(6)]
    assert told(trials(tmp_path, *cells), "hybrid") == {}, "no hybrid run has first order at its rate and seed"


def test_a_label_says_nothing_that_holds_for_some_of_the_cells_alone(tmp_path: Path) -> None:
    """Of two class orders, one of them at another rate."""
    cells = [
        (
            {
                **SMALL,
                "queries": q,
                "epochs": epochs,
                "class_order_seed": order,
                "lr": 10.0 if (order, epochs) == (2, 1) else 0.1,
            },
            50.0 + q,
        )
        for epochs in (1, 2)
        for order in (1, 2)
        for q in (1, 8)
    ]
    assert set(told(trials(tmp_path, *cells), "figure5")) == {
        "ease, zo-sgd: q = 8 - q = 1, epochs=1",
        "ease, zo-sgd: q = 8 - q = 1, epochs=2",
    }


@pytest.mark.parametrize(
    ("paper", "gains", "verdict"),
    [
        (0.0025, (-1.0, -1.1, -1.2), "tie"),
        (-0.0049, (1.0, 1.1, 1.2), "tie"),
        (0.0051, (-1.0, -1.1, -1.2), "no"),
        (0.0051, (1.0, 1.1, 1.2), "yes"),
        (0.0025, (1.0,), "one seed"),
        (1.0, (0.004, 0.0041, 0.0042), "tie"),
        (1.0, (-0.5, 0.5, 0.1), "n.s."),
    ],
)
def test_what_is_shown_as_zero_has_no_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paper: float, gains: tuple[float, ...], verdict: str
) -> None:
    def row(method: str, optimizer: str, _: str) -> published.Published:
        values = dict.fromkeys(published.METRICS, 50.0 + (paper if optimizer == "zo-sgd" else 0.0))
        return published.Published("table1", (), {}, values)

    monkeypatch.setattr("zeroflow.results.effects.published", row)
    cells = [
        ({**SMALL, "optimizer": name, "seed": seed}, 50.0 + gain * (name == "zo-sgd"))
        for seed, gain in enumerate(gains)
        for name in ("fo-sgd", "zo-sgd")
    ]
    found = next(e for e in effects("table1", trials(tmp_path, *cells)) if e.name == "ease: zo-sgd - fo-sgd")
    assert found.paper == pytest.approx(paper) and found.verdict == verdict


def test_differences_that_are_all_the_same_say_nothing_on_chance(tmp_path: Path) -> None:
    cells = [
        ({**SMALL, "optimizer": name, "seed": s}, 50.0 + s + (name == "zo-sgd"))
        for name in ("fo-sgd", "zo-sgd")
        for s in (0, 1)
    ]
    assert told(trials(tmp_path, *cells), "table1") == {"ease: zo-sgd - fo-sgd": (1.0, 2, "no spread")}


@pytest.mark.parametrize("seeds", [3, 7, 10])
@pytest.mark.parametrize("level", [60.8, 48.3, 53.21])
def test_what_equals_simplecil_lies_not_above_it(tmp_path: Path, seeds: int, level: float) -> None:
    cells = [({**SMALL, "seed": seed}, level) for seed in range(seeds)]
    baseline = ({"dataset": "quickdraw100", "method": "simplecil"}, level)
    (sentence,) = findings(summary(trials(tmp_path, baseline, *cells)))
    assert "the best of 2 settings is simplecil" in sentence and "does not lie above SimpleCIL" in sentence


def test_rounding_of_a_mean_is_no_spread_and_no_difference() -> None:
    for value in (60.8, 48.3, 0.1):
        found = estimate([value] * 7)
        assert (found.mean, found.half_width, found.p_value) == (value, 0.0, None)
    assert estimate([60.8, 60.8 + 1e-12]).half_width == 0.0 and (estimate([60.8, 60.81]).half_width or 0) > 0
