"""What a plan refuses, and says of one's own images, before anything runs."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from zeroflow.cli import main
from zeroflow.errors import ConfigError
from zeroflow.grid.plan import check_results
from zeroflow.results import Store


@pytest.mark.parametrize("place", [".", "runs/one", "link"])
def test_results_among_the_data_are_refused_before_anything_runs(place: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "link").symlink_to(data)
    results = tmp_path / "link" / "runs" if place == "link" else data / place
    command = ["run", "--set", "method=simplecil", "--results", str(results), "--data-dir", str(data)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2 and f"in the folder of the data sets, {data}" in done.output
    assert not list(data.iterdir())


def test_a_disk_without_room_for_the_cells_is_refused_with_the_numbers(tmp_path: Path, monkeypatch) -> None:
    total = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: total._replace(free=3 * 2**20))
    check_results(Store(tmp_path / "few"), 32, None)
    with pytest.raises(
        ConfigError, match=r"few': 3\.0 MiB of the disk are free, expected 3\.1 MiB or more for 33 cells"
    ):
        check_results(Store(tmp_path / "few"), 33, None)


def test_images_of_a_folder_are_counted_by_split_and_class(tmp_path: Path) -> None:
    for part, counts in (("train", {"a": 3, "b": 5}), ("test", {"a": 2, "b": 2})):
        for name, count in counts.items():
            (tmp_path / "data" / "own" / part / name).mkdir(parents=True)
            for number in range(count):
                colour = (number, ord(name), 99 * (part == "train" or number > 0))
                Image.new("RGB", (8, 8), colour).save(tmp_path / "data" / "own" / part / name / f"{number}.png")
    (tmp_path / "grid.yaml").write_text("grid: [{dataset: folder:own, method: simplecil, tasks: 2}]\n")
    command = ["plan", "--grid", str(tmp_path / "grid.yaml"), "--results", str(tmp_path / "out")]
    run = CliRunner().invoke(main, [*command, "--data-dir", str(tmp_path / "data")])
    assert run.exit_code == 0, run.output
    assert "folder:own: 2 classes; train 8 images, 3 to 5 a class; test 4 images, 2 a class" in run.output
    twice = re.findall(r"2 test images are training images too, byte for byte, such as \S+/test/a/1.png", run.output)
    assert len(twice) == 1, run.output


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_tasks_that_images_of_ones_own_cannot_be_cut_into_are_refused_before_anything_runs(
    command: str, tmp_path: Path
) -> None:
    """How many classes there are is known once they are opened, which both do before any cell."""
    for part, name in itertools.product(("train", "test"), "abcd"):
        (tmp_path / "data" / "own" / part / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (part == "test", ord(name), 0)).save(tmp_path / "data" / "own" / part / name / "0.png")
    (tmp_path / "grid.yaml").write_text(
        "base: {dataset: folder:own, method: simplecil, tasks: 2}\n"
        "grid:\n"
        "  - {tasks: [2, 3]}\n"
        "  - {increments: [[1, 3], [1, 2]]}\n"
        "  - {fixed_class_order: [[3, 2, 1, 0], [2, 1, 0]]}\n"
        "  - {method: replay, optimizer: zo-sgd, method_options: {selection: herding, buffer: 1}}\n"
        "  - {validation: 0.5}\n"
    )
    given = {"--grid": "grid.yaml", "--results": "out", "--data-dir": "data"}
    arguments = [word for option, name in given.items() for word in (option, str(tmp_path / name))]
    run = CliRunner().invoke(main, [command, *arguments])
    assert run.exit_code == 2 and not (tmp_path / "out").exists(), run.output
    for problem in (
        "tasks=3: 4 classes do not divide into 3 equal tasks",
        "increments=[1, 2]: expected positive numbers that add up to 4",
        "class order: expected each of 0..3 once; 3: not there",
        "method 'replay': buffer=1 with selection=herding: no room for one sample of each of the 2 classes",
        "validation=0.5",
    ):
        assert run.output.count(problem) == 1, run.output
