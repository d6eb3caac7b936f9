"""``zeroflow search``: what it runs, and what it writes into the grid file's text."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from searches import BOTTLENECK, MOMENTUM, found_by, made_up, planned

from zeroflow import run_trial
from zeroflow.cli import main
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import load_grid, parse_grid
from zeroflow.grid.search_plan import plan_search
from zeroflow.grid.search_selection import outcomes, write
from zeroflow.grid.search_writeback import BEGIN, END, with_chosen, write_chosen
from zeroflow.grid.yaml_loader import parse_yaml
from zeroflow.results import Store, load
from zeroflow.results.rows import tables
from zeroflow.results.tables import make_tables

# The grid file's text


HEAD = "# head\nbase: {tasks: 5}   # five\ngrid:\n  - {optimizer: [fo-sgd, zo-sgd]}\n"
RULES = [
    {"when": {"dataset": "quickdraw100", "method": "ease", "optimizer": "zo-sgd"}, "set": {"lr": 3e-05, "eps": 0.01}},
    {"when": {"dataset": "quickdraw100", "method": "ease", "optimizer": "fo-sgd"}, "set": {"lr": 1.0}},
]
SOME = "settings:\n  - {when: {optimizer: zo-sgd}, set: {lr: 0.5}}   # mine\n"


@pytest.mark.parametrize(
    "text",
    [
        HEAD,
        HEAD.rstrip("\n"),
        HEAD + SOME,
        (HEAD + SOME).rstrip("\n"),
        SOME + "\n# what is below\n\n" + HEAD + "# the end\n",
        HEAD + SOME.replace("  - ", "- ") + "# behind\nname: x\n",
        HEAD + "settings:   # none yet\n  # - a comment\nname: x\n",
        HEAD + "settings:\n    - when:\n        optimizer: zo-sgd\n      set:\n        lr: 0.5\n\n    # last words\n",
        (HEAD + SOME + "name: \u00e9\u2028\n").replace("\n", "\r\n"),
    ],
)
def test_chosen_values_go_into_the_settings_and_all_else_stays(tmp_path: Path, text: str) -> None:
    file = tmp_path / "g.yaml"
    file.write_bytes(text.encode())
    assert write_chosen(file, RULES) is True
    after = file.read_bytes().decode()
    begin = after.index(BEGIN)
    begin = after.rindex("\n", 0, begin) + 1
    end = after.index("\n", after.index(END)) + 1
    newline = "\r\n" if "\r\n" in text else "\n"
    rest, start = after[:begin] + after[end:], text if text.endswith(newline) else text + newline
    assert rest == (start if "settings" in text else f"{start}{newline}settings:{newline}")
    assert after.count("\n") == after.count(newline)
    cells = {cell.optimizer: cell for cell in load_grid(file).cells}
    assert (cells["zo-sgd"].lr, cells["zo-sgd"].eps, cells["fo-sgd"].lr) == (3e-05, 0.01, 1.0)
    assert write_chosen(file, RULES) is False, "again: nothing changes"
    assert file.read_bytes().decode() == after
    # Another search of some of the cells replaces what it chose and leaves the rest.
    new = [{**RULES[1], "set": {"lr": 0.25}}]
    write_chosen(file, new)
    assert file.read_bytes().decode() == after.replace("{lr: 1.0}", "{lr: 0.25}")


@pytest.mark.slow
def test_chosen_options_hold_when_the_file_is_read_again(some_drawings: str, tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    text = f"""
base: {{checkpoint: none, tasks: 4, epochs: 2, batch_size: 16, image_size: 14, dataset: {some_drawings}}}
grid:
  - {{method: [ease, shared-adapter], optimizer: zo-sgd, optimizer_options.momentum: [0.5, 0.9], seed: [0, 1]}}
settings:
  - {{when: {{method: ease}}, set: {{method_options.bottleneck: 8}}}}
search:
  forward_passes: 1000
  lr: [0.1]
  options:
    OPTIONS
