"""Image files are checked once and kept decoded: never another bit in a result."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import count_decoding, opened, write_birds
from PIL import Image

from zeroflow.data import ImageDataset, Transform, class_incremental, prefetched, transforms
from zeroflow.data import decoded as decoded_images
from zeroflow.data.decoded import DecodedSamples
from zeroflow.data.folders import FileSamples
from zeroflow.errors import ConfigError

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_birds(tmp_path / "data")


def batches(dataset: ImageDataset, transform: str, threads: int) -> list[torch.Tensor]:
    """All that a trial would see of a data set: mini-batches for training and for evaluation."""
    stream = class_incremental(dataset, [2, 1], transforms.get(transform), 32, threads=threads)
    found = []
    for task in stream.tasks:
        order = np.random.RandomState(task.index).permutation(len(task.train))

        def maker(first: int, view=task.train, order=order) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
            return lambda: view.training_batch(order[first : first + 3], torch.Generator().manual_seed(first))

        found += prefetched((maker(first) for first in range(0, len(order), 3)), task.train.threads)
        found += [*task.test.plain_batches(2), *task.train.plain_batches(5)]
    return [tensor for pair in found for tensor in pair]


# Bits


@pytest.mark.parametrize("transform", ["pilot", "timm", "plain", "drawings"])
def test_bits_depend_neither_on_the_cache_nor_on_threads(data_dir: Path, transform: str) -> None:
    with_cache, without = opened(data_dir), opened(data_dir, cache_bytes=0)
    assert isinstance(with_cache.train, DecodedSamples) and isinstance(without.train, FileSamples)
    reference = batches(without, transform, 0)
    # Images one by one, as anybody would read them.
    own = without.train.images(np.array([0]))[0]
    with Image.open(next(iter(without.train.paths))) as image:
        assert np.array_equal(own.permute(1, 2, 0), np.array(image.convert("RGB")))
    for dataset in (with_cache, without):
        for threads in (0, 1, 2, 5):
            found = batches(dataset, transform, threads)
            assert len(found) == len(reference)
            for ours, expected in zip(found, reference, strict=True):
                assert torch.equal(ours, expected) and ours.is_contiguous() and expected.is_contiguous()


def test_memory_order_of_images_reaches_no_network(data_dir: Path) -> None:
    """A convolution's last bits depend on it."""

    def turned(images, size: int, generator: torch.Generator | None = None) -> torch.Tensor:
        return transforms.get("plain").test(images, size).to(memory_format=torch.channels_last)

    view = class_incremental(opened(data_dir), [3], Transform(turned, turned, ""), 8).tasks[0].train
    for images, _ in (view.training_batch(np.arange(2), torch.Generator()), *view.plain_batches(5)):
        assert images.is_contiguous()


@pytest.mark.slow
def test_results_of_a_trial_depend_neither_on_the_cache_nor_on_its_state(
    data_dir: Path, monkeypatch, empty_cache: Path
) -> None:
    from zeroflow import Placement, TrialConfig, run_trial

    config = TrialConfig.from_dict(
        {
            "dataset": "folder:birds",
            "transform": "pilot",
            "tasks": 3,
            "epochs": 2,
            "batch_size": 3,
            "optimizer": "zo-sgd",
        }
    )
    first = run_trial(config, Placement(str(data_dir)))
    assert list((empty_cache / "decoded").glob("*/pixels"))
    second = run_trial(config, Placement(str(data_dir)))
    monkeypatch.setattr(decoded_images, "_make_room", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(data_dir / "other cache"))
    third = run_trial(config, Placement(str(data_dir)))
    assert not list((data_dir / "other cache").glob("**/pixels"))
    for other in (second, third):
        assert [step.loss for step in other.steps] == [step.loss for step in first.steps]
        assert np.array_equal(other.accuracy_matrix, first.accuracy_matrix, equal_nan=True)


# The cache


