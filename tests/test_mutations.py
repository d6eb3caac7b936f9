"""Mutated grid files: each gives the cells that it says, or one refusal that names it. Of other input: test_mutated_files."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mutations import Check, changed_text, changed_tree, damaged, judged, numbers, same_grid

from zeroflow.cli import main
from zeroflow.grid.grid_file import load_grid
from zeroflow.trial.config import NESTED, TrialConfig

SWEEPS = Path(__file__).parents[1] / "sweeps"
GRIDS = sorted(path.name for path in SWEEPS.glob("*.yaml"))
PER_GRID = 5

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
                return ended_well(
                    CliRunner().invoke(main, ["plan", "--grid", str(file), "--results", str(sweeps / "none")])
                )
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
    if result.exit_code == 0 or (
        result.exit_code == 2 and result.output.count("Error: ") == 1 and "Traceback" not in result.output
    ):
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
        return (
            text.lower() in {None: ("", "~", "null"), True: ("true", "on", "yes"), False: ("false", "off", "no")}[value]
        )
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