"""
    first = "optimizer_options.momentum: [0.0, 0.5]\n    optimizer_options.distribution: [gaussian, rademacher]"
    file.write_text(text.replace("OPTIONS", first))
    plan = plan_search(load_grid(file), None)
    store = Store(tmp_path / "store")
    accuracy = {"ease": {"gaussian": 50, "rademacher": 60}, "shared-adapter": {"gaussian": 60, "rademacher": 50}}
    for candidate in plan.searches[0].candidates + plan.searches[1].candidates:
        (config,) = candidate.cells
        best = accuracy[config.method][candidate.options["optimizer_options.distribution"]]
        made_up(store, config, best - 10 * candidate.options[MOMENTUM], 1.0)
    assert write_chosen(file, [outcome.rule for outcome in outcomes(plan, store)])
    when = f"dataset: {some_drawings}, method: ease, optimizer: zo-sgd"
    chosen = "lr: 0.1, optimizer_options.momentum: 0.0, optimizer_options.distribution: rademacher"
    assert f"  - {{when: {{{when}}}, set: {{{chosen}}}}}\n" in file.read_text()
    cells = load_grid(file).cells
    assert [(c.method, c.seed, dict(c.optimizer_options), dict(c.method_options)) for c in cells] == [
        ("ease", 0, {"distribution": "rademacher"}, {"bottleneck": 8}),
        ("ease", 1, {"distribution": "rademacher"}, {"bottleneck": 8}),
        ("shared-adapter", 0, {}, {}),
        ("shared-adapter", 1, {}, {}),
    ], "momentum 0.0, the default, where the file's blocks say 0.5 and 0.9"
    # The same search again: the same candidates, and nothing to write.
    again = plan_search(load_grid(file), None)
    assert [c.cell_id for c in again.candidates.cells] == [c.cell_id for c in plan.candidates.cells]
    assert write_chosen(file, [outcome.rule for outcome in outcomes(again, store)]) is False
    # A search of something else is made with what was chosen before, which stays.
    file.write_text(file.read_text().replace(first, "method_options.bottleneck: [4, 16]"))
    other = plan_search(load_grid(file), None)
    assert {c.optimizer_options.get("distribution") for c in other.searches[0].candidates[0].cells} == {"rademacher"}
    for candidate in other.searches[0].candidates:
        made_up(store, candidate.cells[0], candidate.options[BOTTLENECK], 1.0)
    (outcome,) = outcomes(other, store)
    assert write_chosen(file, [outcome.rule])
    assert f"set: {{{chosen}, method_options.bottleneck: 16}}}}\n" in file.read_text()
    kept = {
        (c.method, c.method_options.get("bottleneck"), c.optimizer_options.get("distribution"))
        for c in load_grid(file).cells
    }
    assert kept == {("ease", 16, "rademacher"), ("shared-adapter", None, None)}


def test_what_cannot_be_placed_or_would_not_hold_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    block = f"settings:\n  {BEGIN}\n  {END}\n"
    for text, message in [
        (HEAD + "settings: [{when: {optimizer: zo-sgd}, set: {lr: 0.5}}]\n", "cannot be placed here.*--print"),
        ("{grid: [{optimizer: [fo-sgd, zo-sgd]}]}", "cannot be placed here"),
        (HEAD + block + "  - {when: {optimizer: zo-sgd}, set: {lr: 0.5}}\n", "would keep {'lr': 0.5}.*move it up"),
        (HEAD + f"settings:\n  {BEGIN}\n", "expected one line"),
        (HEAD + block + f"# {END}\n", "expected one line"),
    ]:
        file = tmp_path / "g.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            write_chosen(file, RULES)
        assert file.read_text() == text
    for momentum, other in ((0.0, 0.9), (0.5, 0.9), (0.9, 0.0)):
        text = HEAD + block + f"  - {{when: {{optimizer: zo-sgd}}, set: {{{MOMENTUM}: {other}}}}}\n"
        file.write_text(text)
        rule = {**RULES[0], "set": {"lr": 0.5, MOMENTUM: momentum}}
        with pytest.raises(ConfigError, match=f"would keep {{'{MOMENTUM}': {other}}}.*move it up"):
            write_chosen(file, [rule])
        assert file.read_text() == text
    assert write_chosen(file, [{**RULES[0], "set": {"lr": 0.5, MOMENTUM: 0.0}}]), "the same value may stand there"


def test_a_rule_below_with_a_condition_on_what_is_chosen_is_refused(tmp_path: Path) -> None:
    """It would change a cell, once the value is there, into one that was not searched."""
    file = tmp_path / "g.yaml"
    text = HEAD + f"settings:\n  {BEGIN}\n  {END}\n  - {{when: {{lr: '> 0.05'}}, set: {{epochs: 3}}}}\n"
    file.write_text(text)
    with pytest.raises(
        ConfigError, match=r"would get {'epochs': 3}: a rule below .* has a condition on what is chosen"
    ):
        write_chosen(file, [{"when": {"optimizer": "zo-sgd"}, "set": {"lr": 0.5}}])
    assert file.read_text() == text
    assert write_chosen(file, [{"when": {"optimizer": "zo-sgd"}, "set": {"lr": 0.01}}])


def test_what_could_not_be_written_at_the_end_is_refused_before_any_work(some_drawings: str, tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    text = f"""
base: {{checkpoint: none, tasks: 4, epochs: 2, batch_size: 16, image_size: 14, dataset: {some_drawings}}}
grid: [{{optimizer: zo-sgd}}]
settings:
  {BEGIN}
  {END}
  - {{when: {{lr: "> 0.05"}}, set: {{epochs: 3}}}}
