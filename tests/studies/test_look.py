"""``zeroflow look``: the pixels that a backbone gets, as a page and as one picture."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from image_files import IMAGENET, photo
from PIL import Image

from zeroflow.cli import main


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four classes with two images of 98 x 98 in each part, in a folder with a grid file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part in ("train", "test"):
        for label, name in enumerate(("auk", "eider <common>", "owl", "wren")):
            folder = tmp_path / "data" / "birds" / part / name
            folder.mkdir(parents=True)
            for number in range(2):
                photo(98, 98, seed=label + 10 * number).save(folder / f"{number}.png")
    grid = {
        "base": {"dataset": "folder:birds", "tasks": 2, "method": "simplecil", "fixed_class_order": "sorted"},
        "grid": [
            {"backbone": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 98, "preprocessing.crop_pct": 1.0}
        ],
    }
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    return tmp_path


def look(birds: Path, *arguments: str) -> Any:
    command = ["look", str(birds / "grid.yaml"), "--data-dir", str(birds / "data"), *arguments]
    return CliRunner().invoke(main, command)


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/png;base64,([^\"]+)", page)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(content)))) for content in found]


@pytest.mark.usefixtures("tiny_vit")
def test_a_page_shows_classes_pixels_and_numbers(birds: Path) -> None:
    done = look(birds, "--output", str(birds / "look.html"))
    assert done.exit_code == 0, done.output
    page = (birds / "look.html").read_text()
    assert "eider &lt;common&gt;" in page and "<common>" not in page
    assert {name for name in ("auk", "owl", "wren") if f"<figcaption>{name}</figcaption>" in page} == {
        "auk",
        "owl",
        "wren",
    }
    assert re.findall(r"<h3>(.*?)</h3>", page) == [
        "task 1, training",
        "task 1, test",
        "task 2, training",
        "task 2, test",
    ]
    # Two pictures of each of three images of four parts; 98 pixels are kept as they are, every pixel of them.
    shown = pictures(page)
    assert len(shown) == 2 * 3 * 4
    test_images = shown[6:12:2]
    files = [photo(98, 98, seed) for seed in (0, 10, 11)]  # auk's first and second, eider's second
    for picture, file in zip(test_images, (files[0], files[1], files[2]), strict=True):
        assert np.array_equal(picture, np.array(file))
    # As they are: 0 grey, 3 white.
    normalised = (np.array(files[0]) / 255 - np.array(IMAGENET["mean"])) / np.array(IMAGENET["std"])
    expected = ((normalised / 6 + 0.5) * 255).clip(0, 255)
    assert np.abs(shown[7].astype(float) - expected).max() <= 0.51
    test = np.stack([np.array(photo(98, 98, seed)) for seed in (0, 10, 11, 2, 12, 13)])
    numbers = (test / 255 - np.array(IMAGENET["mean"])) / np.array(IMAGENET["std"])
    red = numbers[..., 0]
    assert (
        f"test, 6 images: red min {red.min():.3f}, mean {red.mean():.3f}, std" in page
        and f"max {red.max():.3f}" in page
    )
    assert f"mean {red.mean():.3f}" in done.output and "center crop 1" in done.output


@pytest.mark.usefixtures("tiny_vit")
def test_a_wrong_normalisation_looks_wrong_and_every_preprocessing_has_its_own_look(birds: Path) -> None:
    done = look(birds, "-o", str(birds / "l.html"), "--set", "preprocessing.std=[[0.5,0.5,0.5],[0.001,0.001,0.001]]")
    assert done.exit_code == 0, done.output
    page = (birds / "l.html").read_text()
    assert len(re.findall("<h2>", page)) == 2
    shown = pictures(page)
    right, wrong = shown[7].astype(float), shown[24 + 7].astype(float)
    assert np.isin(wrong, (0, 255)).mean() > 0.9 and np.isin(right, (0, 255)).mean() < 0.1
    assert np.array_equal(shown[6], shown[24 + 6]), "mapped back they are the same photo"


@pytest.mark.usefixtures("tiny_vit")
def test_one_picture_holds_the_same_pixels(birds: Path) -> None:
    done = look(birds, "--output", str(birds / "look.png"))
    assert done.exit_code == 0, done.output
    sheet, wanted = np.array(Image.open(birds / "look.png")), np.array(photo(98, 98, 0))
    left = 8
    tops = [
        top
        for top in range(len(sheet) - 98)
        if np.array_equal(sheet[top, left : left + 98], wanted[0])
        and np.array_equal(sheet[top : top + 98, left : left + 98], wanted)
    ]
    assert len(tops) == 1


@pytest.mark.usefixtures("tiny_vit")
def test_what_cannot_be_shown_is_said_before_anything_is_drawn(birds: Path) -> None:
    done = look(birds, "--output", str(birds / "look.pdf"))
    assert done.exit_code == 2 and "expected a name that ends with .html or .png" in done.output
    done = look(birds, "--output", str(birds / "look.html"), "--set", "transform=plain", "--set", "preprocessing={}")
    assert done.exit_code == 2 and "transform 'plain' takes none; timm does" in done.output
    done = look(birds, "--set", "dataset=folder:fish", "--output", str(birds / "look.html"))
    assert done.exit_code == 2 and "data set 'folder:fish' is not here" in done.output
    assert not (birds / "look.html").exists()
    done = look(birds, "--set", "dataset=[folder:fish, folder:birds]", "--output", str(birds / "look.html"))
    assert done.exit_code == 0 and "data set 'folder:fish' is not here" in done.output
    assert (birds / "look.html").read_text().count("<h2>") == 1


@pytest.mark.slow
def test_look_needs_no_ray() -> None:
    program = "import sys, zeroflow.studies.looks, zeroflow.studies.look_sheet, zeroflow.cli.looking; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "False\n"
