"""The Parquet files of a data set by split: which are used, and which would be left out, counted twice or trained on and tested."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from zeroflow.data.entries import BESIDE, entries_of, is_dir, is_file
from zeroflow.data.folders import SUFFIXES

# The words by which the ``datasets`` library knows splits (datasets/data_files.py).
WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "dev": "validation", "val": "validation",
}  # fmt: skip
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.(?i:parquet)")
# What data sets of the hub have beside what images may have: more notes, and pictures of their cards.
NOTES = BESIDE | {".jsonl", ".ipynb", ".rst", ".bib", ".cff", ".toml", ".sh", ".lock", ".crc", ".pyc"}
PICTURES = SUFFIXES | {".gif", ".svg"}


def files_of_splits(root: Path, problems: list[str]) -> dict[str, list[Path]]:
    """The Parquet files of each split, ``train``, ``test`` and ``validation``, sorted by name.

    Args:
        root: the folder of the files, at any depth; links are followed.
        problems: what is wrong with them, and what would be left out, is appended.
    """
    splits: dict[str, list[Path]] = {}
    files, others = _files(root, problems)
    for path in files:
        if split := _split_of(path.relative_to(root)):
            splits.setdefault(split, []).append(path)
        else:
            problems.append(
                f"{path}: of no known split; expected train, test or validation in its name or its folder's"
            )
    problems += _left_out(root, others)
    problems += [
        f"{other}: the same file as {path}, a link; expected the images of the test split"
        for path in splits.get("train", [])
        for split in splits.keys() - {"train"}
        for other in splits[split]
        if path.samefile(other)
    ]
    if "test" in splits and (unused := splits.pop("validation", [])):
        warnings.warn(
            f"{root}: {len(unused)} files of the validation split are not used, {unused[0]} for one: train and test are",
            stacklevel=2,
        )
    for split, paths in splits.items():
        places = sorted({path.parent for path in paths})
        if len(places) > 1:
            problems.append(
                f"{root}: files of the {split} split in several folders: {', '.join(map(str, places))}; name one of them"
            )
        problems += _shard_problems(paths)
    if not problems:
        problems += _copies(splits)
    return splits


def _files(root: Path, problems: list[str]) -> tuple[list[Path], list[Path]]:
    """The Parquet files below a folder, and all others that are not hidden. A link that leads back to where it lies is passed over."""
    found: list[Path] = []
    others: list[Path] = []
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        entries = entries_of(folder, problems)
        folders = [Path(entry.path) for entry in entries if is_dir(entry)]
        for entry in entries:
            path = Path(entry.path)
            if path.suffix.lower() == ".parquet" and not is_dir(entry):
                found.append(path)
                problems += [] if is_file(entry) else [f"{path}: no file, or a link that leads nowhere"]
            elif is_file(entry):
                others.append(path)
        within = above | ({_place(folder)} if folders else set())
        waiting += [(path, within) for path in reversed(folders) if _place(path) not in within]
    return [path for path in found if path.is_file()], others


def _place(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _left_out(root: Path, others: Sequence[Path]) -> list[str]:
    """A problem with files that are neither Parquet files nor known company of them; a picture that names a split is none."""
    unknown = [
        path
        for path in others
        if path.suffix
        and path.suffix.lower() not in NOTES
        and (path.suffix.lower() not in PICTURES or _split_of(path.relative_to(root)))
    ]
    if not unknown:
        return []
    kinds = Counter(path.suffix.lower() for path in unknown)
    counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(3))
    return [
        f"{root}: {len(unknown)} files would be left out: {counted}, {unknown[0]} for one; images are in .parquet files; "
        "convert them, or put them elsewhere"
    ]


def _copies(splits: dict[str, list[Path]]) -> list[str]:
    """Files with the same bytes: images would count twice, or be trained on and tested."""
    sizes: dict[int, list[Path]] = {}
    problems = []
    for path in (path for split in sorted(splits, key=lambda split: split != "train") for path in splits[split]):
        sizes.setdefault(path.stat().st_size, []).append(path)
    for alike in sizes.values():
        seen: dict[bytes, Path] = {}
        for path in alike if len(alike) > 1 else ():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            if (first := seen.setdefault(digest, path)) is not path and not path.samefile(first):
                problems.append(f"{path}: a copy of {first}; expected every image once")
    return problems


def _shard_problems(paths: Sequence[Path]) -> list[str]:
    """Problems with a split's files: one is missing, or there are several sets, which would hold images twice."""
    sets: dict[tuple[Path, str], list[tuple[Path, re.Match[str]]]] = {}
    for path in paths:
        if match := SHARD.fullmatch(path.name):
            sets.setdefault((path.parent, match[1]), []).append((path, match))
    problems: list[str] = []
    for (folder, prefix), shards in sorted(sets.items()):
        (first, match), digits = shards[0], shards[0][1][3]
        if other := next((path for path, match in shards if int(match[3]) != int(digits)), None):
            problems.append(f"{other}: of another number of shards than {first}; expected one set of shards")
            continue
        whole = [p for p in paths if p.parent == folder and p.name.lower() == f"{prefix}.parquet".lower()]
        problems += [f"{path}: beside {first}; expected one file or one set of shards" for path in whole]
        there: dict[int, Path] = {}
        for path, match in shards:
            if (same := there.setdefault(int(match[2]), path)) != path:
                problems.append(f"{path}: has the shard number of {same}; expected one set of shards")
        problems += [
            f"{folder / f'{prefix}-{i:0{len(digits)}d}-of-{digits}.parquet'}: no such file, though others of these {int(digits)} "
            "are there"
            for i in range(int(digits))
            if i not in there
        ]
    plain = [path for path in paths if not SHARD.fullmatch(path.name)]
    for named in [path for path in plain if path.stem.lower() in WORDS]:
        others = [path for path in plain if path.parent == named.parent and path != named]
        problems += [f"{path}: beside {named}; expected one file or one set of shards" for path in others]
    return problems


def _split_of(path: Path) -> str | None:
    """The split in the name of a file, or else of the nearest folder that has one."""
    for part in (path.stem, *reversed(path.parent.parts)):
        for word in re.split("[^a-z]+", part.lower()):
            if word in WORDS:
                return WORDS[word]
    return None
