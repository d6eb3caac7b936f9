"""The paper's numbers in the package, and finished cells beside them: only those of the paper's configuration count."""

from __future__ import annotations

import itertools
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from places import ROOT

from zeroflow.results import Store, load, published
from zeroflow.results.effects import effects, order
from zeroflow.results.efficiency import table2
from zeroflow.results.estimates import estimate
from zeroflow.results.rows import tables
from zeroflow.results.tables import make_tables
from zeroflow.trial.config import TrialConfig

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "docs"))

import reproduction
from store import result_of

VIT = {"backbone": "vit_base_patch16_224.augreg_in21k", "tasks": 10}
SIGN = {**VIT, "dataset": "cifar100", "method": "ease", "optimizer": "zo-sgd-sign"}


def trials(path: Path, *cells: tuple[dict[str, Any], float]) -> pa.Table:
    """The rows of a made-up store: cells whose accuracy is the same on every task at every stage, so Avg and Last are it."""
    store = Store(path)
    for values, accuracy in cells:
        result = result_of(TrialConfig.from_dict(values), 0)
        result.accuracy_matrix[~np.isnan(result.accuracy_matrix)] = accuracy
        store.write(tables(result))
    return load(path, "trials")


def test_the_package_has_the_papers_numbers() -> None:
    found = {table: published.rows(table) for table in ("table1", "table3", "table4", "ease")}
    assert {table: len(rows) for table, rows in found.items()} == {"table1": 72, "table3": 5, "table4": 10, "ease": 8}
    assert len(published.rows()) == 95 and len(table2()) == 6
    for (method, optimizer, dataset), values in {
        ("ease", "zo-sgd-sign", "cifar100"): (83.21, 75.88, 10.58),
        ("ease", "fo-adam", "imagenet-a"): (59.60, 47.20, 19.08),
        ("aper-adapter", "forward-grad", "cub"): (89.47, 83.38, 6.24),
        ("aper-adapter", "zo-adam-conserve", "omnibenchmark"): (78.61, 72.21, 7.87),
    }.items():
        assert tuple(published.published(method, optimizer, dataset).values.values()) == values
    with pytest.raises(KeyError):
        published.published("ease", "zo-fzoo", "cub")
    # Without an enhancement Tables 3 and 4 repeat Table 1.
    plain = published.published("ease", "zo-sgd", "imagenet-a").values
    assert found["table3"][0].values == found["table4"][0].values == plain
    assert found["table4"][9].options == {"sparsity": 0.9} and found["table4"][9].values["avg"] == 59.47
    assert found["table3"][1].values == {"avg": 58.9, "last": 49.04, "fgt": 11.79}
    assert found["ease"][0].values == {"avg": 91.51, "last": 85.80}
    assert {row.config["optimizer"] for row in found["table1"]} == set(published.ORDER)


def test_every_published_row_is_a_cell_that_its_command_makes(tmp_path: Path) -> None:
    """What the command sets, on a cell of the paper's protocol, is the row's configuration."""
    from zeroflow.grid.grid_file import merge_overrides, parse_override

    for row in published.rows():
        words = shlex.split(row.command)
        given = merge_overrides(parse_override(value) for flag, value in itertools.pairwise(words) if flag == "--set")
        config = TrialConfig.from_dict(
            {**VIT, "lr": 0.1, **given} if given["method"] != "simplecil" else {**VIT, **given}
        )
        trial = tables(result_of(config, 0))["trials"]
        (same,) = published.compare(trial, [row])
        assert same.verified, row
    assert "--grid sweeps/table3.yaml --results results/table3" in published.rows("table3")[1].command
    assert published.rows("table4")[0].command.endswith("--set optimizer_options.sparsity=0")
    assert "--set optimizer_options.history=0.2" in published.rows("table3")[1].command


def test_cells_of_the_papers_configuration_stand_beside_its_row(tmp_path: Path) -> None:
    cells = [({**SIGN, "seed": seed, "lr": 0.01}, accuracy) for seed, accuracy in enumerate((80.0, 83.0, 86.0))]
    found = published.compare(trials(tmp_path, *cells))
    assert len(found) == 95
    measured = [row for row in found if row.verified]
    assert [row.published.label for row in measured] == [("EASE", "SGD", "Sign", "CIFAR-100")]
    (row,) = measured
    assert row.ours["avg"] == estimate([80.0, 83.0, 86.0]) and row.ours["fgt"].mean == 0
    assert row.difference("avg") == pytest.approx(83.0 - 83.21) and row.difference("last") == pytest.approx(83 - 75.88)
    assert len(row.cells) == 3 and row.config["lr"] == 0.01
    assert found[0].difference("avg") is None and not found[0].cells


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": 20}, {"base_classes": 10, "tasks": 11}, {"base_classes": 37}, {"fixed_class_order": "sorted"}, {"validation": 0.1}, {"stop_after": 1}, {"queries": 2}, {"backbone": "vit_base_patch16_224.augreg_in21k_ft_in1k"},
        {"checkpoint": "none"}, {"class_order_seed": 0}, {"image_size": 32}, {"dtype": "float64"}, {"hybrid_epochs": 1},
        {"optimizer_options": {"history": 0.2}}, {"optimizer_options": {"sign": "scalar"}}, {"dataset": "quickdraw100"},
        {"optimizer_options": {"distribution": "rademacher"}}, {"method_options": {"bottleneck": 16}},
        {"method_options": {"diagonal_only": True}}, {"optimizer": "zo-per-example"}, {"method": "adapter-per-task"},
    ],
)  # fmt: skip
def test_any_other_cell_is_not_ours(tmp_path: Path, change: dict[str, Any]) -> None:
    # What changes some rows from one to the next (an optimizer, history) may be another row's, not this one's.
    row = published.published("ease", "zo-sgd-sign", "cifar100")
    (other,) = published.compare(trials(tmp_path, ({**SIGN, **change}, 50.0)), [row])
    assert not other.verified and other.ours == {}


