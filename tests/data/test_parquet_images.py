"""Image data sets in Parquet files, laid out as those of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import NAMES, features, picture, reds, write_both_parquet, write_cifar, write_parquet

from zeroflow import Placement, TrialConfig, run_trial
from zeroflow.data import class_incremental, load_dataset, transforms
from zeroflow.data.parquet import ParquetSamples, parquet_images
from zeroflow.errors import ConfigError

pytestmark = pytest.mark.usefixtures("empty_cache")


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
    write_both_parquet(tmp_path / "my" / "birds", train, test)
    dataset = load_dataset("parquet:my/birds", tmp_path)
    assert dataset.class_names == tuple(NAMES)
    assert dataset.train.labels.tolist() == [0, 1, 2, 1, 0] and dataset.test.labels.tolist() == [2, 1, 0]
    assert reds(dataset) == [10, 11, 12, 13, 14] and reds(dataset, "test") == [20, 21, 22]
    first, last = dataset.train.images(np.array([4, 0]))
    assert first.shape == (3, 4 + 14 % 3, 6) and last.shape == (3, 4 + 10 % 3, 6)
    assert first[:, 0, 0].tolist() == [14, 0, 7]


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_both_parquet(tmp_path)
    (tmp_path / "data" / "train-00000-of-00001.parquet").unlink()
    write_parquet(
        tmp_path / "data" / "train-00001-of-00002.parquet", [3, 4, 5], [2, 2, 1], metadata=features({"label": NAMES})
    )
    write_parquet(
        tmp_path / "data" / "train-00000-of-00002.parquet",
        [0, 1, 2],
        [0, 1, 2],
        metadata=features({"label": NAMES}),
        rows=1,
    )
    dataset = parquet_images("shards", tmp_path)
    assert dataset.train.labels.tolist() == [0, 1, 2, 2, 2, 1]
    assert [int(i[0, 0, 0]) for i in dataset.train.images(np.array([5, 0, 3, 2]))] == [5, 0, 3, 2]


def test_class_names_may_be_a_mapping_from_numbers_as_on_the_cards_of_data_sets(tmp_path: Path) -> None:
    metadata = features({"label": {str(number): name for number, name in enumerate(NAMES)}})
    write_both_parquet(tmp_path / "birds", metadata=metadata)
    assert load_dataset("parquet:birds", tmp_path).class_names == tuple(NAMES)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-00000-of-00002.PARQUET", "TEST.Parquet"),
        ("a/b/c/d/e/f/train-0-of-2.parquet", "a/b/c/d/e/f/test.parquet"),
    ],
)
def test_files_in_any_case_and_at_any_depth_are_read(tmp_path: Path, train: str, test: str) -> None:
    write_both_parquet(tmp_path, train, test)
    second = train.replace("00000-of", "00001-of").replace("0-of-2", "1-of-2").lower()
    write_parquet(tmp_path / second, [30], [1], metadata=features({"label": NAMES}))
    dataset = parquet_images("far", tmp_path)
    assert sorted(reds(dataset)) == [10, 11, 12, 13, 14, 30] and reds(dataset, "test") == [20, 21, 22]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = write_both_parquet(tmp_path / "set", "train/0.parquet", "../elsewhere/0.parquet")
    (root / "test").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "back").symlink_to(root)
    (tmp_path / "elsewhere" / "itself").symlink_to(tmp_path / "elsewhere")
    dataset = parquet_images("linked", root)
    assert reds(dataset) == [10, 11, 12, 13, 14] and reds(dataset, "test") == [20, 21, 22]


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
        write_parquet(
            tmp_path / f"{part}.parquet", range(len(values)), values, plain=plain, label="kind", image="photo"
        )
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


def test_shards_of_several_prefixes_make_one_split(tmp_path: Path) -> None:
    named = features({"label": NAMES})
    for name in ("forest-train-0-of-2", "forest-train-1-of-2", "garden-train-0-of-1", "test"):
        write_parquet(tmp_path / f"{name}.parquet", [1, 2, 3], [0, 1, 2], metadata=named)
    assert len(parquet_images("two places", tmp_path).train.labels) == 9


def test_a_row_group_is_read_once_and_only_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = parquet_images("lazy", write_both_parquet(tmp_path)).train
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
    samples = parquet_images("bounded", write_both_parquet(tmp_path)).train
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
            write_parquet(tmp_path / "set" / f"{part}.parquet", own, own, metadata=features({"label": names}))
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
