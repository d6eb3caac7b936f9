"""Image data sets in Parquet files, laid out as those of the Hugging Face hub."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import write_cifar
from PIL import Image

from zeroflow import Placement, TrialConfig, run_trial
from zeroflow.data import ImageDataset, class_incremental, load_dataset, transforms
from zeroflow.data.parquet import ParquetSamples, parquet_images
from zeroflow.errors import ConfigError

NAMES = ["owl", "Wren", "鸟"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def picture(red: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4 + red % 3), (red, 0, 7)).save(file, kind)
    return file.getvalue()


def features(labels: dict[str, Sequence[str]], image: str = "image") -> dict[bytes, bytes]:
    """The schema metadata that the ``datasets`` library writes."""
    described: dict[str, Any] = {image: {"_type": "Image"}}
    described |= {name: {"names": list(names), "_type": "ClassLabel"} for name, names in labels.items()}
    return {b"huggingface": json.dumps({"info": {"features": described}}).encode()}


def write(
    path: Path,
    reds: Sequence[int],
    labels: Any,
    *,
    image: str = "image",
    label: str = "label",
    metadata: dict[bytes, bytes] | None = None,
    rows: int = 2,
    plain: bool = False,
) -> None:
    """A file of one-coloured pictures, in row groups of ``rows``; ``plain``: the images as binary, not as a struct."""
    contents = [picture(red) for red in reds]
    images = (
        pa.array(contents)
        if plain
        else pa.array([{"bytes": c, "path": f"{path.name}-{i}.png"} for i, c in enumerate(contents)])
    )
    table = pa.table({image: images, label: labels}).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def write_both(
    root: Path,
    train: str = "data/train-00000-of-00001.parquet",
    test: str = "data/test-00000-of-00001.parquet",
    **options: Any,
) -> Path:
    options = {"metadata": features({"label": NAMES}), **options}
    write(root / train, [10, 11, 12, 13, 14], [0, 1, 2, 1, 0], **options)
    write(root / test, [20, 21, 22], [2, 1, 0], **options)
    return root


def reds(dataset: ImageDataset, part: str = "train") -> list[int]:
    samples = getattr(dataset, part)
    return [int(image[0, 0, 0]) for image in samples.images(np.arange(len(samples.labels)))]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train.parquet", "test.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("plain_text/train/0000.parquet", "plain_text/test/0000.parquet"),
        ("cifar_training.parquet", "cifar_eval.parquet"),
        ("data/train-00000-of-00001-a1b2c3.parquet", "data/validation-00000-of-00001.parquet"),
        ("train/part.parquet", "val/part.parquet"),
    ],
)
def test_layouts_of_the_hub_open_by_name(tmp_path: Path, train: str, test: str) -> None:
    write_both(tmp_path / "my" / "birds", train, test)
    dataset = load_dataset("parquet:my/birds", tmp_path)
    assert dataset.class_names == tuple(NAMES)
    assert dataset.train.labels.tolist() == [0, 1, 2, 1, 0] and dataset.test.labels.tolist() == [2, 1, 0]
    assert reds(dataset) == [10, 11, 12, 13, 14] and reds(dataset, "test") == [20, 21, 22]
    first, last = dataset.train.images(np.array([4, 0]))
    assert first.shape == (3, 4 + 14 % 3, 6) and last.shape == (3, 4 + 10 % 3, 6)
    assert first[:, 0, 0].tolist() == [14, 0, 7]


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_both(tmp_path)
    (tmp_path / "data" / "train-00000-of-00001.parquet").unlink()
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [3, 4, 5], [2, 2, 1], metadata=features({"label": NAMES}))
    write(
        tmp_path / "data" / "train-00000-of-00002.parquet",
        [0, 1, 2],
        [0, 1, 2],
        metadata=features({"label": NAMES}),
        rows=1,
    )
    dataset = parquet_images("shards", tmp_path)
    assert dataset.train.labels.tolist() == [0, 1, 2, 2, 2, 1]
    assert [int(i[0, 0, 0]) for i in dataset.train.images(np.array([5, 0, 3, 2]))] == [5, 0, 3, 2]


def test_a_test_split_is_preferred_to_validation(tmp_path: Path) -> None:
    write_both(tmp_path)
    write(
        tmp_path / "data" / "validation-00000-of-00001.parquet",
        [90, 91, 92],
        [0, 1, 2],
        metadata=features({"label": NAMES}),
    )
    assert reds(parquet_images("three", tmp_path), "test") == [20, 21, 22]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([[7, 0, 30, 7], [30, 7, 0]], ("0", "7", "30"), [1, 0, 2, 1]),
        ([["b", "Ä", "a b", "b"], ["Ä", "a b", "b"]], ("a b", "b", "Ä"), [1, 2, 0, 1]),
        (
            [pa.array(["y", "x", "y"]).dictionary_encode(), pa.array(["x", "y"]).dictionary_encode()],
            ("x", "y"),
            [1, 0, 1],
        ),
        ([pa.array([2, 1, 2], pa.uint8()), pa.array([1, 2], pa.uint8())], ("1", "2"), [1, 0, 1]),
    ],
)
@pytest.mark.parametrize("plain", [True, False])
def test_labels_without_names_are_their_sorted_values(
    tmp_path: Path, labels: list[Any], names: tuple[str, ...], numbers: list[int], plain: bool
) -> None:
    for part, values in zip(("train", "test"), labels, strict=True):
        write(tmp_path / f"{part}.parquet", range(len(values)), values, plain=plain, label="kind", image="photo")
    dataset = parquet_images("plain", tmp_path)
    assert dataset.class_names == names and dataset.train.labels.tolist() == numbers
    assert reds(dataset) == list(range(len(numbers)))


def test_of_several_label_columns_one_can_be_named(tmp_path: Path) -> None:
    metadata = features({"coarse": ["bird", "fish"], "fine": NAMES}, image="img")
    for part, fine in (("train", [2, 0, 1]), ("test", [0, 1, 2])):
        images = pa.array([{"bytes": picture(i), "path": None} for i in range(3)])
        table = pa.table({"id": [5, 6, 7], "img": images, "coarse": [0, 1, 0], "fine": fine})
        (tmp_path / "two").mkdir(exist_ok=True)
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "two" / f"{part}.parquet")
    with pytest.raises(
        ConfigError, match="several columns may be the labels: coarse, fine; name one: parquet:NAME#COLUMN"
    ):
        load_dataset("parquet:two", tmp_path)
    with pytest.raises(
        ConfigError, match="'parquet:two#': expected a column of labels behind '#', or none: parquet:two"
    ):
        TrialConfig.from_dict({"dataset": "parquet:two#"})
    fine = load_dataset("parquet:two#fine", tmp_path)
    assert fine.class_names == tuple(NAMES) and fine.train.labels.tolist() == [2, 0, 1]
    assert load_dataset("parquet:two#coarse", tmp_path).class_names == ("bird", "fish")
    assert load_dataset("parquet:two#id", tmp_path).class_names == ("5", "6", "7")
    with pytest.raises(ConfigError, match=r"train\.parquet: unknown column of labels 'fin'; did you mean 'fine'"):
        load_dataset("parquet:two#fin", tmp_path)


def problems(root: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parquet_images("broken", root)
    return [line.strip().replace(str(root) + "/", "") for line in str(caught.value).splitlines()[1:]]


def test_all_problems_of_the_files_are_told_at_once(tmp_path: Path) -> None:
    named = features({"label": NAMES})
    write(tmp_path / "data" / "train-00000-of-00003.parquet", [1], [0], metadata=named)
    (tmp_path / "data" / "train-00002-of-00003.parquet").write_bytes(b"PAR1 cut off")
    write(tmp_path / "data" / "test.parquet", [1], [0], metadata=named, image="none")
    pq.write_table(pa.table({"label": [1]}), tmp_path / "data" / "test.parquet")
    found = problems(tmp_path)
    assert found[0] == "data/train-00001-of-00003.parquet: no such file, though others of these 3 are there"
    assert found[1].startswith("data/train-00002-of-00003.parquet: cannot be read as a Parquet file: ")
    assert found[2:] == [
        "data/test.parquet: no column of images, which are binary, or a struct with bytes; its columns: label (int64)"
    ]


@pytest.mark.parametrize("ending", ["", "-abcdef0123456789"])
def test_a_missing_shard_is_told_whatever_follows_its_number(tmp_path: Path, ending: str) -> None:
    write_both(tmp_path, train=f"data/train-00000-of-00002{ending}.parquet")
    assert problems(tmp_path) == ["data/train-00001-of-00002.parquet: no such file, though others of these 2 are there"]
    write(
        tmp_path / f"data/train-00001-of-00002{ending[::-1]}.parquet".replace("9876543210fedcba-", "-9876543210fedcba"),
        [1],
        [1],
        metadata=features({"label": NAMES}),
    )
    assert len(parquet_images("whole", tmp_path).train.labels) == 6


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "train-00000-of-00001",
            "train-0000{}-of-00002",
            "data/train-00000-of-00002.parquet: of another number of shards than data/train-00000-of-00001.parquet",
        ),
        (
            "train-0000{}-of-00002-aaaa",
            "train-0000{}-of-00002-bbbb",
            "data/train-00000-of-00002-bbbb.parquet: has the shard number of data/train-00000-of-00002-aaaa.parquet",
        ),
        (
            "train-00000-of-00001",
            "train-0-of-1",
            "data/train-00000-of-00001.parquet: has the shard number of data/train-0-of-1.parquet",
        ),
    ],
)
def test_two_generations_of_shards_are_refused(tmp_path: Path, old: str, new: str, problem: str) -> None:
    """Their images are the same, so training images would be validation images too."""
    named = features({"label": NAMES})
    write(tmp_path / "data" / "test.parquet", [1, 2, 3], [0, 1, 2], metadata=named)
    for name in {pattern.format(i) for pattern in (old, new) for i in range(2)}:
        write(tmp_path / "data" / f"{name}.parquet", [1, 2, 3], [0, 1, 2], metadata=named)
    found = problems(tmp_path)
    assert found[0] == f"{problem}; expected one set of shards"
    assert all(line.endswith("expected one set of shards") for line in found)


def test_shards_of_several_prefixes_make_one_split(tmp_path: Path) -> None:
    named = features({"label": NAMES})
    for name in ("forest-train-0-of-2", "forest-train-1-of-2", "garden-train-0-of-1", "test"):
        write(tmp_path / f"{name}.parquet", [1, 2, 3], [0, 1, 2], metadata=named)
    assert len(parquet_images("two places", tmp_path).train.labels) == 9


@pytest.mark.parametrize(
    ("original", "copy", "problem"),
    [
        (
            "train",
            "train_extra-00000-of-00001",
            "a copy of data/train-00000-of-00001.parquet; expected every image once",
        ),
        (
            "train",
            "test-extra-00000-of-00001",
            "a copy of data/train-00000-of-00001.parquet; expected every image once",
        ),
        ("test", "test (1)", "beside data/test.parquet; expected one file or one set of shards"),
    ],
)
def test_a_second_copy_of_a_file_is_told(tmp_path: Path, original: str, copy: str, problem: str) -> None:
    write_both(tmp_path, test="data/test.parquet")
    files = {"train": "train-00000-of-00001", "test": "test"}
    shutil.copy(tmp_path / "data" / f"{files[original]}.parquet", tmp_path / "data" / f"{copy}.parquet")
    assert problems(tmp_path) == [f"data/{copy}.parquet: {problem}"]


def test_another_download_beside_a_split_is_told(tmp_path: Path) -> None:
    write_both(tmp_path, train="data/train.parquet")
    write(tmp_path / "data" / "train-backup.parquet", [1], [1], metadata=features({"label": NAMES}))
    assert problems(tmp_path) == [
        "data/train-backup.parquet: beside data/train.parquet; expected one file or one set of shards"
    ]


def test_a_file_of_no_known_split_is_told(tmp_path: Path) -> None:
    write_both(tmp_path)
    write(tmp_path / "data" / "extra-00000-of-00001.parquet", [1], [0])
    assert problems(tmp_path) == [
        "data/extra-00000-of-00001.parquet: of no known split; expected train, test or validation in its name or its folder's"
    ]


def test_missing_splits_and_ambiguous_folders_are_told(tmp_path: Path) -> None:
    write(tmp_path / "small" / "train.parquet", [1], [0])
    write(tmp_path / "large" / "train.parquet", [1], [0])
    write(tmp_path / ".cache" / "test.parquet", [1], [0])
    found = problems(tmp_path)
    places = f"{tmp_path / 'large'}, {tmp_path / 'small'}".replace(str(tmp_path) + "/", "")
    assert found[0].endswith(f": files of the train split in several folders: {places}; name one of them")
    assert found[1].endswith(": no Parquet files of a test split, as data/test-00000-of-00001.parquet; found: train")


def test_classes_that_do_not_match_are_told_with_their_names(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [1, 2], [0, 1], metadata=features({"label": NAMES}))
    write(tmp_path / "test.parquet", [1, 2], [2, 1], metadata=features({"label": NAMES}))
    assert [line.split(": ", 1)[1] for line in problems(tmp_path)] == [
        "class '鸟': no images",
        "class 'owl': no images",
    ]
    write(tmp_path / "test.parquet", [1, 2], [-1, None], metadata=features({"label": NAMES}))
    assert problems(tmp_path)[0].endswith(
        "2 rows without a class, row 0 of test.parquet for one (label=-1); "
        "expected labels 0 to 2 (-1 and null mean none)"
    )
    write(tmp_path / "test.parquet", [1, 2], [0, 1], metadata=features({"label": NAMES[::-1]}))
    assert "other class names than in" in problems(tmp_path)[0]
    write(tmp_path / "train.parquet", [1, 2], [0, 1])
    write(tmp_path / "test.parquet", [1, 2], ["a", "b"])
    assert "labels of another type than in" in problems(tmp_path)[0]


@pytest.mark.parametrize("named", [True, False])
def test_labels_of_another_column_in_the_test_split_are_refused(tmp_path: Path, named: bool) -> None:
    for part, column in (("train", "fine"), ("test", "coarse")):
        metadata = features({column: ["a", "b"]}) if named else None
        write(tmp_path / f"{part}.parquet", [1, 2], [0, 1], label=column, metadata=metadata)
    (found,) = problems(tmp_path)
    assert "test split: its labels are in column 'coarse', those of " in found
    assert found.endswith("train split in 'fine'; expected the same column")


def test_negative_labels_are_no_classes(tmp_path: Path) -> None:
    write(tmp_path / "train-0-of-2.parquet", [1, 2, 3], [0, 1, 1])
    write(tmp_path / "train-1-of-2.parquet", [1, 2, 3, 4, 5], [0, 1, 1, -1, -2])
    write(tmp_path / "test.parquet", [1, 2, 3], [0, 1, -1])
    where = "row {} of {}.parquet for one (label=-1); expected labels >= 0, or texts (-1 and null mean none)"
    first, second = problems(tmp_path)
    assert first.endswith("train split: 2 rows without a class, " + where.format(3, "train-1-of-2"))
    assert second.endswith("test split: 1 rows without a class, " + where.format(2, "test"))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["cat", "cat"], "names of classes look alike: 'cat', 'cat'; expected one name for a class"),
        (["cat", " cat"], "names of classes look alike: ' cat', 'cat'; expected one name for a class"),
        (["cat", ""], "a class without a name: ''"),
    ],
)
def test_names_of_the_metadata_that_are_hardly_names_are_told(tmp_path: Path, names: list[str], problem: str) -> None:
    for part in ("train", "test"):
        write(tmp_path / f"{part}.parquet", [1, 2], [0, 1], metadata=features({"label": names}))
    (found,) = problems(tmp_path)
    assert found.endswith(f"train split: {problem}")


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["owl", "owl ", "wren"], "look alike: 'owl', 'owl '"),
        (["\u00e9", "e\u0301", "wren"], r"look alike: 'e\u0301', '\xe9'"),
        (["", "owl", "wren"], "a class without a name: ''"),
    ],
)
def test_texts_that_are_hardly_classes_are_told(tmp_path: Path, labels: list[str], problem: str) -> None:
    for part in ("train", "test"):
        write(tmp_path / "birds" / f"{part}.parquet", [10, 11, 12], labels)
    with pytest.raises(ConfigError) as caught:
        load_dataset("parquet:birds", tmp_path)
    assert problem in str(caught.value)


def test_one_file_for_both_splits_is_told(tmp_path: Path) -> None:
    write(tmp_path / "birds" / "train.parquet", [10, 11], [0, 1])
    (tmp_path / "birds" / "test.parquet").symlink_to("train.parquet")
    with pytest.raises(ConfigError, match=r"test\.parquet: the same file as .*train\.parquet"):
        load_dataset("parquet:birds", tmp_path)


def test_images_that_cannot_be_read_are_all_told_with_their_rows(tmp_path: Path) -> None:
    root = write_both(tmp_path / "birds")
    contents = [picture(1), picture(2)[:50], None, b"no image", picture(5)]
    table = pa.table({"image": pa.array([{"bytes": c, "path": "x.png"} for c in contents]), "label": [0, 1, 2, 1, 0]})
    file = root / "data" / "train-00000-of-00001.parquet"
    pq.write_table(table.replace_schema_metadata(features({"label": NAMES})), file, row_group_size=2)
    with pytest.raises(ConfigError) as caught:
        load_dataset("parquet:birds", tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "data set 'parquet:birds', train: images that cannot be read:"
    starts = [f"  {file}: row {row} of row group {group}: " for row, group in ((1, 0), (0, 1), (1, 1))]
    assert len(lines) == 4 and all(line.startswith(start) for line, start in zip(lines[1:], starts, strict=True))
    assert "holds no image; a path to one elsewhere is not followed" in lines[2]
    assert lines[3].endswith("cannot be read as an image: of no known kind")


def test_a_row_group_is_read_once_and_only_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = parquet_images("lazy", write_both(tmp_path)).train
    assert isinstance(samples, ParquetSamples)
    read: list[tuple[int, list[str]]] = []
    real = pq.ParquetFile.read_row_group

    def counted(self: Any, number: int, columns: list[str]) -> Any:
        read.append((number, columns))
        return real(self, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for index in (4, 3, 2, 4):
        samples.images(np.array([index]))
    assert read == [(2, ["image"]), (1, ["image"])]
    samples.images(np.array([0, 1, 2, 3, 4]))
    assert [number for number, _ in read] == [2, 1, 0]


def test_row_groups_held_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zeroflow.data.parquet.CACHED_BYTES", 1)
    samples = parquet_images("bounded", write_both(tmp_path)).train
    assert [int(i[0, 0, 0]) for i in samples.images(np.array([4, 0, 2, 1, 3]))] == [14, 10, 12, 11, 13]
    assert isinstance(samples, ParquetSamples) and len(samples._cached) == 1


@pytest.mark.parametrize("kind", ["folder", "parquet", "cifar100"])
@pytest.mark.filterwarnings("ignore:.*not the published file")
def test_results_name_the_class_that_each_label_shows(tmp_path: Path, kind: str) -> None:
    """Of each kind of files: an image's red value is its class's own number."""
    names = [f"class {i}" for i in range(100)] if kind == "cifar100" else ["b", "C", "ä", "10"]
    if kind == "cifar100":
        tests = np.repeat(np.arange(100), 2)[::-1]
        pixels = np.repeat(tests.astype(np.uint8)[:, None], 3072, axis=1)
        part = {"data": pixels, "fine_labels": tests.tolist()}
        write_cifar(tmp_path, train=part, test=part)
    elif kind == "folder":
        names = sorted(names)
        for part in ("train", "test"):
            for i, name in enumerate(names):
                (tmp_path / "set" / part / name).mkdir(parents=True)
                (tmp_path / "set" / part / name / "x.png").write_bytes(picture(i))
    else:
        for part, own in (("train", [3, 0, 1, 2, 2]), ("test", [1, 0, 3, 2])):
            write(tmp_path / "set" / f"{part}.parquet", own, own, metadata=features({"label": names}))
    dataset = "cifar100" if kind == "cifar100" else f"{kind}:set"
    config = {"dataset": dataset, "method": "simplecil", "tasks": 2, "transform": "plain", "class_order_seed": 7}
    result = run_trial(TrialConfig.from_dict(config), Placement(str(tmp_path)))
    order = np.random.RandomState(7).permutation(len(names))
    assert np.array_equal(result.class_order, order) and list(result.class_names) == [names[own] for own in order]
    stream = class_incremental(
        load_dataset(dataset, tmp_path), [len(names) // 2] * 2, transforms.get("plain"), 8, order=result.class_order
    )
    for task in stream.tasks:
        for images, labels in (*task.test.plain_batches(3), *task.train.plain_batches(3)):
            own = (images[:, 0, 0, 0] * 255).round().long().numpy()
            assert [names[i] for i in own] == [result.class_names[label] for label in labels]
