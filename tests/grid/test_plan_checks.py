"""What a plan refuses, and says of one's own images, before anything runs."""

from __future__ import annotations

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