search: {{forward_passes: 100, lr: [0.01, 0.1]}}
"""
    command = ["search", str(file), "--results", str(tmp_path / "store")]
    for content, message in (
        (text, "has a condition on what is chosen"),
        (text.replace(BEGIN, "#"), "expected one line"),
    ):
        file.write_text(content)
        found = CliRunner().invoke(main, command)
        assert found.exit_code == 2 and message in found.output
        assert not (tmp_path / "store").exists()
        assert CliRunner().invoke(main, [*command, "--dry-run", "--print"]).exit_code == 0
    file.write_text("{grid: [{optimizer: zo-sgd, dataset: cub}], search: {forward_passes: 100}}")
    found = CliRunner().invoke(main, [*command, "--data-dir", str(tmp_path), "--dry-run"])
    assert found.exit_code == 0 and "1 cells wait for their data set" in found.output, "there is nothing to write yet"


def test_a_search_of_some_cells_in_between_does_not_keep_later_ones_from_holding(tmp_path: Path) -> None:
    """What was chosen when the grid had three epochs alone has a wider condition than what was chosen before and after."""
    file = tmp_path / "g.yaml"
    file.write_text("grid: [{optimizer: zo-sgd, epochs: [1, 3]}]\n")
    whens = [{"optimizer": "zo-sgd", "epochs": epochs} for epochs in (1, 3)]
    for lr in (0.1, 0.2):
        write_chosen(file, [{"when": when, "set": {"lr": lr}} for when in whens])
    write_chosen(file, [{"when": {"optimizer": "zo-sgd"}, "set": {"lr": 0.3}}])
    write_chosen(file, [{"when": when, "set": {"lr": lr}} for when, lr in zip(whens, (0.4, 0.5), strict=True)])
    assert [(cell.epochs, cell.lr) for cell in load_grid(file).cells] == [(1, 0.4), (3, 0.5)]


def test_rules_tell_apart_what_was_searched_apart(tmp_path: Path) -> None:
    """Whatever else differs between cells, each gets what its own search chose, and cells that were not searched nothing."""
    text = """
base: {dataset: quickdraw100, tasks: 5}
grid:
  - {method: [ease, aper-adapter], optimizer: [zo-sgd, zo-adam], optimizer_options.sparsity: [0.0, 0.5], seed: [0, 1]}
  - {method: ease, optimizer: zo-sgd, transform: [plain, drawings], queries: [1, 8]}
  - {method: ease, optimizer: [zo-adam, fo-sgd], method_options: {alpha: 0.5}}
  - {method: ease, optimizer: fo-adam, optimizer_options: {betas: [0.5, 0.9]}}
  - {method: ease, optimizer: fo-adam, optimizer_options: {betas: [0.6, 0.9]}}
