"""Folders of images: every kind of file and of layout, what is told of a wrong one, and of data that is not there."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import random_pixels
from PIL import Image

from zeroflow.data import class_incremental, datasets, image_folder, load_dataset, transforms
from zeroflow.errors import ConfigError

pytestmark = pytest.mark.usefixtures("empty_cache")


FOLDER_SETS = {"cub": 200, "imagenet-a": 200, "omnibenchmark": 300}


# Image folders


def write_folder(root: Path, classes: list[str], per_class: int = 2) -> Path:
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                Image.new("RGB", (12 + i, 10), (i, 20, 30)).save(root / part / name / f"{i}.png")
    return root


def test_folders_with_odd_names_sort_and_hidden_entries_are_ignored(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "my photos", ["zebra finch", "ÄHRE", "001.Auk (black)", "鸟"])
    (root / "train" / ".cache").mkdir()
    (root / "train" / "notes.txt").write_text("no class")
    (root / "train" / "鸟" / ".hidden.png").write_bytes(b"")
    (root / "train" / "鸟" / "Thumbs.db").write_bytes(b"")
    (root / "train" / "鸟" / "1.png").rename(root / "train" / "鸟" / "B.PnG")
    dataset = image_folder("birds", root)
    assert dataset.class_names == ("001.Auk (black)", "zebra finch", "ÄHRE", "鸟")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    first, second = dataset.train.images(np.array([6, 7]))
    assert first.shape == (3, 10, 12) and second.shape == (3, 10, 13)
    assert second[:, 0, 0].tolist() == [1, 20, 30]
    task = class_incremental(dataset, [2, 2], transforms.get("timm"), 32).tasks[0]
    assert next(task.test.plain_batches())[0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    ("mode", "file", "colour", "expected"),
    [
        ("L", "grey.JPG", 90, (90, 90, 90)),
        ("CMYK", "print.jpeg", (0, 255, 255, 0), (255, 0, 0)),
        ("P", "palette.png", 3, (10, 200, 30)),
        ("RGBA", "clear.webp", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", "clear.png", (70, 0), (70, 70, 70)),
        ("1", "fax.tiff", 1, (255, 255, 255)),
        ("RGB", "old.bmp", (1, 2, 3), (1, 2, 3)),
        ("RGB", "plain.ppm", (1, 2, 3), (1, 2, 3)),
    ],
)
def test_every_colour_mode_becomes_rgb(
    tmp_path: Path, mode: str, file: str, colour: int | tuple[int, ...], expected: tuple[int, ...]
) -> None:
    root = write_folder(tmp_path, ["a"], per_class=1)
    (root / "train" / "a" / "0.png").unlink()
    image = Image.new(mode, (8, 6), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 10, 200, 30])
    image.save(root / "train" / "a" / file, **({"lossless": True} if file.endswith("webp") else {}))
    (found,) = image_folder("modes", root).train.images(np.array([0]))
    assert found.shape == (3, 6, 8) and found.dtype == torch.uint8
    assert torch.allclose(found[:, 2, 3].float(), torch.tensor(expected).float(), atol=2)


def saved(path: Path, image: Image.Image, **options: object) -> torch.Tensor:
    """What an image folder makes of an image file."""
    root = write_folder(path, ["a"], per_class=1)
    (root / "train" / "a" / "0.png").unlink()
    image.save(root / "train" / "a" / str(options.pop("file")), **options)
    (found,) = image_folder("one", root).train.images(np.array([0]))
    return found


@pytest.mark.parametrize("file", ["16 bit.png", "16 bit.tif"])
def test_of_16_bits_the_upper_8_are_taken(tmp_path: Path, file: str) -> None:
    wide = np.array([[0, 255, 256, 0x1234], [0x7FFF, 0x8000, 0xFEFF, 0xFFFF]], dtype=np.uint16)
    found = saved(tmp_path, Image.fromarray(wide), file=file)
    assert found.tolist() == [[[0, 0, 1, 0x12], [0x7F, 0x80, 0xFE, 0xFF]]] * 3


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70_000)])
def test_values_without_a_known_range_are_refused(tmp_path: Path, mode: str, value: float) -> None:
    with pytest.raises(ConfigError, match=r"deep\.tif: cannot be read as an image: (floating-point|values beyond)"):
        saved(tmp_path, Image.new(mode, (4, 4), value), file="deep.tif")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_values_that_the_upper_8_bits_would_lose_are_refused(tmp_path: Path, kind: type) -> None:
    """8 bits in a file of 16 or 32 would be black."""
    assert saved(tmp_path / "black", Image.fromarray(np.zeros((4, 4), kind)), file="black.tif").max() == 0
    with pytest.raises(ConfigError, match=r"dark\.tif: .* values of at most 200.* expected 16 bits, or a file of 8"):
        saved(tmp_path / "dark", Image.fromarray(np.full((4, 4), 200, kind)), file="dark.tif")


@pytest.mark.parametrize(("bits", "warned"), [(10, True), (12, True), (14, True), (15, False), (16, False)])
def test_values_that_take_few_of_16_bits_are_told(tmp_path: Path, bits: int, warned: bool) -> None:
    """A camera's 12 bits in a file of 16 are nearly black."""
    ramp = Image.fromarray(np.linspace(0, 2**bits - 1, 16).astype(np.uint16).reshape(4, 4))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert saved(tmp_path, ramp, file="ramp.png").max() == (2**bits - 1) >> 8
    told = [str(each.message) for each in seen]
    assert (
        any(f"take {bits} bits" in text and f"brighter than {(2**bits - 1) >> 8} of 255" in text for text in told)
        == warned
    )


