"""Mutated inputs: each gives the right numbers or one refusal that names its place; never another error, never a lost cell.

Every mutation is drawn from ``SEED``, the kind of its input, the input and its number. ``-m long`` takes ten times as many others.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from mutations import beside, changed_text, changed_tree, damaged, same_grid

from zeroflow.cli import main
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import load_grid
from zeroflow.trial.config import NESTED, TrialConfig

SEED = 20251
SWEEPS = Path(__file__).parents[1] / "sweeps"
GRIDS = sorted(path.name for path in SWEEPS.glob("*.yaml"))
PER_GRID = 5

Check = Callable[[], str | None]
"""Returns what is wrong with what was accepted; None: nothing."""


def numbers(count: int) -> list[Any]:
    """The numbers of a kind's mutations: those of every run, and those of a long one."""
    return [
        pytest.param(range(count), id=f"seed-{SEED}"),
        pytest.param(range(count, 11 * count), id=f"seed-{SEED}-long", marks=pytest.mark.long),
    ]


def judged(kind: str, some: range, one: Callable[[Random, int], tuple[str, Check, str]]) -> list[str]:
    """What is wrong with the mutations of these numbers, each with kind, number and description.

    Args:
        kind: of the input, and which.
        some: numbers of the mutations.
        one: makes a mutation; returns its description, its check, and what a refusal must name.
    """
    problems = []
    for number in some:
        what, check, name = one(Random(f"{SEED} {kind} {number}"), number)
        try:
            wrong = check()
        except ConfigError as error:
            wrong = None if name in str(error) else f"the refusal does not name {name}: {error}"
        except Exception as error:
            wrong = f"raw {type(error).__name__}: {error}"
        if wrong:
            problems.append(f"{kind}, number {number} of seed {SEED}: {what}: {wrong[:600]}")
    return problems


# Grid files


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the committed grid files."""
    return Path(shutil.copytree(SWEEPS, tmp_path_factory.mktemp("grids") / "sweeps"))


@pytest.mark.parametrize("some", numbers(PER_GRID))
@pytest.mark.parametrize("name", GRIDS)
def test_a_mutated_grid_gives_the_cells_that_it_says_or_is_refused(name: str, some: range, sweeps: Path) -> None:
    file = sweeps / name
    text = (SWEEPS / name).read_text()
    tree = yaml.safe_load(text)
    ids = {config.cell_id for config in load_grid(SWEEPS / name).cells}

    def one(random: Random, number: int) -> tuple[str, Check, str]:
        if number % PER_GRID == 0:
            what, data = same_grid(text, tree, random)
        elif number % PER_GRID == 1:
            what, data = random.choice((changed_text(text, random), damaged(text.encode(), random)))
        else:
            what, new = changed_tree(tree, random)
            data = new.encode()
        file.write_bytes(data)

        def check() -> str | None:
            if number % PER_GRID == 2:
                return ended_well(CliRunner().invoke(main, ["plan", "--grid", str(file), "--results", str(sweeps / "none")]))
            found = {config.cell_id for config in load_grid(file).cells}
            if number % PER_GRID == 0:
                return None if found == ids else f"{len(found)} cells, expected the same {len(ids)}"
            return wrong_cells(file, data)

        return what, check, name

    try:
        assert not (found := judged(f"grid {name}", some, one)), "\n".join(found)
    finally:
        shutil.copy(SWEEPS / name, file)


def ended_well(result: Any) -> str | None:
    """What is wrong with how a command ended."""
    if result.exit_code == 0 or (result.exit_code == 2 and result.output.count("Error: ") == 1 and "Traceback" not in result.output):
        return None
    return f"exit status {result.exit_code}: {result.exception!r}: {result.output}"


def wrong_cells(file: Path, data: bytes) -> str | None:
    """Compare the cells of a grid with the texts of its file, read without knowing types."""
    grid = load_grid(file)
    texts = yaml.load(data.decode("utf-8-sig"), yaml.BaseLoader)
    base, blocks = texts.get("base") or {}, texts.get("grid") or []
    counts = [math.prod(len(as_list(value)) for value in (*base.values(), *block.values())) for block in blocks]
    if sum(counts) != len(grid.own):
        return f"{len(grid.own)} cells are spelled, expected {sum(counts)}"
    rules = "settings" in texts or "settings_from" in texts
    start = 0
    for block, count in zip(blocks, counts, strict=True):
        spelled = [values for _, values in grid.own[start : start + count]]
        start += count
        for key, texts_of_key in {**base, **block}.items():
            if rules or key.partition(".")[0] in NESTED:
                continue
            for text in as_list(texts_of_key):
                if not any(says(text, values[key]) for values in spelled):
                    return f"{key}: {text!r} is in the file and in no cell"
    for config, values in grid.own[:: max(1, len(grid.own) // 25)]:
        if wrong := lost_value(config, values):
            return wrong
    for config in grid.cells[:: max(1, len(grid.cells) // 25)]:
        for again in (dataclasses.asdict(config), json.loads(json.dumps(config.canonical()))):
            if TrialConfig.from_dict(again).cell_id != config.cell_id:
                return f"{config.label()}: another id for the same keys"
    return None


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def says(text: Any, value: Any) -> bool:
    """Whether a YAML text without types stands for a value."""
    if not isinstance(text, str):
        return isinstance(value, type(text))
    if isinstance(value, str):
        return value == text
    if value is None or isinstance(value, bool):
        return text.lower() in {None: ("", "~", "null"), True: ("true", "on", "yes"), False: ("false", "off", "no")}[value]
    try:
        return float(text.replace("_", "")) == value
    except ValueError:
        return isinstance(value, int) and text.lower().startswith("0x") and int(text, 16) == value


def lost_value(config: TrialConfig, values: Any) -> str | None:
    """A key of a cell that is neither as it was spelled nor meaningless to it."""
    needed = {"lr", "epochs", "batch_size", "seed"} if config.optimizer else set()
    for key, value in values.items():
        if key in NESTED or key in ("tasks", "base_classes", "increments", "fixed_class_order") or value is None:
            continue
        got = getattr(config, key)
        meaningless = got is None or got == getattr(TrialConfig, key, None)
        if (got != value or isinstance(got, bool) != isinstance(value, bool)) and (key in needed or not meaningless):
            return f"{config.label()}: {key} is {got!r}, spelled {value!r}"
    return None
