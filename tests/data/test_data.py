"""Data sets as they lie on disk, transforms, and the class-incremental stream made from them."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_cifar
from PIL import Image
from torchvision.transforms import v2

from zeroflow.data import (
    ArraySamples,
    ImageDataset,
    Scenario,
    class_incremental,
    class_order,
    datasets,
    even_increments,
    image_folder,
    load_dataset,
    transforms,
)
from zeroflow.data import cifar as cifar_files
from zeroflow.data.quickdraw import pretraining_classes, stream_classes
from zeroflow.data.transforms import crop_box
from zeroflow.errors import ConfigError

FOLDER_SETS = {"cub": 200, "imagenet-a": 200, "omnibenchmark": 300}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=seeded(seed))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def drawings() -> ImageDataset:
    return load_dataset("quickdraw100")


@pytest.fixture(scope="module")
def stream(drawings: ImageDataset) -> Scenario:
    return class_incremental(drawings, even_increments(100, 10), transforms.get("plain"), 28)


# The embedded set


def test_quickdraw_has_100_classes_of_80_and_20(drawings: ImageDataset) -> None:
    assert len(drawings.class_names) == len(set(drawings.class_names)) == 100
    assert np.array_equal(np.bincount(drawings.train.labels), np.full(100, 80))
    assert np.array_equal(np.bincount(drawings.test.labels), np.full(100, 20))


def test_quickdraw_trains_on_the_first_80_and_tests_on_the_last_20(drawings: ImageDataset) -> None:
    with np.load(Path(cifar_files.__file__).parent / "embedded" / "quickdraw100.npz") as stored:
        images, names = torch.from_numpy(stored["images"]), stored["names"]
    assert drawings.class_names == tuple(names)
    for label in (0, 57, 99):
        train = drawings.train.images(np.flatnonzero(drawings.train.labels == label))
        test = drawings.test.images(np.flatnonzero(drawings.test.labels == label))
        assert torch.equal(train[:, 0], images[label, :80])
        assert torch.equal(test[:, 0], images[label, 80:])


def test_stream_and_pretraining_share_no_class(drawings: ImageDataset) -> None:
    chosen = np.random.RandomState(1993).permutation(345)[:100]
    assert set(stream_classes()) == set(chosen)
    assert not set(stream_classes()) & set(pretraining_classes())
    assert len(stream_classes()) + len(pretraining_classes()) == 345
    # The chosen classes keep the order of the list of 345, which is sorted by file name.
    files = [f"{name}.ndjson.gz" for name in drawings.class_names]
    assert files == sorted(files)


# Class order and scenario


@pytest.mark.parametrize(
    ("classes", "first"),
    [(100, [68, 56, 78, 8, 23]), (200, [168, 136, 51, 9, 183]), (300, [169, 221, 146, 296, 92])],
)
def test_class_order_is_the_fields(classes: int, first: list[int]) -> None:
    assert class_order(classes)[:5].tolist() == first
    assert sorted(class_order(classes)) == list(range(classes))


def test_tasks_partition_the_classes(stream: Scenario, drawings: ImageDataset) -> None:
    assert [label for task in stream.tasks for label in task.classes] == list(range(100))
    assert stream.class_names == tuple(drawings.class_names[own] for own in class_order(100))
    assert sum(len(task.train) for task in stream.tasks) == 8000
    assert sum(len(task.test) for task in stream.tasks) == 2000


def test_samples_come_by_new_label_in_file_order(stream: Scenario, drawings: ImageDataset) -> None:
    task = stream.tasks[3]
    assert torch.equal(task.train.labels, torch.arange(30, 40).repeat_interleave(80))
    expected = np.concatenate([np.flatnonzero(drawings.train.labels == class_order(100)[new]) for new in task.classes])
    assert np.array_equal(task.train.indices, expected)


def test_test_labels_name_the_class_that_is_shown(stream: Scenario, drawings: ImageDataset) -> None:
    for task in stream.tasks:
        own = drawings.test.labels[task.test.indices]
        assert np.array_equal(stream.order[task.test.labels.numpy()], own)
        images, labels = next(task.test.plain_batches(25))
        assert images.shape == (25, 3, 28, 28) and torch.equal(labels, task.test.labels[:25])
        assert torch.equal(images[:, 0] * 255, drawings.test.images(task.test.indices[:25])[:, 0].float())


def test_validation_is_held_out_of_training_and_is_no_test_data(stream: Scenario, drawings: ImageDataset) -> None:
    held = class_incremental(drawings, even_increments(100, 10), transforms.get("plain"), 28, validation=0.1)
    for task, whole in zip(held.tasks, stream.tasks, strict=True):
        assert task.test.samples is drawings.train and task.test.samples is not drawings.test
        assert not set(task.train.indices) & set(task.test.indices)
        assert set(task.train.indices) | set(task.test.indices) == set(whole.train.indices)
        assert np.array_equal(np.bincount(task.test.labels)[task.classes.start :], np.full(10, 8))


def test_of_a_single_sample_none_can_be_held_out() -> None:
    """Without those of a class, the accuracy would be that of the others."""
    some = ArraySamples(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), np.array([0, 1, 1]))
    pets = ImageDataset("pets", ("cat", "dog"), some, some)
    with pytest.raises(
        ConfigError, match=r"validation=0.5: data set 'pets': .* two training images .* 1 have one, such as: cat$"
    ):
        class_incremental(pets, [1, 1], transforms.get("plain"), 4, validation=0.5)


@pytest.mark.parametrize(("tasks", "nearest"), [(9, 10), (3, 2), (0, 1), (-4, 1), (1000, 100)])
def test_uneven_tasks_name_the_nearest_number(tasks: int, nearest: int) -> None:
    with pytest.raises(ConfigError, match=rf"tasks={tasks}: 100 classes .* nearest: {nearest}$"):
        even_increments(100, tasks)


@pytest.mark.parametrize(
    ("classes", "tasks", "base", "expected"),
    [
        (100, 6, 50, [50, 10, 10, 10, 10, 10]),
        (100, 2, 99, [99, 1]),
        (20, 3, 2, [2, 9, 9]),
        (20, 4, None, [5, 5, 5, 5]),
        (20, 1, 20, [20]),
    ],
)
def test_a_base_task_and_equal_ones(classes: int, tasks: int, base: int | None, expected: list[int]) -> None:
    assert even_increments(classes, tasks, base) == expected


@pytest.mark.parametrize(
    ("tasks", "base", "message"),
    [
        (4, 50, "tasks=4: the 50 classes after base_classes=50 do not divide into 3 equal tasks; nearest: 3"),
        (12, 50, "do not divide into 11 equal tasks; nearest: 11"),
        (90, 60, "the 40 classes after base_classes=60 .* nearest: 41"),
        (3, 100, "base_classes=100: expected 1..99 of 100 classes"),
        (1, 50, "base_classes=50: the only task has all 100 classes"),
    ],
)
def test_a_base_task_that_does_not_fit_is_refused(tasks: int, base: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        even_increments(100, tasks, base)


def test_unequal_tasks_partition_the_classes_in_any_order(drawings: ImageDataset) -> None:
    order = np.random.default_rng(5).permutation(100)
    stream = class_incremental(drawings, [50, 1, 30, 19], transforms.get("plain"), 28, order=order)
    assert [task.classes for task in stream.tasks] == [range(50), range(50, 51), range(51, 81), range(81, 100)]
    for task in stream.tasks:
        assert (len(task.train), len(task.test)) == (80 * len(task.classes), 20 * len(task.classes))
        assert np.array_equal(drawings.train.labels[task.train.indices], np.repeat(order[list(task.classes)], 80))


def test_a_class_order_that_is_none_says_what_is_wrong_with_it(drawings: ImageDataset) -> None:
    with pytest.raises(ConfigError, match=r"each of 0..99 once; 3, 99: not there; 7: more than once; 100: no class$"):
        order = [*range(3), 7, *range(4, 99), 100]
        class_incremental(drawings, [100], transforms.get("plain"), 28, order=np.array(order))


@pytest.mark.parametrize("increments", [[50, 49], [100, 0], [], [110, -10]])
def test_increments_must_add_up(drawings: ImageDataset, increments: list[int]) -> None:
    with pytest.raises(ConfigError, match="add up to 100"):
        class_incremental(drawings, increments, transforms.get("plain"), 28)


def test_a_class_without_samples_is_named() -> None:
    some = ArraySamples(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), np.array([0, 1]))
    none = ArraySamples(some.pixels, np.array([0, 0]))
    with pytest.raises(ConfigError, match="no test images for dog"):
        class_incremental(ImageDataset("pets", ("cat", "dog"), some, none), [1, 1], transforms.get("plain"), 4)


# Transforms


IMAGES = {
    "a batch": torch.stack([photo(40, 30, seed=i) for i in range(6)]),
    "a grey batch": torch.stack([photo(28, 28, 1, seed=i) for i in range(6)]),
    "many sizes": [photo(20 + 9 * i, 60 - 7 * i, seed=i) for i in range(6)],
    "grey and colour": [photo(33, 33, 1), photo(40, 35), photo(1, 1), photo(1, 300), photo(300, 2), photo(8, 8, 1)],
}


@pytest.mark.parametrize("name", transforms.names())
@pytest.mark.parametrize("kind", IMAGES)
def test_a_batch_is_a_function_of_the_generator_alone(name: str, kind: str) -> None:
    transform, images = transforms.get(name), IMAGES[kind]
    before = [image.clone() for image in images]
    torch.manual_seed(1)
    first = transform.train(images, 32, seeded(7))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = transform.train(images, 32, seeded(7))
    assert torch.equal(first, second)
    assert first.shape == (6, 3, 32, 32) and first.dtype == torch.float32 and bool(first.isfinite().all())
    if name != "plain":
        assert not torch.equal(first, transform.train(images, 32, seeded(8)))
    plain = transform.test(images, 32)
    assert torch.equal(plain, transform.test(images, 32)) and plain.shape == first.shape
    assert all(torch.equal(a, b) for a, b in zip(images, before, strict=True)), "the stored images were written to"
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"


def test_training_batches_of_a_view_follow_the_generator(drawings: ImageDataset) -> None:
    view = class_incremental(drawings, [50, 50], transforms.get("drawings"), 28).tasks[0].train
    positions = np.array([5, 0, 321])
    images, labels = view.training_batch(positions, seeded(3))
    again, _ = view.training_batch(positions, seeded(3))
    other, _ = view.training_batch(positions, seeded(4))
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert torch.equal(labels, view.labels[positions])


@pytest.mark.parametrize(("height", "width"), [(300, 400), (32, 32), (500, 333), (224, 224)])
def test_photo_test_transforms_equal_torchvisions(height: int, width: int) -> None:
    image = photo(height, width)
    pipeline = [v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)]
    # PILOT's ToTensor divides by 255; v2.ToDtype multiplies by 1/255, which differs in the last bit.
    expected = v2.Compose(pipeline)(image) / 255
    for images in ([image], image[None]):
        assert torch.equal(transforms.get("pilot").test(images, 224)[0], expected)
        normalised = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(expected)
        assert torch.equal(transforms.get("timm").test(images, 224)[0], normalised)


def test_photo_test_transform_is_within_rounding_of_pillows() -> None:
    image = photo(300, 400)
    pilots = v2.Compose(
        [v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()]
    )
    expected = pilots(Image.fromarray(image.permute(1, 2, 0).numpy())).float()
    found = transforms.get("pilot").test([image], 224)[0] * 255
    assert float((found - expected).abs().max()) <= 1.01


def test_a_crop_does_not_depend_on_the_other_images() -> None:
    image, train = photo(50, 60), transforms.get("pilot").train
    beside_small = train([photo(5, 100), image], 32, seeded(0))[1]
    beside_large = train([photo(200, 200), image], 32, seeded(0))[1]
    assert torch.equal(beside_small, beside_large)


def test_crop_boxes_fit_and_follow_the_published_distribution() -> None:
    draws = torch.rand((4000, 10, 4), generator=seeded(0), dtype=torch.float64).tolist()
    boxes = np.array([crop_box(300, 400, tries, area=(0.05, 1.0), ratio=(3 / 4, 4 / 3)) for tries in draws])
    top, left, height, width = boxes.T
    assert top.min() >= 0 and left.min() >= 0 and (top + height).max() <= 300 and (left + width).max() <= 400
    crop, image = v2.RandomResizedCrop(224, scale=(0.05, 1.0)), photo(300, 400)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [crop.make_params([image]) for _ in range(4000)]
    for ours, key in ((top, "top"), (left, "left"), (height, "height"), (width, "width")):
        reference = np.array([box[key] for box in theirs])
        assert abs(ours.mean() - reference.mean()) < 5 * reference.std() * np.sqrt(2 / 4000)
        assert ours.std() == pytest.approx(reference.std(), rel=0.06)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (30, 40, (0, 0, 30, 40))],
)
def test_where_no_crop_fits_the_middle_is_taken(height: int, width: int, expected: tuple[int, ...]) -> None:
    assert crop_box(height, width, [], area=(0.05, 1.0), ratio=(3 / 4, 4 / 3)) == expected


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
    Image.fromarray(photo(64, 64).permute(1, 2, 0).numpy()).save(whole, "png")
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


@pytest.mark.slow
def test_shifts_are_the_same_drawings_rendered_in_another_way(drawings: ImageDataset) -> None:
    def pixels(name: str, part: str = "train") -> torch.Tensor:
        data = drawings if name == "plain" else load_dataset(f"quickdraw100-{name}")
        samples = getattr(data, part)
        assert data.class_names == drawings.class_names
        np.testing.assert_array_equal(samples.labels, getattr(drawings, part).labels)
        return samples.images(np.arange(0, len(samples.labels), 40)).int()

    plain = pixels("plain")
    assert (pixels("thin") <= plain).all() and (plain <= pixels("marker")).all()
    assert pixels("thin").sum() < 0.7 * plain.sum() and pixels("marker").sum() > 1.5 * plain.sum()
    torch.testing.assert_close(pixels("negative"), 255 - plain)
    # A pixel of a rotated image stands where a quarter turn about the middle takes it.
    turned = pixels("rotated")
    assert all(torch.equal(turned[..., 27 - x, y], plain[..., y, x]) for x, y in ((0, 0), (3, 9), (27, 5), (14, 20)))
    blocks = pixels("coarse").unflatten(-1, (14, 2)).unflatten(-3, (14, 2))
    assert (blocks.amax((-3, -1)) == blocks.amin((-3, -1))).all()
    means = plain.float().unflatten(-1, (14, 2)).unflatten(-3, (14, 2)).mean((-3, -1))
    assert (blocks.amax((-3, -1)) - means).abs().max() < 1


def test_noise_hits_a_tenth_of_the_pixels_and_differs_between_training_and_test(drawings: ImageDataset) -> None:
    noisy = load_dataset("quickdraw100-noise")
    empty = {}
    for part in ("train", "test"):
        chosen = np.arange(2000)
        before, after = (getattr(data, part).images(chosen) for data in (drawings, noisy))
        assert set(after[before != after].unique().tolist()) == {0, 255}
        blank = before == 0
        assert abs(float((after[blank] == 255).float().mean()) - 0.05) < 0.003
        assert abs(float((after[before == 255] == 0).float().mean()) - 0.05) < 0.003
        empty[part] = after == 255
    both = (empty["train"] & empty["test"]).float().mean()
    assert both < 0.06  # strokes apart, hits of one part would be hits of the other
