"""Mutated data sets: each gives the right samples, or one refusal that names it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import Check, beside, damaged, judged, numbers
from PIL import Image

from zeroflow.data import ImageDataset, load_dataset

SUFFIXES = (".png", ".PNG", ".jpg", ".txt", ".xyz", ".parquet", "")


def picture(random: Random, mode: str = "RGB", kind: str = "PNG", size: tuple[int, int] = (6, 5)) -> bytes:
    pixels = np.frombuffer(random.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size[1], size[0], 3)
    image, file = Image.fromarray(pixels).convert(mode), io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def wrong_samples(dataset: ImageDataset, train: list[Any], test: list[Any]) -> str | None:
    """Compare a data set with pairs of a class and an image's bytes, read independently."""
    for part, expected in (("train", train), ("test", test)):
        samples = getattr(dataset, part)
        if len(samples.labels) != len(expected):
            return f"{part}: {len(samples.labels)} samples, expected {len(expected)}"
        found = Counter()
        for label, image in zip(samples.labels, samples.images(np.arange(len(expected))), strict=True):
            found[dataset.class_names[label], image.numpy().tobytes()] += 1
        decoded = Counter((name, pixels(data)) for name, data in expected)
        if found != decoded:
            return f"{part}: other pixels or classes: {Counter(name for name, _ in found - decoded)}"
    return None


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.array(image).astype(np.int64) >> 8).astype(np.uint8))
        return np.array(image.convert("RGB")).transpose(2, 0, 1).tobytes()


# Image folders


def folder_of_images(root: Path, random: Random) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog", "eel"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                (root / part / name / f"{number}.png").write_bytes(picture(random))


def changed_folder(root: Path, random: Random) -> str:
    image = random.choice(sorted(root.rglob("*.png")))
    kind = random.choice(
        ("damage", "damage", "image", "class", "part", "beside", "beside", "beside", "name", "link", "mode")
    )
    if kind == "damage":
        what, data = damaged(image.read_bytes(), random)
        image.write_bytes(data)
        return f"{image.name}: {what}"
    if kind == "image":
        image.unlink()
        return f"{image.parent.name}/{image.name} is missing"
    if kind == "class":
        new = random.choice(("emu", os.fsdecode(b"caf\xe9"), "Cat", " ", ".git", "n\u0303", "empty"))
        place = image.parents[1] / new
        place.mkdir()
        if new != "empty":
            (place / "0.png").write_bytes(picture(random))
            if random.random() < 0.7:
                other = root / ("test" if image.parents[1].name == "train" else "train") / new
                shutil.copytree(place, other)
        return f"a further class {new!r}"
    if kind == "part":
        new = random.choice(("val", "Test", "valid", ".cache", "extra.png", "README", "notes.txt", "data.xyz"))
        if "." in new[1:] or new == "README":
            (root / new).write_bytes(picture(random))
        else:
            shutil.copytree(root / "test", root / new)
        return f"beside the parts: {new}"
    if kind == "beside":
        return beside(random.choice((image.parent, image.parents[1], root)), random, SUFFIXES, image.read_bytes())
    if kind == "name":
        new = random.choice(
            ("0.PNG", "a.jpeg", "a.gif", "a.webp", "png", "x.png.part", ".x.png", os.fsdecode(b"\xff.png"), "x.tar.png")
        )
        image.rename(image.with_name(new))
        return f"{image.name} renamed to {new!r}"
    if kind == "link":
        target = random.choice(
            (root / "train" / "cat" / "1.png", image, root, root / "nowhere", root / "train" / "dog")
        )
        image.unlink()
        image.symlink_to(target)
        return f"{image.name} is a link to {target}"
    return in_another_format(image, random)


