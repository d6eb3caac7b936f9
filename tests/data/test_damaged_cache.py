"""Decoded images that a disk, or a program, has changed: never another pixel in a result."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import count_decoding, opened, write_birds

from zeroflow.data import ImageDataset
from zeroflow.data import decoded as decoded_images
from zeroflow.data.dataset import Samples
from zeroflow.data.decoded import DecodedSamples

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_birds(tmp_path / "data")


def kept(samples: Samples) -> Path:
    """Where their decoded images are."""
    assert isinstance(samples, DecodedSamples)
    return decoded_images.cache_folder() / "decoded" / samples.identity()


def test_a_damaged_cache_is_made_anew(data_dir: Path, empty_cache: Path) -> None:
    opened(data_dir)
    for pixels in (empty_cache / "decoded").glob("*/pixels"):
        os.truncate(pixels, 100)
    dataset = opened(data_dir)
    assert isinstance(dataset.train, DecodedSamples)
    assert torch.equal(
        dataset.train.images(np.array([11]))[0], opened(data_dir, cache_bytes=0).train.images(np.array([11]))[0]
    )


PIXELS = ["a bit", "every other byte", "a lost page"]
PLACES = ["shifted places", "turned places", "places of another order", "no places"]


def damage(folder: Path, what: str) -> None:
    """Change a cache as a disk, or a program, may; every size stays."""
    content, places = bytearray((folder / "pixels").read_bytes()), np.load(folder / "places.npy")
    if what == "a bit":
        content[int(places[3, 0]) + 100] ^= 1
    elif what == "every other byte":
        content[::2] = bytes(value ^ 0x80 for value in content[::2])
    elif what == "a lost page":
        content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    elif what == "shifted places":
        places[:-1, 0] += 3
    elif what == "turned places":
        places[:, [2, 3]] = places[:, [3, 2]]
    elif what == "places of another order":
        places[:-1] = places[-2::-1].copy()
    elif what == "no places":
        (folder / "places.npy").write_bytes(b"")
    with (folder / "pixels").open("r+b") as file:  # in place: processes that have it open see it
        file.write(content)
    if what not in (*PIXELS, "no places"):
        np.save(folder / "places.npy", places)


def wrong(dataset: ImageDataset, expected: ImageDataset) -> list[int]:
    """The training images that are not as they are in their files, whether in values, shape or memory order."""
    everything = np.arange(len(expected.train.labels))
    pairs = zip(dataset.train.images(everything), expected.train.images(everything), strict=True)
    return [i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b) or a.stride() != b.stride()]


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("what", PIXELS)
def test_damaged_pixels_are_decoded_anew(
    data_dir: Path, monkeypatch, empty_cache: Path, what: str, opened_before: bool
) -> None:
    dataset, expected = opened(data_dir), opened(data_dir, cache_bytes=0)
    damage(kept(dataset.train), what)
    dataset = dataset if opened_before else opened(data_dir)
    with pytest.warns(UserWarning, match=f"{kept(dataset.train)}: not as it was written") as told:
        assert wrong(dataset, expected) == [] == wrong(dataset, expected)
    assert len(told) == 1, "one sentence, however many images"
    again, names = opened(data_dir), count_decoding(monkeypatch)
    assert isinstance(again.train, DecodedSamples)
    again.train.images(np.arange(12))
    assert names == [], "what is damaged is replaced when it is opened"


def test_of_damaged_pixels_only_the_images_hit_are_decoded(data_dir: Path, monkeypatch) -> None:
    dataset = opened(data_dir)
    damage(kept(dataset.train), "a bit")
    names, owl = count_decoding(monkeypatch), data_dir / "birds" / "train" / "owl"
    dataset.train.images(np.array([0, 1, 2, 4]))
    assert names == []
    with pytest.warns(UserWarning, match="not as it was written"):
        dataset.train.images(np.array([4, 3]))
    assert names == [str(owl / "3 é.JPG")]


@pytest.mark.parametrize("what", [*PLACES, "other images", "an older layout"])
def test_places_that_are_not_as_they_were_written_are_not_used(data_dir: Path, monkeypatch, what: str) -> None:
    train = opened(data_dir).train
    if what == "an older layout":
        (kept(train) / "checksum").unlink()
        np.save(kept(train) / "places.npy", np.load(kept(train) / "places.npy")[:, :4])
    elif what == "other images":  # as many, as large, with checksums of their own
        (data_dir / "birds" / "train" / "owl" / "1 é.JPG").touch()
        other = opened(data_dir).train
        assert kept(other) != kept(train)
        for path in kept(train).iterdir():
            (kept(other) / path.name).write_bytes(path.read_bytes())
    else:
        damage(kept(train), what)
    expected, names = opened(data_dir, cache_bytes=0), count_decoding(monkeypatch)
    again = opened(data_dir)
    assert len(set(names)) == 12, "the training images are decoded anew"
    assert isinstance(again.train, DecodedSamples) and wrong(again, expected) == []
    names.clear()
    opened(data_dir)
    assert names == []


def test_what_another_version_has_decoded_is_not_used(data_dir: Path, monkeypatch, empty_cache: Path) -> None:
    opened(data_dir)
    monkeypatch.setattr(decoded_images, "VERSION", decoded_images.VERSION - 1)
    names = count_decoding(monkeypatch)
    opened(data_dir)
    assert len(set(names)) == 21 and len(list((empty_cache / "decoded").iterdir())) == 4


def test_a_damaged_cache_makes_room_for_the_new_one(data_dir: Path) -> None:
    train = opened(data_dir).train
    damage(kept(train), "shifted places")
    whole = sum(path.stat().st_size for path in kept(train).parent.glob("*/pixels"))
    assert isinstance(opened(data_dir, cache_bytes=whole + 10_000).train, DecodedSamples)


def test_a_torn_note_of_what_was_checked_is_no_note(data_dir: Path, monkeypatch, empty_cache: Path) -> None:
    opened(data_dir, cache_bytes=0)
    for stamp in (empty_cache / "verified").glob("*[!k]"):
        stamp.write_text("")
    names = count_decoding(monkeypatch)
    assert len(opened(data_dir, cache_bytes=0).train.labels) == 12 and len(set(names)) == 21


@pytest.mark.slow
def test_damaged_pixels_reach_neither_a_result_nor_kept_features(data_dir: Path, empty_cache: Path) -> None:
    from zeroflow import Placement, TrialConfig, run_trial

    settings = {"dataset": "folder:birds", "transform": "plain", "tasks": 3, "method": "simplecil"}
    config = TrialConfig.from_dict(settings)
    expected = run_trial(config, Placement(str(data_dir), cache_bytes=0))
    for samples in (opened(data_dir).train, opened(data_dir).test):
        damage(kept(samples), "every other byte")
    with pytest.warns(UserWarning, match="not as it was written"):
        first = run_trial(config, Placement(str(data_dir)))
    assert list(empty_cache.glob("features/*/*.safetensors"))
    for found in (first, run_trial(config, Placement(str(data_dir)))):
        np.testing.assert_array_equal(found.accuracy_matrix, expected.accuracy_matrix)
        np.testing.assert_array_equal(found.confusion[-1], expected.confusion[-1])