def test_a_palettes_transparency_is_dropped(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 10, 200, 30])
    image.putpixel((1, 0), 1)
    found = saved(tmp_path, image, file="a.png", transparency=bytes([0, 100]))
    assert found.tolist() == [[[9, 10]], [[8, 200]], [[7, 30]]]


@pytest.mark.parametrize("file", ["moving.webp", "moving.png", "moving.tiff"])
def test_of_an_animation_the_first_frame_counts(tmp_path: Path, file: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    lossless = {"lossless": True} if file.endswith("webp") else {}
    found = saved(tmp_path, frames[0], file=file, save_all=True, append_images=frames[1:], **lossless)
    assert found[:, 2, 3].tolist() == [255, 0, 0]


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ["a"], per_class=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(root / "test" / "a" / "0.jpg", exif=exif)
    (found,) = image_folder("turned", root).test.images(np.array([0]))
    assert found.shape == (3, 6, 8)


@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes | str) -> None:
    root = write_folder(tmp_path, ["a b"])
    path = root / "train" / "a b" / "1.png"
    whole = io.BytesIO()
    Image.fromarray(random_pixels(64, 64).permute(1, 2, 0).numpy()).save(whole, "png")
    path.write_bytes(whole.getvalue()[:5000] if isinstance(content, str) else content)
    dataset = image_folder("broken", root)
    with pytest.raises(ConfigError, match=r"1\.png: cannot be read as an image") as caught:
        dataset.train.images(np.array([0, 1]))
    assert str(path) in str(caught.value)


def test_all_problems_of_a_folder_are_told_at_once(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ["both", "empty"])
    (root / "train" / "only train").mkdir()
    (root / "test" / "only test").mkdir()
    for file in (root / "test" / "empty").iterdir():
        file.unlink()
    with pytest.raises(ConfigError) as caught:
        image_folder("mixed", root, classes=5)
    message = str(caught.value)
    for expected in (
        f"{root / 'test' / 'only train'}: missing",
        f"{root / 'train' / 'only test'}: missing",
        f"{root / 'test' / 'empty'}: no images",
        f"{root / 'train' / 'only train'}: no images",
        f"{root / 'train'}: 3 classes, expected 5",
        f"{root / 'test'}: 3 classes, expected 5",
    ):
        assert expected in message
    assert "both" not in message


def test_a_folder_without_parts_or_classes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        image_folder("nothing", tmp_path / "nowhere")
    assert all(f"{tmp_path / 'nowhere' / part}: no such folder" in str(caught.value) for part in ("train", "test"))
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(ConfigError, match="0 classes, expected at least one"):
        image_folder("nothing", tmp_path)


