"""Mutated grid files: each gives the cells that it says, or one refusal that names it. Of other input: the files test_mutated_*."""

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
from mutations import SEED, Check, changed_text, changed_tree, damaged, judged, numbers, respelt, same_grid, shuffled
from places import ROOT

from zeroflow.cli import main
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import load_grid
from zeroflow.trial.config import NESTED, TrialConfig

SWEEPS = ROOT / "sweeps"
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
    base = base if isinstance(base, dict) else {}  # null, which is a text here
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
    for config, values in grid.own[:: max(1, len(grid.own) // 10)]:
        if wrong := lost_value(config, values):
            return wrong
    for config in grid.cells[:: max(1, len(grid.cells) // 10)]:
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


# Spellings of a cell

DRAWN: dict[str, tuple[Any, ...]] = {
    "seed": (0, 1, 31), "lr": (0.001, 1.0, 2.5e-05, 30.0), "epochs": (1, 10, 16), "batch_size": (8, 48), "schedule": ("constant", "cosine"),
    "tasks": (5, 10, 20), "class_order_seed": (0, 1993), "validation": (0.0, 0.25), "queries": (1, 8), "eps": (0.001, 1.0), "dtype": ("float32", "float64"),
    "fixed_class_order": (None, "sorted"), "stop_after": (None, 2), "classifier": (None, "lda"),
}  # fmt: skip
METHOD_OPTIONS = {
    "ease": {"alpha": (0.1, 1.0), "bottleneck": (8, 16)},
    "aper-adapter": {"bottleneck": (8, 16)},
    "simplecil": {},
}
OPTIMIZER_OPTIONS = {"history": (0.0, 0.5), "sparsity": (0.0, 0.25), "weight_decay": (0.0, 0.0005)}


def drawn(random: Random) -> dict[str, Any]:
    """Keys of a cell, some of which may mean nothing to it or stand at their defaults."""

    def some(options: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
        return {key: random.choice(values) for key, values in options.items() if random.random() < 0.4}

    method = random.choice(list(METHOD_OPTIONS))
    values = {"method": method, "optimizer": random.choice(("fo-sgd", "zo-sgd", "zo-adam")), **some(DRAWN)}
    return {**values, "method_options": some(METHOD_OPTIONS[method]), "optimizer_options": some(OPTIMIZER_OPTIONS)}


def spelt(values: dict[str, Any], random: Random) -> str:
    """The keys as a grid file: in any order, numbers in any spelling, options nested or dotted, in base or in the block."""
    flat = {key: value for key, value in values.items() if key not in NESTED}
    for section in NESTED:
        if options := values.get(section):
            dotted = {f"{section}.{key}": value for key, value in options.items()}
            flat |= dotted if random.random() < 0.5 else {section: options}
    lists = {key: [value] if random.random() < 0.2 else value for key, value in flat.items()}
    base = {
        key: value for key, value in lists.items() if random.random() < 0.3 and "." not in key and key not in NESTED
    }
    block = {key: value for key, value in lists.items() if key not in base}
    return respelt(shuffled({"base": base, "grid": [block]}, random), random)


@pytest.mark.slow
@pytest.mark.parametrize("some", numbers(40))
def test_a_meaning_has_one_id_and_an_id_one_meaning(some: range, tmp_path: Path) -> None:
    file, meanings, refused = tmp_path / "grid.yaml", {}, 0
    for number in some:
        random = Random(f"{SEED} spellings {number}")
        values = drawn(random)
        found = set()
        for _ in range(4):
            file.write_text(spelt(values, random))
            try:
                (config,) = load_grid(file).cells
            except ConfigError:
                found.add("refused")
            else:
                found.add(config.cell_id)
                meanings.setdefault(config.cell_id, set()).add(json.dumps(dataclasses.asdict(config), sort_keys=True))
        assert len(found) == 1, f"number {number} of seed {SEED}: {values}: {found}"
        refused += found == {"refused"}
    assert refused < len(some) / 2
    assert all(len(same) == 1 for same in meanings.values())
    assert len(set.union(*meanings.values())) == len(meanings)
