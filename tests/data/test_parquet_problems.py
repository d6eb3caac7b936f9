"""What is told of image data sets in Parquet files whose files, labels or images are not as they should be."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import NAMES, features, picture, write_both_parquet, write_parquet

from zeroflow.data import load_dataset
from zeroflow.data.parquet import parquet_images
from zeroflow.errors import ConfigError

pytestmark = pytest.mark.usefixtures("empty_cache")


def problems(root: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parquet_images("broken", root)
    return [line.strip().replace(str(root) + "/", "") for line in str(caught.value).splitlines()[1:]]


def test_all_problems_of_the_files_are_told_at_once(tmp_path: Path) -> None:
    named = features({"label": NAMES})
    write_parquet(tmp_path / "data" / "train-00000-of-00003.parquet", [1], [0], metadata=named)
    (tmp_path / "data" / "train-00002-of-00003.parquet").write_bytes(b"PAR1 cut off")
    write_parquet(tmp_path / "data" / "test.parquet", [1], [0], metadata=named, image="none")
    pq.write_table(pa.table({"label": [1]}), tmp_path / "data" / "test.parquet")
    found = problems(tmp_path)
    assert found[0] == "data/train-00001-of-00003.parquet: no such file, though others of these 3 are there"
    assert found[1].startswith("data/train-00002-of-00003.parquet: cannot be read as a Parquet file: ")
    assert found[2:] == [
        "data/test.parquet: no column of images, which are binary, or a struct with bytes; its columns: label (int64)"
    ]


@pytest.mark.parametrize("ending", ["", "-abcdef0123456789"])
def test_a_missing_shard_is_told_whatever_follows_its_number(tmp_path: Path, ending: str) -> None:
    write_both_parquet(tmp_path, train=f"data/train-00000-of-00002{ending}.parquet")
    assert problems(tmp_path) == ["data/train-00001-of-00002.parquet: no such file, though others of these 2 are there"]
    write_parquet(
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
    write_parquet(tmp_path / "data" / "test.parquet", [1, 2, 3], [0, 1, 2], metadata=named)
    for name in {pattern.format(i) for pattern in (old, new) for i in range(2)}:
        write_parquet(tmp_path / "data" / f"{name}.parquet", [1, 2, 3], [0, 1, 2], metadata=named)
    found = problems(tmp_path)
    assert found[0] == f"{problem}; expected one set of shards"
    assert all(line.endswith("expected one set of shards") for line in found)


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
    write_both_parquet(tmp_path, test="data/test.parquet")
    files = {"train": "train-00000-of-00001", "test": "test"}
    shutil.copy(tmp_path / "data" / f"{files[original]}.parquet", tmp_path / "data" / f"{copy}.parquet")
    assert problems(tmp_path) == [f"data/{copy}.parquet: {problem}"]


def test_another_download_beside_a_split_is_told(tmp_path: Path) -> None:
    write_both_parquet(tmp_path, train="data/train.parquet")
    write_parquet(tmp_path / "data" / "train-backup.parquet", [1], [1], metadata=features({"label": NAMES}))
    assert problems(tmp_path) == [
        "data/train-backup.parquet: beside data/train.parquet; expected one file or one set of shards"
    ]


def test_a_file_of_no_known_split_is_told(tmp_path: Path) -> None:
    write_both_parquet(tmp_path)
    write_parquet(tmp_path / "data" / "extra-00000-of-00001.parquet", [1], [0])
    assert problems(tmp_path) == [
        "data/extra-00000-of-00001.parquet: of no known split; expected train, test or validation in its name or its folder's"
    ]


@pytest.mark.parametrize(
    "name",
    ["train_b.parq", "train_b.arrow", "data/train_c.parquet.zst", "a/b/c/d/e/train.PQ", "rows.tar.gz", "test/0.png"],
)
def test_files_that_would_be_left_out_are_told(tmp_path: Path, name: str) -> None:
    write_both_parquet(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"?")
    kind = Path(name).suffix.lower()
    (found,) = problems(tmp_path)
    assert found.endswith(
        f": 1 files would be left out: 1 x {kind}, {name} for one; images are in .parquet files; convert them, or put "
        "them elsewhere"
    )


def test_what_data_sets_of_the_hub_have_beside_their_files_is_not_told(tmp_path: Path) -> None:
    write_both_parquet(tmp_path)
    for name in (
        "README.md", "LICENSE", "LICENSE.txt", "dataset_infos.json", "data/metadata.jsonl", "birds.py", ".gitattributes",
        ".cache/huggingface/download/data/train-00000-of-00001.parquet.metadata", ".git/objects/pack/a.pack", "classes.csv",
        "assets/examples.png", "thumbnail.JPG", "logo.svg", "explore.ipynb", "CITATION.cff", "_SUCCESS", "data/.train.parquet.crc",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    assert len(parquet_images("hub", tmp_path).train.labels) == 5


@pytest.mark.parametrize("name", ["validation", "valid/0", "data/dev-0-of-1", "val.PARQUET"])
def test_a_validation_split_beside_a_test_split_is_told(tmp_path: Path, name: str) -> None:
    """Many data sets of the hub have all three: train and test are used."""
    write_both_parquet(tmp_path)
    expected = len(parquet_images("hub", tmp_path).train.labels)
    name = name if name.endswith("PARQUET") else f"{name}.parquet"
    write_parquet(tmp_path / name, [90, 91, 92], [0, 1, 2], metadata=features({"label": NAMES}))
    with pytest.warns(UserWarning, match=f"1 files of the validation split are not used, .*{re.escape(name)} for one"):
        found = parquet_images("hub", tmp_path)
    assert len(found.train.labels) == expected and not set(found.test.labels) - {0, 1, 2}


def test_files_far_below_others_of_their_split_are_told(tmp_path: Path) -> None:
    write_both_parquet(tmp_path)
    write_parquet(tmp_path / "a/b/c/d/e/train_b.parquet", [1], [1], metadata=features({"label": NAMES}))
    (found,) = problems(tmp_path)
    assert found.endswith(": files of the train split in several folders: a/b/c/d/e, data; name one of them")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    write_both_parquet(tmp_path)
    (tmp_path / "more").mkdir(mode=0)
    assert problems(tmp_path) == ["more: Permission denied"]


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    write_both_parquet(tmp_path)
    (tmp_path / "data" / "train-00001-of-00002.PARQUET").symlink_to("gone.parquet")
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    (tmp_path / "data" / "test-00000-of-00001.parquet").symlink_to("gone.parquet")
    found = problems(tmp_path)
    assert found[:2] == [
        f"data/{name}: no file, or a link that leads nowhere"
        for name in ("test-00000-of-00001.parquet", "train-00001-of-00002.PARQUET")
    ]


def test_missing_splits_and_ambiguous_folders_are_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "small" / "train.parquet", [1], [0])
    write_parquet(tmp_path / "large" / "train.parquet", [1], [0])
    write_parquet(tmp_path / ".cache" / "test.parquet", [1], [0])
    found = problems(tmp_path)
    places = f"{tmp_path / 'large'}, {tmp_path / 'small'}".replace(str(tmp_path) + "/", "")
    assert found[0].endswith(f": files of the train split in several folders: {places}; name one of them")
    assert found[1].endswith(": no Parquet files of a test split, as data/test-00000-of-00001.parquet; found: train")


def test_classes_that_do_not_match_are_told_with_their_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [1, 2], [0, 1], metadata=features({"label": NAMES}))
    write_parquet(tmp_path / "test.parquet", [1, 2], [2, 1], metadata=features({"label": NAMES}))
    assert [line.split(": ", 1)[1] for line in problems(tmp_path)] == [
        "class '鸟': no images",
        "class 'owl': no images",
    ]
    write_parquet(tmp_path / "test.parquet", [1, 2], [-1, None], metadata=features({"label": NAMES}))
    assert problems(tmp_path)[0].endswith(
        "2 rows without a class, row 0 of test.parquet for one (label=-1); "
        "expected labels 0 to 2 (-1 and null mean none)"
    )
    write_parquet(tmp_path / "test.parquet", [1, 2], [0, 1], metadata=features({"label": NAMES[::-1]}))
    assert "other class names than in" in problems(tmp_path)[0]
    write_parquet(tmp_path / "train.parquet", [1, 2], [0, 1])
    write_parquet(tmp_path / "test.parquet", [1, 2], ["a", "b"])
    assert "labels of another type than in" in problems(tmp_path)[0]


@pytest.mark.parametrize("named", [True, False])
def test_labels_of_another_column_in_the_test_split_are_refused(tmp_path: Path, named: bool) -> None:
    for part, column in (("train", "fine"), ("test", "coarse")):
        metadata = features({column: ["a", "b"]}) if named else None
        write_parquet(tmp_path / f"{part}.parquet", [1, 2], [0, 1], label=column, metadata=metadata)
    (found,) = problems(tmp_path)
    assert "test split: its labels are in column 'coarse', those of " in found
    assert found.endswith("train split in 'fine'; expected the same column")


def test_negative_labels_are_no_classes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0-of-2.parquet", [1, 2, 3], [0, 1, 1])
    write_parquet(tmp_path / "train-1-of-2.parquet", [1, 2, 3, 4, 5], [0, 1, 1, -1, -2])
    write_parquet(tmp_path / "test.parquet", [1, 2, 3], [0, 1, -1])
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
        write_parquet(tmp_path / f"{part}.parquet", [1, 2], [0, 1], metadata=features({"label": names}))
    (found,) = problems(tmp_path)
    assert found.endswith(f"train split: {problem}")


@pytest.mark.parametrize("names", [5, "cat", [None, "cat"], {"0": "cat", "2": "dog"}])
def test_names_of_the_metadata_that_name_no_classes_are_told(tmp_path: Path, names: object) -> None:
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [1, 2], [0, 1], metadata=features({"label": names}))
    found = problems(tmp_path)
    assert re.search(r"names of 'label' in the Hugging Face metadata: .*; expected a list of names$", found[0])


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
        write_parquet(tmp_path / "birds" / f"{part}.parquet", [10, 11, 12], labels)
    with pytest.raises(ConfigError) as caught:
        load_dataset("parquet:birds", tmp_path)
    assert problem in str(caught.value)


def test_one_file_for_both_splits_is_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "birds" / "train.parquet", [10, 11], [0, 1])
    (tmp_path / "birds" / "test.parquet").symlink_to("train.parquet")
    with pytest.raises(ConfigError, match=r"test\.parquet: the same file as .*train\.parquet"):
        load_dataset("parquet:birds", tmp_path)


def test_images_that_cannot_be_read_are_all_told_with_their_rows(tmp_path: Path) -> None:
    root = write_both_parquet(tmp_path / "birds")
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