def in_another_format(image: Path, random: Random) -> str:
    mode, format_ = random.choice(
        (
            ("L", "PNG"),
            ("P", "PNG"),
            ("RGBA", "PNG"),
            ("1", "PNG"),
            ("I;16", "PNG"),
            ("CMYK", "JPEG"),
            ("L", "GIF"),
            ("RGB", "TIFF"),
        )
    )
    if mode == "I;16":
        wide, file = np.frombuffer(random.randbytes(60), np.uint16).reshape(6, 5), io.BytesIO()
        Image.fromarray(wide).save(file, "PNG")
        image.write_bytes(file.getvalue())
    else:
        image.write_bytes(picture(random, mode, format_))
    os.utime(image, random.choice(((0, 0), (7e9, 7e9))))
    return f"{image.name} is {mode} as {format_}"


def images_of(root: Path) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]], int]:
    """Class and bytes of the images of both parts, and how many images there are anywhere."""
    endings = {".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm", ".webp", ".tif", ".tiff"}
    everywhere = [
        Path(folder, name)
        for folder, folders, names in os.walk(root)
        for name in [*names, *folders]
        if Path(name).suffix.lower() in endings and "/." not in str(Path(folder, name).relative_to(root.parent))
    ]
    parts: dict[str, list[tuple[str, bytes]]] = {"train": [], "test": []}
    for path in everywhere:
        part, *names = path.relative_to(root).parts
        if part in parts and len(names) == 2:
            parts[part].append((names[0], path.read_bytes()))
    return parts["train"], parts["test"], len(everywhere)


@pytest.mark.slow
@pytest.mark.parametrize("some", numbers(70))
def test_a_mutated_folder_of_images_gives_all_of_them_or_is_refused(some: range, tmp_path: Path) -> None:
    def one(random: Random, number: int) -> tuple[str, Check, str]:
        root = tmp_path / str(number)
        folder_of_images(root, random)
        what = changed_folder(root, random)

        def check() -> str | None:
            dataset = load_dataset(f"folder:{number}", tmp_path, threads=1, cache_bytes=random.choice((0, 2**30)))
            train, test, everywhere = images_of(root)
            if everywhere != len(train) + len(test):
                return f"{everywhere} images, {len(train) + len(test)} of them in classes"
            return wrong_samples(dataset, train, test)

        return what, check, str(root)

    assert not (found := judged("folder", some, one)), "\n".join(found)


# Parquet files


def parquet_of_images(root: Path, random: Random) -> None:
    names = ["cat", "dog", "eel"]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    for file, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 3), ("test-00000-of-00001", 2)):
        rows = [
            {"image": {"bytes": picture(random), "path": None}, "label": label}
            for label in range(3)
            for _ in range(count)
        ]
        types = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()}
        table = pa.Table.from_pylist(rows, pa.schema(types)).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        (root / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / "data" / f"{file}.parquet", row_group_size=4)


def changed_parquet(root: Path, random: Random) -> str:
    file = random.choice(sorted(root.rglob("*.parquet")))
    kind = random.choice(
        ("damage", "damage", "labels", "labels", "images", "column", "column", "metadata", "beside", "file")
    )
    if kind == "damage":
        what, data = damaged(file.read_bytes(), random)
        file.write_bytes(data)
        return f"{file.name}: {what}"
    if kind == "beside":
        return beside(random.choice((file.parent, root)), random, (".parquet", ".txt", ".xyz"), file.read_bytes())
    if kind == "file":
        new = random.choice(
            (
                None,
                "val.parquet",
                "train.parquet",
                "other.parquet",
                "train-00002-of-00002.parquet",
                os.fsdecode(b"test-\xff.parquet"),
            )
        )
        file.rename(file.with_name(new)) if new else file.unlink()
        return f"{file.name}: {new!r} in its place"
    table = pq.read_table(file)
    if kind == "metadata":
        return changed_metadata(root, file, random)
    change = {"labels": with_other_labels, "images": with_a_broken_image, "column": with_other_columns}[kind]
    what, changed = change(table, random)
    pq.write_table(changed, file)
    return f"{file.name}: {what}"


