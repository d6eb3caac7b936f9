"""CIFAR-100 as its published files have it."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import seeded, write_cifar

from zeroflow.data import class_incremental, even_increments, load_dataset, transforms
from zeroflow.errors import ConfigError

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_cifar_reads_torchvisions_files(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as warned:
        dataset = load_dataset("cifar100", write_cifar(tmp_path))
    told = sorted(str(warning.message).split(" (")[0] for warning in warned)
    folder = tmp_path / "cifar-100-python"
    assert told == [f"{folder / part}: not the published file" for part in ("meta", "test", "train")]
    assert dataset.class_names[99] == "class 99"
    assert dataset.train.labels[:3].tolist() == [0, 7, 14]
    pixels = np.random.RandomState(0).randint(0, 256, (200, 3072)).astype(np.uint8)
    images = dataset.train.images(np.array([4, 199]))
    assert isinstance(images, torch.Tensor) and images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), pixels[[4, 199]].reshape(2, 3, 32, 32))
    tasks = class_incremental(dataset, even_increments(100, 10), transforms.get("timm"), 224).tasks
    batch, labels = tasks[1].train.training_batch(np.arange(3), seeded(0))
    assert batch.shape == (3, 3, 224, 224) and labels.tolist() == [10, 10, 11]


@pytest.mark.filterwarnings("ignore:.*not the published file")
def test_cifar_reads_the_strings_of_python_2(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    # {'fine_label_names': [...]} with SHORT_BINSTRING, and an array whose bytes are a Python 2 string.
    names = b"".join(b"U" + bytes([len(name)]) + name for name in (b"class %d" % i for i in range(100)))
    (tmp_path / "cifar-100-python" / "meta").write_bytes(b"\x80\x02}U\x10fine_label_names](" + names + b"es.")
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + (6144).to_bytes(4, "little") + bytes(range(256)) * 24 + b"tb"
    )
    (tmp_path / "cifar-100-python" / "test").write_bytes(
        b"\x80\x02}(U\x04data" + array + b"U\x0bfine_labels](K\x05K\x63eu."
    )
    dataset = load_dataset("cifar100", tmp_path)
    assert dataset.class_names[7] == "class 7" and dataset.test.labels.tolist() == [5, 99]
    assert np.array_equal(dataset.test.images(np.array([0, 1])).flatten(), np.tile(np.arange(256), 24))


class Command:
    """A pickle of it runs a shell command when it is loaded carelessly."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:.*not the published file")
@pytest.mark.parametrize("part", ["train", "test", "meta"])
def test_a_pickle_that_runs_code_is_refused_and_does_nothing(tmp_path: Path, part: str) -> None:
    trace = tmp_path / "trace"
    evil = {"data": Command(f"touch '{trace}'"), "fine_labels": []}
    write_cifar(tmp_path, **{part: evil})
    with pytest.raises(ConfigError, match=rf"{part}: cannot be read .* asks for (posix|nt)\.system"):
        load_dataset("cifar100", tmp_path)
    assert not trace.exists()
    pickle.load(io.BytesIO((tmp_path / "cifar-100-python" / part).read_bytes()))
    assert trace.exists(), "the file was harmless: the test shows nothing"


@pytest.mark.filterwarnings("ignore:.*not the published file")
@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("train", {"data": np.zeros((2, 3072), np.float32), "fine_labels": [0, 1]}),
        ("train", {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0]}),
        ("test", {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 100]}),
        ("test", {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}),
        ("test", [1, 2, 3]),
        ("meta", {"fine_label_names": ["apple"]}),
    ],
)
def test_cifar_files_with_other_content_are_named(tmp_path: Path, part: str, content: object) -> None:
    with pytest.raises(ConfigError, match=f"cifar-100-python.{part}: expected"):
        load_dataset("cifar100", write_cifar(tmp_path, **{part: content}))


@pytest.mark.filterwarnings("ignore:.*not the published file")
def test_a_cut_off_cifar_file_is_named(tmp_path: Path) -> None:
    path = write_cifar(tmp_path) / "cifar-100-python" / "test"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"cifar-100-python.test: cannot be read"):
        load_dataset("cifar100", tmp_path)