settings:
  - {when: {queries: ">= 8"}, set: {epochs: 2}}
search: {forward_passes: 10000, when: {method: ease}, eps: [1e-3, 1e-2], lr: {"*-sgd": [0.5], "*-adam": [0.25]}}
"""
    file = tmp_path / "g.yaml"
    file.write_text(text)
    plan = plan_search(load_grid(file), None)
    assert len(plan.searches) == 11
    wanted, rules = {}, []
    for number, one in enumerate(plan.searches):
        lr = (number + 1) / 64
        rules.append({"when": dict(one.when), "set": {"lr": lr}})
        for config in one.cells:
            wanted[dataclasses.replace(config, lr=lr).cell_id] = lr
    write_chosen(file, rules)
    after = {cell.cell_id: cell for cell in load_grid(file).cells}
    searched = {cell_id: cell.lr for cell_id, cell in after.items() if cell.method == "ease"}
    assert searched == wanted
    untouched = [cell for cell in after.values() if cell.method != "ease"]
    before = {cell.cell_id for cell in parse_grid(parse_yaml(text, "g")).cells}
    assert untouched and all(cell.cell_id in before for cell in untouched)


def test_rules_keep_any_text_and_number() -> None:
    rule = {"when": {"dataset": "a: b # {c}", "transform": [None, "x"]}, "set": {"lr": 1e-05, "eps": 3.16e20}}
    content = parse_yaml(with_chosen("grid: [{}]\n", [rule], "g"), "g")
    assert content["settings"] == [rule] and isinstance(content["settings"][0]["set"]["lr"], float)


# The command


SMALL = """# Two optimizers.
name: small
base: {checkpoint: none, image_size: 7, tasks: 20, epochs: 1, batch_size: 100, method: aper-adapter}
grid:
  - {optimizer: [fo-sgd, zo-sgd], seed: [0, 1]}