def with_other_labels(table: pa.Table, random: Random) -> tuple[str, pa.Table]:
    value = random.choice((None, -1, 7, 2.5, "dog", True, 2**63 - 1, float("nan"), [1], 0, "1", b"\xff"))
    column = pa.array([value] * len(table))
    if random.random() < 0.3 and not pa.types.is_nested(column.type) and value is not None:
        column = column.dictionary_encode()
    return f"labels {value!r}", table.set_column(1, "label", column)


def with_a_broken_image(table: pa.Table, random: Random) -> tuple[str, pa.Table]:
    broken: list[Any] = [
        None,
        {"bytes": None, "path": "x.png"},
        {"bytes": b"", "path": None},
        {"bytes": b"no image", "path": None},
    ]
    bad, place = random.choice(broken), random.randrange(len(table))
    rows = table["image"].to_pylist()
    rows[place] = bad
    images = pa.array(rows, table.schema.field("image").type)
    return f"image {place}: {bad!r}", table.set_column(0, "image", images)


def with_other_columns(table: pa.Table, random: Random) -> tuple[str, pa.Table]:
    changes: dict[str, Callable[[], pa.Table]] = {
        "image dropped": lambda: table.drop_columns("image"),
        "label dropped": lambda: table.drop_columns("label"),
        "renamed": lambda: table.rename_columns(["picture", "kind"]),
        "a further one": lambda: table.append_column("coarse", pa.array([0] * len(table))),
        "a further one called labels": lambda: table.append_column("labels", pa.array([0] * len(table))),
        "twice": lambda: table.append_column("label", table["label"]),
        "no rows": lambda: table.slice(0, 0),
        "half of the rows": lambda: table.slice(0, len(table) // 2),
        "binary": lambda: table.set_column(0, "image", pa.array([row["bytes"] for row in table["image"].to_pylist()])),
    }
    what = random.choice(list(changes))
    return what, changes[what]()


METADATA = (
    '"x"',
    "[]",
    '{"info": null}',
    "{",
    '{"info": {"features": []}}',
    '{"info": {"features": {"label": 3}}}',
    '{"info": {"features": {"label": {"_type": "ClassLabel", "names": 5}}}}',
    '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a"]}}}}',
    '{"info": {"features": {"label": {"_type": ["x"]}}}}',
    "\xff",
)


def changed_metadata(root: Path, file: Path, random: Random) -> str:
    what = random.choice(METADATA)
    for each in root.rglob("*.parquet") if random.random() < 0.5 else [file]:
        changed = pq.read_table(each).replace_schema_metadata({"huggingface": what.encode("latin-1")})
        pq.write_table(changed, each)
    return f"metadata {what}"


def rows_of(root: Path, split: str) -> list[tuple[Any, bytes]]:
    """Label and image of the rows of a split."""
    rows = []
    for file in sorted(file for file in root.rglob("*.parquet") if file.name.startswith(split) and file.is_file()):
        opened = pq.ParquetFile(file)
        table = opened.read()
        image = next(name for name in ("image", "picture") if name in table.column_names)
        label = next(name for name in ("label", "kind") if name in table.column_names)
        try:
            features = json.loads((opened.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
            names = list(features[label]["names"])
        except (KeyError, TypeError, ValueError):
            names = None
        for value, data in zip(table[label].to_pylist(), table[image].to_pylist(), strict=True):
            rows.append((names[value] if names else str(value), data["bytes"] if isinstance(data, dict) else data))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("some", numbers(50))
def test_mutated_parquet_files_give_all_their_rows_or_are_refused(some: range, tmp_path: Path) -> None:
    def one(random: Random, number: int) -> tuple[str, Check, str]:
        root = tmp_path / str(number)
        parquet_of_images(root, random)
        what = changed_parquet(root, random)

        def check() -> str | None:
            dataset = load_dataset(f"parquet:{number}", tmp_path, threads=1, cache_bytes=random.choice((0, 2**30)))
            return wrong_samples(dataset, rows_of(root, "train"), rows_of(root, "test") or rows_of(root, "val"))

        return what, check, str(root)

    assert not (found := judged("parquet", some, one)), "\n".join(found)
