"""The paper's numbers in the package, and finished cells beside them: only those of the paper's configuration count."""

from __future__ import annotations

import itertools
import shlex
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from places import ROOT
from small_results import trials

from zeroflow.results import published
from zeroflow.results.efficiency import table2
from zeroflow.results.estimates import estimate
from zeroflow.results.rows import tables
from zeroflow.trial.config import TrialConfig

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "docs"))

import reproduction
from store import result_of

VIT = {"backbone": "vit_base_patch16_224.augreg_in21k", "tasks": 10}
SIGN = {**VIT, "dataset": "cifar100", "method": "ease", "optimizer": "zo-sgd-sign"}


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


def test_settings_that_are_one_published_row_are_told_apart(tmp_path: Path) -> None:
    rows = [({**SIGN, "lr": lr}, accuracy) for lr, accuracy in ((0.01, 30.0), (0.1, 80.0))]
    found = [each for each in published.compare(trials(tmp_path, *rows)) if each.verified]
    assert sorted(zip(published.settings(found), [f.ours["avg"].mean for f in found], strict=True)) == [
        ("lr=0.01", 30.0),
        ("lr=0.1", 80.0),
    ]
    assert {row.name for row in published.rows("table3")}.isdisjoint(row.name for row in published.rows("table4"))


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
    small = {"dataset": "quickdraw100", "method": "ease", "optimizer": "zo-sgd"}
    trials(tmp_path / "table3_quickdraw", (small, 50.0), ({**small, "optimizer_options": {"history": 0.2}}, 49.0))
    assert "| history 20% - 0% | +1.03 | -1.00 (one seed) |" in reproduction.effects_page(tmp_path, "table3")