@pytest.mark.slow
def test_every_image_is_decoded_once_and_then_served_to_all(data_dir: Path, monkeypatch, empty_cache: Path) -> None:
    names = count_decoding(monkeypatch)
    monkeypatch.setattr(decoded_images, "SAMPLED", 1)
    dataset = opened(data_dir)
    # Besides all images once, one of each part for the size of all.
    assert len(names) == 21 + 2 and len(set(names)) == 21
    sizes = [path.stat().st_size for path in sorted((empty_cache / "decoded").glob("*/pixels"))]
    expected = [
        sum(i.numel() for i in part.images(np.arange(len(part.labels)))) for part in (dataset.train, dataset.test)
    ]
    assert sorted(sizes) == sorted(expected)
    names.clear()
    again, nine = opened(data_dir), np.arange(9)
    assert all(torch.equal(a, b) for a, b in zip(again.test.images(nine), dataset.test.images(nine), strict=True))
    code = "import sys; from zeroflow.data import load_dataset as l; print(type(l('folder:birds', sys.argv[1]).train).__name__)"
    run = subprocess.run([sys.executable, "-c", code, data_dir], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "DecodedSamples"
    assert names == [] and again.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_writing_into_an_image_reaches_nobody_else(data_dir: Path) -> None:
    first = opened(data_dir)
    first.train.images(np.array([3]))[0].zero_()
    for samples in (first.train, opened(data_dir).train):
        assert int(samples.images(np.array([3]))[0].max()) > 0


@pytest.mark.parametrize("change", ["content", "size", "time", "neither", "name", "new", "gone"])
def test_changed_files_are_checked_and_decoded_anew(data_dir: Path, empty_cache: Path, change: str) -> None:
    opened(data_dir)
    path = data_dir / "birds" / "train" / "owl" / "1 é.JPG"
    if change == "content":
        path.write_bytes(path.read_bytes() + b" ")
    elif change == "size":
        times = path.stat()
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "neither":  # another image of as many bytes, with the old one's time
        times, other = path.stat(), io.BytesIO()
        Image.new("RGB", (5, 5), "red").save(other, "PNG")
        path.write_bytes(other.getvalue().ljust(times.st_size, b"\0"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "time":
        os.utime(path, (1, 1))
    elif change == "name":
        path.rename(path.with_name("9.jpg"))
    elif change == "new":
        Image.new("RGB", (9, 9)).save(path.with_name("9.png"))
    else:
        path.unlink()
    dataset = opened(data_dir)
    assert len(list((empty_cache / "decoded").iterdir())) == 3, "training images of before and of now, test images"
    expected = opened(data_dir, cache_bytes=0)
    everything = np.arange(len(expected.train.labels))
    pairs = zip(dataset.train.images(everything), expected.train.images(everything), strict=True)
    assert isinstance(dataset.train, DecodedSamples) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("limit", [0, 1, 80_000])
def test_where_the_limit_leaves_no_room_images_are_decoded_when_needed(
    data_dir: Path, monkeypatch, empty_cache: Path, limit: int
) -> None:
    dataset = opened(data_dir, cache_bytes=limit)  # 80,000 bytes hold the test part alone
    kept = [isinstance(part, DecodedSamples) for part in (dataset.train, dataset.test)]
    assert kept == [False, limit == 80_000]
    assert len(list(empty_cache.glob("decoded/*"))) == sum(kept)
    names = count_decoding(monkeypatch)
    opened(data_dir, cache_bytes=limit)
    assert names == [], "checked twice"


def test_decoded_images_that_nobody_uses_make_room(data_dir: Path, empty_cache: Path) -> None:
    opened(data_dir)
    size = sum(path.stat().st_size for path in (empty_cache / "decoded").glob("*/pixels"))
    before = set((empty_cache / "decoded").iterdir())
    (data_dir / "birds" / "train" / "owl" / "0 é.JPG").unlink()
    assert isinstance(opened(data_dir, cache_bytes=size + 10_000).train, FileSamples), "used a moment ago"
    for folder in before:
        os.utime(folder, (0, 0))
    dataset = opened(data_dir, cache_bytes=size + 10_000)
    assert isinstance(dataset.train, DecodedSamples) and isinstance(dataset.test, DecodedSamples)
    assert len(before & set((empty_cache / "decoded").iterdir())) == 1, (
        "the training images of before make room, no more"
    )


def test_a_cache_that_cannot_be_written_is_done_without(data_dir: Path, empty_cache: Path) -> None:
    empty_cache.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="images are checked again"):
        assert isinstance(opened(data_dir).train, FileSamples)


def test_a_full_disk_leaves_nothing_behind(data_dir: Path, monkeypatch, empty_cache: Path) -> None:
    def full(self, image) -> None:
        with self._guarded():
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded_images._Draft, "write", full)
    with pytest.warns(UserWarning, match="No space left on device: images are decoded whenever they are needed"):
        dataset = opened(data_dir)
    assert isinstance(dataset.train, FileSamples) and list((empty_cache / "decoded").iterdir()) == []
    assert len(list((empty_cache / "verified").glob("*[!k]"))) == 2


def test_what_a_killed_process_left_is_no_cache(data_dir: Path, empty_cache: Path) -> None:
    key = FileSamples.identity(opened(data_dir, cache_bytes=0).train)
    left = empty_cache / "decoded" / f".{key}"
    left.mkdir(parents=True)
    (left / "pixels").write_bytes(b"half of it")
    assert isinstance(opened(data_dir).train, DecodedSamples) and not left.exists()


@pytest.mark.slow
def test_processes_that_start_together_make_one_cache(data_dir: Path, empty_cache: Path) -> None:
    code = (
        "import sys, zeroflow.data.folders as f; real = f.read_image\n"
        "def counted(*a): print('decoded'); return real(*a)\n"
        "f.read_image = counted; f.datasets; import zeroflow.data.decoded as d; d.SAMPLED = 1\n"
        "from zeroflow.data import load_dataset\n"
        "print(type(load_dataset('folder:birds', sys.argv[1]).train).__name__)"
    )
    command = [sys.executable, "-c", code, str(data_dir)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [line for run in runs for line in run.communicate(timeout=60)[0].splitlines()]
    assert lines.count("DecodedSamples") == 2 and lines.count("decoded") == 21 + 2
    assert len(list((empty_cache / "decoded").iterdir())) == 2


# Checks


def test_all_unreadable_images_of_both_parts_are_told_before_training(data_dir: Path, empty_cache: Path) -> None:
    root = data_dir / "birds"
    cut, empty, text = (root / path for path in ("train/owl/0 é.JPG", "train/wren/3 é.JPG", "test/Ä b/1 é.JPG"))
    cut.write_bytes(cut.read_bytes()[:-300])
    empty.write_bytes(b"")
    text.write_text("a page that says 404")
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            opened(data_dir)
        lines = str(caught.value).splitlines()
        assert lines[0] == "data set 'folder:birds', train: images that cannot be read:"
        assert lines[3] == "data set 'folder:birds', test: images that cannot be read:"
        for line, path in zip([*lines[1:3], *lines[4:]], (cut, empty, text), strict=True):
            assert line.startswith(f"  {path}: cannot be read as an image: ")
        assert not list(empty_cache.glob("decoded/*")) and not list(empty_cache.glob("verified/*[!k]"))


def test_of_very_many_problems_some_are_shown_and_all_are_counted(data_dir: Path) -> None:
    for i in range(300):
        (data_dir / "birds" / "train" / "owl" / f"bad {i}.png").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        opened(data_dir)
    assert str(caught.value).splitlines()[-1] == "  and 100 more" and len(str(caught.value).splitlines()) == 202


def test_a_sweep_tells_the_problems_of_all_data_sets_before_it_starts(data_dir: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from zeroflow.cli import main

    (data_dir / "birds" / "test" / "owl" / "0 é.JPG").write_bytes(b"")
    (data_dir / "fish" / "train").mkdir(parents=True)
    settings = ["--set", "dataset=[folder:birds, folder:fish]", "--set", "method=simplecil", "--set", "tasks=3"]
    grid = tmp_path / "grid.yaml"
    grid.write_text("name: two\ngrid:\n  - {seed: [0]}\n")
    command = ["sweep", "--grid", str(grid), "--results", str(tmp_path / "out"), "--data-dir", str(data_dir), *settings]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2 and "ray" not in done.output
    assert f"{data_dir / 'birds' / 'test' / 'owl' / '0 é.JPG'}: cannot be read as an image" in done.output
    assert f"{data_dir / 'fish' / 'test'}: no such folder" in done.output