def test_a_wrong_layout_tells_what_was_found(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "birds", ["owl", "wren"])
    (root / "train" / "owl" / "0.png").rename(root / "train" / "loose.png")
    (root / "train" / "deep" / "inner").mkdir(parents=True)
    (root / "test" / "deep").mkdir()
    (root / "train" / "owl" / "1.png").rename(root / "train" / "deep" / "inner" / "1.png")
    (root / "train" / "owl" / "notes.txt").write_text("")
    (root / "test" / "deep" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(ConfigError) as caught:
        load_dataset("folder:birds", tmp_path)
    title, *problems = str(caught.value).splitlines()
    assert f"{root}/{{train,test}}/<class>/<image>" in title
    assert [line.strip() for line in problems] == [
        f"{root / 'train'}: 1 images are in it instead of in a class folder, such as loose.png",
        f"{root / 'train' / 'deep'}: no images; they are one folder too deep, in {root / 'train' / 'deep' / 'inner'}",
        f"{root / 'train' / 'owl'}: no images; it holds 1 x .txt",
        f"{root / 'test' / 'deep' / 'gone.png'}: no file, or a link that leads nowhere",
    ]


@pytest.mark.parametrize("place", ["train/owl/more", "train/owl/more/still"])
def test_images_below_a_class_that_has_some_are_told(tmp_path: Path, place: str) -> None:
    root = write_folder(tmp_path, ["owl", "wren"])
    (root / place).mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (8, 8)).save(root / place / f"x{number}.png")
    with pytest.raises(ConfigError) as caught:
        image_folder("deep", root)
    assert str(caught.value).splitlines()[1:] == [
        f"  {root / 'train' / 'owl'}: 5 images lie in folders below it and would be left out, {root / place / 'x0.png'} for one"
    ]


@pytest.mark.parametrize("name", ["a.gif", "a.JFIF", "a.avif", "a.heic"])
@pytest.mark.parametrize("place", ["train", "test/wren"])
def test_files_of_unknown_kinds_are_told_and_notes_are_not(tmp_path: Path, name: str, place: str) -> None:
    root = write_folder(tmp_path, ["owl", "wren"])
    for beside in ("Thumbs.db", "labels.csv", "README", "desktop.ini", "notes.txt"):
        (root / place / beside).write_text("")
    assert len(image_folder("birds", root).train.labels) == 4
    (root / place / name).write_bytes(b"GIF89a")
    with pytest.raises(
        ConfigError, match=rf"{place}: 1 files would be left out: 1 x \{Path(name).suffix.lower()}; images are \.bmp"
    ):
        image_folder("birds", root)


def test_a_part_in_another_place_is_pointed_at(tmp_path: Path) -> None:
    write_folder(tmp_path / "set" / "inner", ["a"])
    (tmp_path / "set" / "val").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_dataset("folder:set", tmp_path)
    for part in ("train", "test"):
        assert f"{part}: no such folder; it is one folder too deep, in {tmp_path / 'set' / 'inner'}" in str(
            caught.value
        )
    (tmp_path / "set" / "inner").rename(tmp_path / "other")
    with pytest.raises(ConfigError, match="test: no such folder; found there: val"):
        load_dataset("folder:set", tmp_path)


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    real = write_folder(tmp_path / "real", ["a", "b"])
    linked = tmp_path / "linked"
    (linked / "train").mkdir(parents=True)
    (linked / "test").symlink_to(real / "test")
    (linked / "train" / "a").symlink_to(real / "train" / "a")
    (linked / "train" / "b").mkdir()
    (linked / "train" / "b" / "x.png").symlink_to(real / "train" / "b" / "1.png")
    dataset = load_dataset("folder:linked", tmp_path)
    assert dataset.train.labels.tolist() == [0, 0, 1] and dataset.test.labels.tolist() == [0, 0, 1, 1]
    assert dataset.train.images(np.array([2]))[0].shape == (3, 10, 13)


@pytest.mark.parametrize("copy", ["link to a folder", "link to a part", "link to a file", "hard link"])
def test_a_file_in_both_parts_is_told(tmp_path: Path, copy: str) -> None:
    """What is trained on is no test."""
    root = write_folder(tmp_path / "birds", ["a", "b"])
    train, test = root / "train" / "b", root / "test" / "b"
    for file in test.iterdir():
        file.unlink()
    if copy == "link to a file":
        (test / "x.png").symlink_to(train / "1.png")
    elif copy == "hard link":
        (test / "x.png").hardlink_to(train / "1.png")
    else:
        test.rmdir()
        test.symlink_to(train)
    if copy == "link to a part":
        shutil.rmtree(root / "test")
        (root / "test").symlink_to("train")
    with pytest.raises(ConfigError, match=r"images are there twice, train/.* the same file as test/"):
        image_folder("birds", root)