placement: {gpus_per_worker: 0, max_concurrent: 2}
search: {forward_passes: 18, lr: {fo-*: [0.1, 0.2], zo-*: {from: 1e-3, to: 1e-1}}, eps: [1e-2]}
"""


@pytest.mark.slow
def test_a_search_of_options_that_is_really_run(some_drawings: str, tmp_path: Path) -> None:
    options = {MOMENTUM: [0.0, 0.9], BOTTLENECK: [4, 16]}
    block = {"method": "aper-adapter", "optimizer": "fo-sgd"}
    plan = planned(some_drawings, options, block, lr=[0.5, 0.05], forward_passes=18 * 5)
    store, candidates = Store(tmp_path), plan.searches[0].candidates
    assert len(candidates) == 5 == len(plan.candidates.cells)
    for config in plan.candidates.cells:
        store.write(tables(run_trial(config)))
    outcome = found_by(store, plan)
    write([outcome], store)
    rows, trials = load(store, "searches").to_pylist(), load(store, "trials")
    ran = {row["cell_id"]: row for row in trials.to_pylist()}
    assert len(rows) == len(ran) == 5
    for row in rows:
        trial, values = ran[row["cell_id"]], json.loads(row["options"])
        assert row["forward_equivalents"] == trial["forward_equivalents"] == 6 * 3
        assert json.loads(trial["method_options"]) == {"bottleneck": values[BOTTLENECK]}
        assert json.loads(trial["optimizer_options"] or "{}") == ({"momentum": 0.9} if values[MOMENTUM] else {})
    # The rule, spelled out: one standard error over 15 held-out drawings.
    best = max(row["accuracy"] for row in rows) / 100
    least = 100 * (best - math.sqrt(best * (1 - best) / 15))
    level = [
        (row["lr"], -row["accuracy"], row["final_loss"], row["candidate"]) for row in rows if row["accuracy"] >= least
    ]
    chosen = candidates[min(level)[-1]]
    assert outcome.chosen is chosen and outcome.rule["set"] == {"lr": chosen.lr, **chosen.options}
    (table,) = (
        one for one in make_tables({"trials": trials, "searches": load(store, "searches")}) if one.name == "searches"
    )
    shown = table.lines[0].cells[table.headings.index("options")]
    assert json.loads(shown.value) == chosen.options
    assert shown.text == f"bottleneck={chosen.options[BOTTLENECK]} momentum={chosen.options[MOMENTUM]:g}"


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    run = CliRunner().invoke(main, ["search", str(file), "--results", str(tmp_path / "r"), "--dry-run"])
    assert run.exit_code == 0, run.output
    assert "aper-adapter fo-sgd: 2 tries of 9, 18 in all; lr 0.1 to 0.2; no more values to try" in run.output
    assert "aper-adapter zo-sgd: 3 tries of 6, 18 in all; lr 0.001 to 0.1; eps 0.01" in run.output
    assert "5 cells: 0 done, 0 failed, 5 to run" in run.output and "estimate: none yet" in run.output
    assert file.read_text() == SMALL and [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_data_that_is_not_here_is_named(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("grid: [{dataset: [cub, quickdraw100]}]\nsearch: {forward_passes: 100000}\n")
    run = CliRunner().invoke(main, ["search", str(file), "--data-dir", str(tmp_path), "--dry-run"])
    assert run.exit_code == 0, run.output
    assert "cub: 1 cells wait for their data set" in run.output and "1 searches of 100,000" in run.output


def test_what_is_wrong_with_several_data_sets_is_said_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for part in ("train", "test"):
            (tmp_path / name / part / "empty class").mkdir(parents=True)
    blocks = {"dataset": ["folder:one", "folder:two"], "tasks": 1}
    with pytest.raises(ConfigError) as error:
        plan_search(parse_grid({"grid": [blocks], "search": {"forward_passes": 100}}), str(tmp_path))
    assert "folder:one" in str(error.value) and "folder:two" in str(error.value)


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_search_chooses_writes_and_never_runs_a_cell_twice(tmp_path: Path, sweep_here) -> None:
    file, results = tmp_path / "small.yaml", tmp_path / "results"
    file.write_text(SMALL)
    search = partial(sweep_here, "search", file, "--results", results)
    first = search()
    assert first.exit_code == 0, first.output
    rows = load(results, "searches").to_pylist()
    trials = {row["cell_id"]: row for row in load(results, "trials").to_pylist()}
    assert len(rows) == len(trials) == 5
    for row in rows:
        trial = trials[row["cell_id"]]
        assert (trial["validation"], trial["stop_after"], trial["seed"]) == (0.25, 1, 100)
        assert (row["accuracy"], row["lr"], row["eps"]) == (trial["last"], trial["lr"], trial["eps"])
        assert row["forward_equivalents"] == trial["forward_equivalents"]
        assert math.isfinite(row["final_loss"])
    chosen = {row["optimizer"]: row for row in rows if row["chosen"]}
    for name, row in chosen.items():
        others = [other for other in rows if other["optimizer"] == name]
        assert {other["n"] for other in others} == {100}, "a quarter of 5 classes' 80 drawings"
        best = max(other["accuracy"] for other in others) / 100
        level = [o for o in others if o["accuracy"] >= 100 * (best - math.sqrt(best * (1 - best) / 100))]
        assert (row["lr"], -row["accuracy"]) == min((o["lr"], -o["accuracy"]) for o in level)
    for cell in load_grid(file).cells:
        assert cell.lr == chosen[cell.optimizer]["lr"] and cell.eps == chosen[cell.optimizer]["eps"]
    text = file.read_text()
    assert text.startswith(SMALL), "what was there stays as it was"
    kept = {path: path.read_bytes() for path in results.rglob("*.parquet")}

    again = search()
    assert again.exit_code == 0 and "5 done, 0 failed, 0 to run" in again.stdout and "Ray" not in again.stdout
    assert "holds the chosen values already" in again.stdout and file.read_text() == text
    assert {path: path.read_bytes() for path in results.rglob("*.parquet")} == kept

    printed = search("--print")
    assert printed.exit_code == 0 and f"optimizer: zo-sgd}}, set: {{lr: {chosen['zo-sgd']['lr']}" in printed.stdout
