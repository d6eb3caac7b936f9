"""What a search chooses, and the tables of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from searches import BOTTLENECK, MOMENTUM, found_by, made_up, planned, three_tries

from zeroflow.grid.search_selection import outcomes, write
from zeroflow.results import Store, load, merge, pack
from zeroflow.results.rows import failure
from zeroflow.results.searches import render_searches, search_rows


@pytest.mark.parametrize(
    ("cells", "lr"),
    [
        ([(50, 1.0), (60, 9.0), (40, 0.1)], 0.1),  # accuracy comes first
        ([(50, 2.0), (50, 9.0), (50, 1.0)], 0.1),  # then the smaller lr, whatever the loss
        ([(50, 1.0), (40, 1.0), (50, 1.0)], 0.2),
        ([None, (40, 1.0), (30, 1.0)], 0.1),  # a failed one is out
        ([None, None, None], None),
    ],
)
def test_the_best_accuracy_wins_then_the_smaller_lr(
    some_drawings: str, tmp_path: Path, cells: list[Any], lr: float | None
) -> None:
    store, plan = Store(tmp_path), three_tries(some_drawings)
    for config, result in zip(plan.candidates.cells, cells, strict=True):
        assert outcomes(plan, store) == [], "not before all candidates have ended"
        if result is None:
            store.write_failure(failure(config, "NonFiniteLoss", "diverged", "", 1))
        else:
            made_up(store, config, *result)
    outcome = found_by(store, plan)
    assert (outcome.chosen and outcome.chosen.lr) == lr
    if lr is not None:
        when = {"dataset": some_drawings, "method": "ease", "optimizer": "zo-sgd"}
        assert outcome.rule == {"when": when, "set": {"lr": lr}}
    write([outcome], store)
    rows = {row["lr"]: row for row in load(store, "searches").to_pylist()}
    assert [row["candidate"] for row in rows.values()] == [0, 1, 2] and list(rows) == [0.3, 0.1, 0.2]
    assert {row["lr"] for row in rows.values() if row["chosen"]} == ({lr} if lr else set())
    assert [row["error"] for row in rows.values()] == ["NonFiniteLoss" if c is None else None for c in cells]
    assert [row["accuracy"] for row in rows.values()] == [c and c[0] for c in cells]
    assert {(row["budget"], row["forward_equivalents"], row["seed"]) for row in rows.values()} == {(100, 12, 100)}


@pytest.mark.parametrize(
    ("accuracies", "n", "lr", "level"),
    [
        # By lr: 0.3, 0.1, 0.2. One standard error of 80 % over 100 samples is 4 points, over 400 it is 2.
        ((80, 77, 79), 100, 0.1, 3),
        ((80, 75.9, 79), 100, 0.2, 2),
        ((80, 77, 79), 400, 0.2, 2),
        ((80, 77, 77.9), 400, 0.3, 1),
        ((50, 60, 60), 100, 0.1, 2),
    ],
)
def test_of_what_held_out_samples_cannot_tell_apart_the_smallest_lr_is_chosen(
    some_drawings: str, tmp_path: Path, accuracies: Sequence[float], n: int, lr: float, level: int
) -> None:
    store, plan = Store(tmp_path), three_tries(some_drawings)
    for config, accuracy in zip(plan.candidates.cells, accuracies, strict=True):
        made_up(store, config, accuracy, 1.0, n=n)
    outcome = found_by(store, plan)
    assert outcome.chosen and outcome.chosen.lr == lr
    (row,) = search_rows(outcome.rows)
    assert (row.level, row.best, row.lr) == (level, max(accuracies), lr)


def test_searches_of_one_name_say_what_tells_them_apart(some_drawings: str, tmp_path: Path) -> None:
    store, rows = Store(tmp_path), []
    for block in ({MOMENTUM: 0.0}, {MOMENTUM: 0.9}, {MOMENTUM: 0.9, "hybrid_epochs": 1}):
        plan = planned(some_drawings, None, {"optimizer": "zo-sgd", **block}, lr=[0.1])
        for config in plan.candidates.cells:
            made_up(store, config, 50, 1.0, n=100)
        rows += found_by(store, plan).rows
    assert sorted(row.setting for row in search_rows(rows)) == [
        "hybrid_epochs=0 momentum=0.9",
        "hybrid_epochs=0 momentum=default",
        "hybrid_epochs=1 momentum=0.9",
    ]
    text = render_searches(search_rows(rows))
    assert "| setting" in text and "hybrid_epochs=1 momentum=0.9" in text
    assert [row.setting for row in search_rows(rows[:1])] == [""]


def test_searches_that_agree_in_six_digits_have_names_of_their_own(some_drawings: str, tmp_path: Path) -> None:
    store, rows = Store(tmp_path), []
    for momentum in (0.9, 0.90000001):
        plan = planned(some_drawings, None, {"optimizer": "zo-sgd", MOMENTUM: momentum}, lr=[0.1])
        for config in plan.candidates.cells:
            made_up(store, config, 50, 1.0, n=100)
        rows += found_by(store, plan).rows
    assert sorted(row.setting for row in search_rows(rows)) == ["momentum=0.9", "momentum=0.90000001"]


def test_a_failed_first_candidate_leaves_the_standard_error_as_it_is(some_drawings: str, tmp_path: Path) -> None:
    store, plan = Store(tmp_path), three_tries(some_drawings)
    first, second, third = plan.candidates.cells
    store.write_failure(failure(first, "NonFiniteLoss", "diverged", "", 1))
    made_up(store, second, 77, 1.0, n=100)
    made_up(store, third, 80, 1.0, n=100)
    outcome = found_by(store, plan)
    assert outcome.chosen and outcome.chosen.lr == 0.1
    (row,) = search_rows(outcome.rows)
    assert (row.level, row.lr) == (2, 0.1)


@pytest.mark.parametrize(
    ("cells", "eps"),
    [
        ([(50, 1.0), (60, 9.0)], 1e-2),  # accuracy comes first
        ([(50, 2.0), (50, 1.0)], 1e-2),  # then the loss
        ([(50, 1.0, 3.0), (50, 3.0, 0.5)], 1e-2),  # its mean over the last epoch, not the last step
        ([(50, None), (50, 9.0)], 1e-2),  # no finite loss loses against any
        ([(50, 1.0), (50, 1.0)], 1e-3),  # then the smaller eps
    ],
)
def test_among_equal_lr_accuracy_loss_and_the_smaller_eps_decide(
    some_drawings: str, tmp_path: Path, cells: list[Any], eps: float
) -> None:
    store, plan = Store(tmp_path), three_tries(some_drawings, lr=[0.1], eps=[1e-3, 1e-2])
    for config, result in zip(plan.candidates.cells, cells, strict=True):
        made_up(store, config, *result)
    outcome = found_by(store, plan)
    assert outcome.chosen and outcome.chosen.eps == eps


@pytest.mark.parametrize(
    ("cells", "chosen"),
    [
        # In the order of the tries: lr 0.3 and 0.1 with momentum 0.9, then both with 0.0. Of 80 % over 100 samples: 4 points.
        ([(80, 1.0), (77, 1.0), (60, 1.0), (70, 1.0)], (0.1, 0.9)),  # level with the best: the smaller lr
        ([(80, 1.0), (77, 0.1), (60, 1.0), (78, 9.0)], (0.1, 0.0)),  # at that lr the accuracy
        ([(80, 1.0), (78, 2.0), (60, 1.0), (78, 1.0)], (0.1, 0.0)),  # then the loss
        ([(80, 1.0), (78, 1.0), (60, 1.0), (78, 1.0)], (0.1, 0.9)),  # then the order
        ([(80, 1.0), (75, 1.0), (79, 1.0), (75, 1.0)], (0.3, 0.9)),
        ([(60, 1.0), None, (80, 1.0), None], (0.3, 0.0)),  # failed ones are out
        ([None, None, None, None], None),
    ],
)
def test_options_are_chosen_at_the_smallest_lr_that_is_level_with_the_best(
    some_drawings: str, tmp_path: Path, cells: list[Any], chosen: tuple[float, float] | None
) -> None:
    store, plan = Store(tmp_path), planned(some_drawings, {MOMENTUM: [0.9, 0.0]})
    for config, result in zip(plan.candidates.cells, cells, strict=True):
        if result is None:
            store.write_failure(failure(config, "NonFiniteLoss", "diverged", "", 1))
        else:
            made_up(store, config, *result, n=100)
    outcome = found_by(store, plan)
    write([outcome], store)
    rows = load(store, "searches").to_pylist()
    assert [(row["lr"], json.loads(row["options"])) for row in rows] == [
        (lr, {MOMENTUM: momentum}) for momentum in (0.9, 0.0) for lr in (0.3, 0.1)
    ]
    assert [(row["lr"], json.loads(row["options"])[MOMENTUM]) for row in rows if row["chosen"]] == (
        [chosen] if chosen else []
    )
    (row,) = search_rows(rows)
    assert (row.tries, row.failed) == (4, sum(result is None for result in cells))
    if chosen is None:
        assert row.options == {} and row.options_text is None
        return
    lr, momentum = chosen
    assert outcome.rule["set"] == {"lr": lr, MOMENTUM: momentum} and row.options == {MOMENTUM: momentum}
    accuracies = {(r["lr"], json.loads(r["options"])[MOMENTUM]): r["accuracy"] for r in rows}
    assert row.accuracy == accuracies[chosen]
    beside = accuracies[0.3 if lr == 0.1 else 0.1, momentum]
    assert (row.lower, row.higher) == ((None, beside) if lr == 0.1 else (beside, None)), "with the same options"


def test_tables_have_a_column_of_options_where_any_were_searched(some_drawings: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    options = {MOMENTUM: [0.9], "optimizer_options.nesterov": [True], BOTTLENECK: [4]}
    plain, with_options = three_tries(some_drawings), planned(some_drawings, options, lr=[0.4])
    for plan in (plain, with_options):
        for config in plan.candidates.cells:
            made_up(store, config, 50, 1.0)
        write(outcomes(plan, store), store)
    table = load(store, "searches")
    text = render_searches(search_rows(table.to_pylist()))
    header, _, *lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    place = [head.strip() for head in header].index("options")
    assert sorted(line[place].strip() for line in lines) == ["-", "bottleneck=4 momentum=0.9 nesterov=True"]
    assert "options" not in render_searches(search_rows(outcomes(plain, store)[0].rows))


def test_over_seeds_the_means_count(some_drawings: str, tmp_path: Path) -> None:
    store, plan = Store(tmp_path), three_tries(some_drawings, seeds=[7, 8])
    for candidate, (first, second) in zip(
        plan.searches[0].candidates, [(90, 10), (60, 50), (0.1 + 0.2, 100)], strict=True
    ):
        made_up(store, candidate.cells[0], first, 1.0)
        made_up(store, candidate.cells[1], second, 1.0)
    outcome = found_by(store, plan)
    assert outcome.chosen and outcome.chosen.lr == 0.1
    assert [row["chosen"] for row in outcome.rows] == [False, False, True, True, False, False]
    (row,) = search_rows(outcome.rows)
    assert (row.accuracy, row.lower, row.higher) == (55.0, None, pytest.approx(50.15))


def test_what_a_row_lacks_of_the_held_out_samples_another_one_says(some_drawings: str, tmp_path: Path) -> None:
    """Of lr 0.3, 0.1 and 0.2 by 100 samples: 50 % is level with 54 %, whoever has lost the rows of stages that say 100."""
    plan, chosen = three_tries(some_drawings), []
    for lost in range(4):
        store = Store(tmp_path / str(lost))
        for number, (config, accuracy) in enumerate(zip(plan.candidates.cells, (40, 50, 54), strict=True)):
            made_up(store, config, accuracy, 1.0, n=None if number == lost else 100)
        outcome = found_by(store, plan)
        (row,) = search_rows(outcome.rows)
        chosen.append((outcome.chosen and outcome.chosen.lr, row.level))
    assert chosen == [(0.1, 2)] * 4


def test_a_search_that_is_there_is_not_written_again(some_drawings: str, tmp_path: Path) -> None:
    """Others who read the files of a packed store would find it twice."""
    plan, store = three_tries(some_drawings), Store(tmp_path)
    for config, accuracy in zip(plan.candidates.cells, (50, 40, 60), strict=True):
        made_up(store, config, accuracy, 1.0)
    write([found_by(store, plan)], store)
    pack(store)
    write([found_by(store, plan)], store)
    assert [file.name for file in (tmp_path / "searches").iterdir()] == ["packed.parquet"]


def test_the_table_says_where_the_best_lies(some_drawings: str, tmp_path: Path) -> None:
    plan = three_tries(some_drawings)

    def table(name: str, *accuracies: float) -> Any:
        store = Store(tmp_path / name)
        for config, accuracy in zip(plan.candidates.cells, accuracies, strict=True):
            made_up(store, config, accuracy, 1.0)
        (row,) = search_rows(found_by(store, plan).rows)
        return row

    inside, edge, flat = table("a", 30, 40, 50), table("b", 30, 50, 40), table("c", 50, 50, 50)
    assert (inside.lr, inside.lower, inside.higher, inside.edge) == (0.2, 40, 30, None)
    assert (edge.lr, edge.lower, edge.higher, edge.edge) == (0.1, None, 40, "lowest")
    assert (flat.lr, flat.level, flat.tries, flat.spent, flat.budget) == (0.1, 3, 3, 36, 100)
    text = render_searches([inside, edge])
    assert "50.00 (40.00, 30.00)" in text and "lowest lr tried: widen the range" in text
    lines = text.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1 and len({line.count("|") for line in lines[:4]}) == 1


def test_a_search_is_one_file_replaced_as_a_whole_and_merged(some_drawings: str, tmp_path: Path) -> None:
    small, large = three_tries(some_drawings, forward_passes=24), three_tries(some_drawings)
    store = Store(tmp_path / "one")
    for config, accuracy in zip(large.candidates.cells, (50, 40, 60), strict=True):
        made_up(store, config, accuracy, 1.0)
    write([found_by(store, small)], store)
    assert [row["chosen"] for row in load(store, "searches").to_pylist()] == [True, False]
    write([found_by(store, large)], store)
    rows = load(store, "searches").to_pylist()
    assert [row["chosen"] for row in rows] == [False, False, True] and {row["budget"] for row in rows} == {100}
    (file,) = (tmp_path / "one" / "searches").iterdir()
    assert file.stem == rows[0]["search_id"]
    assert merge(tmp_path / "two", store) == 3 and merge(tmp_path / "two", store) == 0
    assert load(tmp_path / "two", "searches").equals(load(store, "searches"))


def test_a_search_of_other_tries_in_another_store_is_told(some_drawings: str, tmp_path: Path) -> None:
    stores = [Store(tmp_path / name) for name in ("one", "two")]
    for store, plan in zip(
        stores, (three_tries(some_drawings, forward_passes=24), three_tries(some_drawings)), strict=True
    ):
        for config, accuracy in zip(plan.candidates.cells, (50, 40, 60)[: len(plan.candidates.cells)], strict=True):
            made_up(store, config, accuracy, 1.0)
        write([found_by(store, plan)], store)
    with pytest.warns(UserWarning, match=r"search \w+: 2 tries in an earlier store and 3 in .*two"):
        assert len(load(stores, "searches")) == 2
    with pytest.warns(UserWarning, match="2 tries in an earlier store and 3"):
        merge(stores[0], stores[1])
    assert load(stores[0], "searches")["chosen"].to_pylist() == [True, False], "nothing in the target is overwritten"