def test_a_file_in_two_classes_is_told_and_twice_in_one_is_not(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "birds", ["a", "b"])
    (root / "train" / "a" / "again.png").symlink_to("0.png")
    assert len(image_folder("birds", root).train.labels) == 5
    (root / "train" / "a" / "other.png").symlink_to("../b/0.png")
    with pytest.raises(
        ConfigError, match=r"1 images are there twice, train/a/other.png for one, the same file as train/b/0.png"
    ):
        image_folder("birds", root)


@pytest.mark.parametrize("names", [("\u00e9", "e\u0301"), ("owl", "owl ")])
def test_names_that_look_alike_are_told(tmp_path: Path, names: tuple[str, str]) -> None:
    """As a computer that spells accents in another way makes them of one class."""
    root = write_folder(tmp_path / "birds", ["a", names[0]])
    (root / "test" / names[0]).rename(root / "test" / names[1])
    with pytest.raises(ConfigError) as caught:
        image_folder("birds", root)
    assert f"look alike: {', '.join(map(ascii, sorted(names)))}" in str(caught.value)


def test_a_class_that_results_could_not_be_written_under_is_told_before_any_work(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "birds", ["a", "b"])
    for part in ("train", "test"):
        (root / part / "b").rename(root / part / os.fsdecode(b"caf\xe9"))
    with pytest.raises(ConfigError, match=r"name of a class is not UTF-8: b'caf\\xe9'"):
        image_folder("birds", root)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/../../x", "/etc", "a//b", "a/", "./a", "~/a", "a\\..\\b", "a\0b"]
)
def test_a_name_cannot_leave_the_data_folder(tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match="expected the name of a folder below data_dir"):
        datasets.get(f"{kind}:{name}")


def test_data_sets_by_config_are_known_before_they_are_opened(tmp_path: Path) -> None:
    for name, lacking in (("folder:my/birds", ["my/birds/train", "my/birds/test"]), ("parquet:my/birds", ["my/birds"])):
        info = datasets.get(name)
        assert (info.name, info.classes, info.transform, info.image_size) == (name, None, "timm", 224)
        assert info.missing(tmp_path) == [tmp_path / path for path in lacking]
        with pytest.raises(ConfigError, match=rf"data set '{name}' is not here: .*<data_dir>/my/birds/"):
            load_dataset(name, tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'folder:NAME'"):
        datasets.get("foldr:birds")


@pytest.mark.parametrize(("name", "classes"), FOLDER_SETS.items())
def test_the_benchmarks_folders_open_by_name(tmp_path: Path, name: str, classes: int) -> None:
    write_folder(tmp_path / name, [f"{i:03d}" for i in range(classes)], per_class=1)
    assert datasets.get(name).missing(tmp_path) == []
    dataset = load_dataset(name, tmp_path)
    assert len(dataset.class_names) == datasets.get(name).classes == classes
    assert (datasets.get(name).transform, datasets.get(name).image_size) == ("timm", 224)


# Missing data


@pytest.mark.parametrize("name", [*FOLDER_SETS, "cifar100"])
def test_missing_data_is_told_with_paths_and_source(tmp_path: Path, name: str) -> None:
    folder = "cifar-100-python" if name == "cifar100" else name
    for data_dir, root in ((tmp_path, tmp_path), (None, Path("<data_dir>"))):
        absent = datasets.get(name).missing(data_dir)
        assert root / folder / "train" in absent and root / folder / "test" in absent
        with pytest.raises(ConfigError) as caught:
            load_dataset(name, data_dir)
        assert str(root / folder / "train") in str(caught.value)
        assert "https://" in str(caught.value) and "md5" in str(caught.value)
        with pytest.raises(ConfigError):
            datasets.get(name).load(data_dir)


def test_an_unknown_data_set_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cifar100'"):
        load_dataset("cifar10")


@pytest.mark.slow
def test_importing_the_package_stays_cheap() -> None:
    code = "import sys, zeroflow.data; print([m for m in ('torchvision', 'PIL', 'timm', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
