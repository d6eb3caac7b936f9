"""The embedded set and other renderings of it, transforms, and the class-incremental stream made from a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import random_pixels, seeded
from PIL import Image
from torchvision.transforms import v2

from zeroflow.data import (
    ArraySamples,
    ImageDataset,
    Scenario,
    class_incremental,
    class_order,
    even_increments,
    load_dataset,
    transforms,
)
from zeroflow.data import cifar as cifar_files
from zeroflow.data.quickdraw import pretraining_classes, stream_classes
from zeroflow.data.transforms import crop_box
from zeroflow.errors import ConfigError

pytestmark = pytest.mark.usefixtures("empty_cache")


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
    "a batch": torch.stack([random_pixels(40, 30, seed=i) for i in range(6)]),
    "a grey batch": torch.stack([random_pixels(28, 28, 1, seed=i) for i in range(6)]),
    "many sizes": [random_pixels(20 + 9 * i, 60 - 7 * i, seed=i) for i in range(6)],
    "grey and colour": [
        random_pixels(33, 33, 1),
        random_pixels(40, 35),
        random_pixels(1, 1),
        random_pixels(1, 300),
        random_pixels(300, 2),
        random_pixels(8, 8, 1),
    ],
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
    image = random_pixels(height, width)
    pipeline = [v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)]
    # PILOT's ToTensor divides by 255; v2.ToDtype multiplies by 1/255, which differs in the last bit.
    expected = v2.Compose(pipeline)(image) / 255
    for images in ([image], image[None]):
        assert torch.equal(transforms.get("pilot").test(images, 224)[0], expected)
        normalised = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(expected)
        assert torch.equal(transforms.get("timm").test(images, 224)[0], normalised)


def test_photo_test_transform_is_within_rounding_of_pillows() -> None:
    image = random_pixels(300, 400)
    pilots = v2.Compose(
        [v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()]
    )
    expected = pilots(Image.fromarray(image.permute(1, 2, 0).numpy())).float()
    found = transforms.get("pilot").test([image], 224)[0] * 255
    assert float((found - expected).abs().max()) <= 1.01


def test_a_crop_does_not_depend_on_the_other_images() -> None:
    image, train = random_pixels(50, 60), transforms.get("pilot").train
    beside_small = train([random_pixels(5, 100), image], 32, seeded(0))[1]
    beside_large = train([random_pixels(200, 200), image], 32, seeded(0))[1]
    assert torch.equal(beside_small, beside_large)


def test_crop_boxes_fit_and_follow_the_published_distribution() -> None:
    draws = torch.rand((4000, 10, 4), generator=seeded(0), dtype=torch.float64).tolist()
    boxes = np.array([crop_box(300, 400, tries, area=(0.05, 1.0), ratio=(3 / 4, 4 / 3)) for tries in draws])
    top, left, height, width = boxes.T
    assert top.min() >= 0 and left.min() >= 0 and (top + height).max() <= 300 and (left + width).max() <= 400
    crop, image = v2.RandomResizedCrop(224, scale=(0.05, 1.0)), random_pixels(300, 400)
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


# Other renderings


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