@pytest.mark.parametrize(
    ("cell", "change"),
    [
        (("ease", "fo-sgd"), {"later": {"task": 3, "optimizer": "zo-sgd"}}),
        (("aper-adapter", "zo-sgd"), {"classifier": "lda"}),
        (("ease", "zo-sgd"), {"loss": "error-rate"}),
        (("ease", "zo-sgd"), {"transform": "drawings"}),
        (("ease", "zo-sgd"), {"preprocessing": {"mean": [0, 0, 0], "std": [1, 1, 1]}}),
        (("ease", "zo-sgd"), {"preprocessing": {"crop_pct": 0.5}}),
    ],
)  # fmt: skip
def test_neither_is_a_cell_of_another_loss_classifier_or_image(
    tmp_path: Path, cell: tuple[str, str], change: dict[str, Any]
) -> None:
    row = published.published(*cell, "cifar100")
    config = {**SIGN, "method": cell[0], "optimizer": cell[1]}
    table = trials(tmp_path, (config, 40.0), ({**config, **change}, 90.0))
    (own,) = published.compare(table, [row])
    assert table.num_rows == 2 and (own.ours["avg"].mean, own.ours["avg"].n) == (40.0, 1)


def test_the_papers_images_are_those_of_its_grid_of_the_tag_and_of_older_files(tmp_path: Path) -> None:
    row = published.published("ease", "zo-sgd-sign", "cifar100")
    pilot = ({**SIGN, "transform": "pilot", "image_size": 224}, 30.0)
    new = trials(tmp_path / "new", ({**SIGN, "seed": 1}, 10.0), pilot)
    older = trials(tmp_path / "older", ({**SIGN, "seed": 2}, 20.0))
    for name in ("preprocessing", "later", "loss", "access", "classifier", "classifier_options"):
        place = older.schema.get_field_index(name)
        older = older.set_column(place, older.schema.field(name), pa.nulls(1, older.schema.field(name).type))
    found = published.compare(pa.concat_tables([new, older]), [row])
    assert sorted(each.ours["avg"].mean for each in found) == [10.0, 20.0, 30.0]


def test_what_the_paper_leaves_out_may_be_anything_and_nothing_is_picked(tmp_path: Path) -> None:
    free = {
        "optimizer_options": {"momentum": 0.9, "weight_decay": 5e-4},
        "method_options": {"alpha": 0.05},
        "checkpoint": "hub",
    }
    table = trials(tmp_path, ({**SIGN, "lr": 0.1, **free}, 10.0), ({**SIGN, "lr": 0.2}, 90.0))
    row = published.published("ease", "zo-sgd-sign", "cifar100")
    found = published.compare(pa.concat_tables([table, table]), [row])  # the same cells in two stores count once
    assert sorted((entry.config["lr"], entry.ours["avg"].mean, entry.ours["avg"].n) for entry in found) == [
        (0.1, 10.0, 1),
        (0.2, 90.0, 1),
    ]


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


def test_settings_that_are_one_published_row_are_told_apart(tmp_path: Path) -> None:
    rows = [({**SIGN, "lr": lr}, accuracy) for lr, accuracy in ((0.01, 30.0), (0.1, 80.0))]
    found = [each for each in published.compare(trials(tmp_path, *rows)) if each.verified]
    assert sorted(zip(published.settings(found), [f.ours["avg"].mean for f in found], strict=True)) == [
        ("lr=0.01", 30.0),
        ("lr=0.1", 80.0),
    ]
    assert {row.name for row in published.rows("table3")}.isdisjoint(row.name for row in published.rows("table4"))


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


def test_the_page_claims_only_what_was_run(tmp_path: Path) -> None:
    """Without a store every row says no; with cells of the paper's configuration their numbers and differences stand there."""
    page = reproduction.rows_page(tmp_path, "table1")
    assert page.count("| no |") == 72 and "| yes" not in page
    trials(tmp_path / "table1", ({**SIGN, "lr": 0.01}, 80.0))
    page = reproduction.rows_page(tmp_path, "table1")
    assert page.count("| no |") == 71
    (line,) = [line for line in page.splitlines() if "| yes" in line]
    assert "83.21 | 80.00 | -3.21 | 75.88 | 80.00 | +4.12 | 10.58 | 0.00 | -10.58 |" in line
    assert "--set optimizer=zo-sgd-sign" in line
    assert "not there yet" in reproduction.effects_page(tmp_path, "table3")
    trials(tmp_path / "table3_quickdraw", (SMALL, 50.0), ({**SMALL, "optimizer_options": {"history": 0.2}}, 49.0))
    assert "| history 20% - 0% | +1.03 | -1.00 (one seed) |" in reproduction.effects_page(tmp_path, "table3")
