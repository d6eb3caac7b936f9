"""Weights and images of one's own that change while their names stay: no result of the old ones passes for one of the new."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
from click.testing import CliRunner
from PIL import Image

from zeroflow import Placement, TrialConfig, run_trial
from zeroflow.cli import main
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import parse_grid
from zeroflow.grid.plan import Plan, make_plan
from zeroflow.models.factory import create_backbone
from zeroflow.results import Store, merge, rows
from zeroflow.results.report import write_report


def write_weights(file: Path, tiny_vit: dict[str, Any], seed: int) -> None:
    backbone = create_backbone(tiny_vit["backbone"], checkpoint="none", image_size=14, seed=seed)
    safetensors.torch.save_file(backbone.model.state_dict(), file)


def write_images(root: Path, per_class: int, seed: int = 0) -> None:
    chance = np.random.default_rng(seed)
    for part, number in (("train", per_class), ("test", 2)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for image in range(number):
                pixels = chance.integers(0, 255, (14, 14, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{image}.png")


@pytest.fixture
def weights(tiny_vit: dict[str, Any], tmp_path: Path) -> Path:
    write_weights(tmp_path / "weights.safetensors", tiny_vit, seed=0)
    return tmp_path / "weights.safetensors"


def plan(cell: dict[str, Any], store: Store, data_dir: Path | None = None) -> Plan:
    return make_plan(parse_grid({"grid": [cell]}), store, None if data_dir is None else str(data_dir))


def run(cell: dict[str, Any], store: Store, data_dir: Path | None = None) -> None:
    placement = Placement(data_dir=None if data_dir is None else str(data_dir))
    store.write(rows.tables(run_trial(TrialConfig.from_dict(cell), placement)))


def test_new_weights_at_the_old_path_are_refused_beside_results_of_the_old(
    weights: Path, tiny_vit: dict[str, Any], some_drawings: str, tmp_path: Path
) -> None:
    cell = {**tiny_vit, "checkpoint": str(weights), "dataset": some_drawings, "tasks": 10, "stop_after": 1}
    cell |= {"method": "simplecil"}
    store, old = Store(tmp_path / "results"), weights.read_bytes()
    run(cell, store)
    assert len(plan(cell, store).done) == 1
    write_weights(weights, tiny_vit, seed=1)
    expected = (
        r"cell \w+ was computed with another .*weights\.safetensors \(\w{12}, now \w{12}\); write into other results"
    )
    with pytest.raises(ConfigError, match=expected):
        plan(cell, store)
    assert len(plan(cell, Store(tmp_path / "others")).missing) == 1
    weights.write_bytes(old)  # the same content at another time
    os.utime(weights, (1, 1))
    assert len(plan(cell, store).done) == 1


def test_seeds_of_other_weights_are_neither_added_nor_merged(
    weights: Path, tiny_vit: dict[str, Any], some_drawings: str, tmp_path: Path
) -> None:
    """They would be averaged with those that are there."""
    cell = {**tiny_vit, "checkpoint": str(weights), "dataset": some_drawings, "tasks": 10, "stop_after": 1}
    cell |= {"method": "ranpac", "classifier_options": {"dimension": 10}}
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    run({**cell, "seed": 0}, one)
    write_weights(weights, tiny_vit, seed=1)
    run({**cell, "seed": 1}, other)
    with pytest.raises(ConfigError, match=r"was computed with another .*weights\.safetensors"):
        plan({**cell, "seed": [1, 2]}, one)
    arguments = [f"--set={key}={json.dumps(value)}" for key, value in {**cell, "seed": 1}.items()]
    ran = CliRunner().invoke(main, ["run", *arguments, "--results", one.root])
    assert ran.exit_code == 2 and "was computed with another" in ran.stderr, ran.output
    with pytest.raises(ConfigError, match=r"results of 2 versions of .*weights\.safetensors stand side by side"):
        merge(one, other)
    assert "stand side by side" in write_report([one, other], tmp_path / "report.html").read_text()


def test_results_without_hashes_of_earlier_versions_are_taken_as_they_are(
    weights: Path, tiny_vit: dict[str, Any], some_drawings: str, tmp_path: Path
) -> None:
    cell = {**tiny_vit, "checkpoint": str(weights), "dataset": some_drawings, "tasks": 10, "stop_after": 1}
    cell |= {"method": "simplecil"}
    tables = rows.tables(run_trial(TrialConfig.from_dict(cell)))
    place = tables["trials"].schema.get_field_index("named")
    (named,) = tables["trials"]["named"].to_pylist()
    assert list(json.loads(named)) == [str(weights)]
    store = Store(tmp_path / "results")
    without = tables["trials"].set_column(place, tables["trials"].schema.field(place), pa.nulls(1, pa.string()))
    store.write({**tables, "trials": without})
    assert len(plan(cell, store).done) == 1


def test_an_unfinished_cell_begins_anew_with_new_weights(
    weights: Path, tiny_vit: dict[str, Any], some_drawings: str, tmp_path: Path
) -> None:
    cell = {**tiny_vit, "checkpoint": str(weights), "dataset": some_drawings, "tasks": 10, "stop_after": 2}
    config = TrialConfig.from_dict({**cell, "method": "simplecil"})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(config, folder=tmp_path / "unfinished", on_stage=stop)
    write_weights(weights, tiny_vit, seed=1)
    resumed, whole = run_trial(config, folder=tmp_path / "unfinished"), run_trial(config)
    assert resumed.accuracy_matrix.tobytes() == whole.accuracy_matrix.tobytes()


def test_a_folder_with_more_images_is_refused_beside_results_of_fewer(tiny_vit: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_images(data / "pets", per_class=3)
    cell = {**tiny_vit, "dataset": "folder:pets", "tasks": 1, "method": "simplecil"}
    store = Store(tmp_path / "results")
    run(cell, store, data)
    assert len(plan(cell, store, data).done) == 1
    write_images(data / "pets", per_class=4)
    with pytest.raises(ConfigError, match=r"was computed with another folder:pets \(\w{12}, now \w{12}\)"):
        plan(cell, store, data)
    assert len(plan(cell, store, tmp_path / "elsewhere").done) == 1, "what is not here is not compared"
