"""Image folders, ``<root>/{train,test}/<class>/*``: CUB-200, ImageNet-A, OmniBenchmark, and your own.

Classes are the sorted names of the folders; images of a class are in the order of their file names. ``dataset: folder:NAME``
opens ``<data_dir>/NAME`` without registration.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from zeroflow.data.archives import Archive
from zeroflow.data.dataset import DatasetInfo, ImageDataset, datasets, inside_data_dir, root_of, unlike
from zeroflow.data.decoded import fingerprint
from zeroflow.data.entries import BESIDE, entries_of, is_dir, is_file
from zeroflow.data.images import read_image
from zeroflow.errors import all_at_once

PARTS = ("train", "test")
# torchvision.datasets.folder.IMG_EXTENSIONS.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True, eq=False)
class FileSamples:
    """Samples decoded on access: ``paths`` of N image files, ``labels`` int64 ``[N]``."""

    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64]

    def images(self, indices: npt.NDArray[np.int64]) -> list[Tensor]:
        """The images at ``indices``, each uint8 ``[3, H, W]`` in its own size; ``ConfigError`` if one is unreadable."""
        return [read_image(self.paths[index], str(self.paths[index])) for index in indices]

    def identity(self) -> str:
        return fingerprint(self.paths)


def also_trained(train: FileSamples, test: FileSamples) -> list[Path]:
    """The test images whose bytes are those of a training image.

    Args:
        train: training samples.
        test: test samples.
    """
    trained, tested = train.paths, test.paths
    for look in (_size, _beginning, _whole):  # each reads more, of fewer files
        first, second = ({path: look(path) for path in paths} for paths in (trained, tested))
        both = set(first.values()) & set(second.values())
        trained = tuple(path for path in trained if first[path] in both)
        tested = tuple(path for path in tested if second[path] in both)
    return list(tested)


def _size(path: Path) -> bytes:
    return str(path.stat().st_size).encode()


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return _size(path) + b" " + file.read(1024)


def _whole(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def image_folder(name: str, root: str | Path, classes: int | None = None) -> ImageDataset:
    """Open ``<root>/{train,test}/<class>/*`` as a data set. Images are decoded on access.

    Args:
        name: of the data set, for messages.
        root: the folder of ``train`` and ``test``.
        classes: expected number of classes; default: any.

    Raises:
        ConfigError: the message lists all problems: a missing part, misplaced images, a class in one part only, a class
            without images, images or files of an unknown kind that would be ignored (a folder ``val`` of images beside the
            parts, for one), a broken link, a file in both parts or in two classes, names of classes that look alike, another
            number of classes.
    """
    root = Path(root)
    problems: list[str] = []
    present = [part for part in PARTS if (root / part).is_dir()]
    problems += [f"{root / part}: no such folder{_instead(root, part)}" for part in PARTS if part not in present]
    problems += _beside_parts(root, problems) if present else []
    found = {part: _images_by_class(root / part, problems) for part in present}
    names = sorted(set().union(*found.values()))
    for part, images in found.items():
        folder, expected = root / part, "at least one" if classes is None else classes
        if not images or classes not in (None, len(images)):
            problems.append(f"{folder}: {len(images)} classes, expected {expected}")
        problems += [f"{folder / c}: missing, though the other part has it" for c in names if c not in images]
    problems += [f"{root}: {problem}" for problem in unlike(names)]
    if problems or (problems := _there_twice(root, found)):
        raise all_at_once(
            f"data set {name!r} is not complete, expected {root}/{{train,test}}/<class>/<image>:", problems
        )

    def samples(images: dict[str, list[Path]]) -> FileSamples:
        labels = np.repeat(np.arange(len(names)), [len(images[c]) for c in names])
        return FileSamples(tuple(path for c in names for path in images[c]), labels)

    return ImageDataset(name, tuple(names), samples(found["train"]), samples(found["test"]))


def _beside_parts(root: Path, problems: list[str]) -> list[str]:
    """Problems with what would be left out beside the two parts."""
    entries = [entry for entry in entries_of(root, problems) if entry.name not in PARTS]
    found = []
    for entry in entries:
        images = _images_below(Path(entry.path), problems) if is_dir(entry) else []
        if images or _names_image(entry):
            what = f"a folder of {len(images)} images" if images else "an image"
            found.append(
                f"{entry.path}: {what} that would be left out, for {' and '.join(PARTS)} are read; put it elsewhere"
            )
    return found + _unknown(root, entries)


def _images_by_class(folder: Path, problems: list[str]) -> dict[str, list[Path]]:
    """The images of one part; appends to ``problems``."""
    entries = entries_of(folder, problems)
    loose = [entry for entry in entries if _names_image(entry) and not is_dir(entry)]
    if loose:
        problems.append(
            f"{folder}: {len(loose)} images are in it instead of in a class folder, such as {loose[0].name}"
        )
    problems += _unknown(folder, entries)
    return {entry.name: _images(Path(entry.path), problems) for entry in entries if is_dir(entry)}


def _images(folder: Path, problems: list[str]) -> list[Path]:
    entries = entries_of(folder, problems)
    images = [entry for entry in entries if _names_image(entry)]
    problems += [f"{entry.path}: no file, or a link that leads nowhere" for entry in images if not is_file(entry)]
    if not images:
        deeper = [e.path for e in entries if is_dir(e) and any(map(_names_image, entries_of(Path(e.path), problems)))]
        there = f"; they are one folder too deep, in {deeper[0]}" if deeper else ""
        kinds = Counter(Path(entry.name).suffix or entry.name for entry in entries if is_file(entry))
        others = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(3))
        problems.append(f"{folder}: no images{there}{f'; it holds {others}' if others else ''}")
        return []
    if deeper := [path for entry in entries if is_dir(entry) for path in _images_below(Path(entry.path), problems)]:
        problems.append(
            f"{folder}: {len(deeper)} images lie in folders below it and would be left out, {deeper[0]} for one"
        )
    problems += _unknown(folder, entries)
    return [Path(entry.path) for entry in images]


def _images_below(folder: Path, problems: list[str]) -> list[str]:
    """The images in a folder, recursively."""
    entries = entries_of(folder, problems)
    here = [entry.path for entry in entries if _names_image(entry)]
    # No link to a folder is followed: it may lead back.
    deeper = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    return here + [path for entry in deeper for path in _images_below(Path(entry.path), problems)]


def _there_twice(root: Path, found: Mapping[str, Mapping[str, list[Path]]]) -> list[str]:
    """A problem with files that a link has put into another part or class too; one class may have a file twice."""
    places: dict[tuple[int, int], Path] = {}
    twice = []
    for path in (path for images in found.values() for own in images.values() for path in own):
        status = path.stat()
        first = places.setdefault((status.st_dev, status.st_ino), path)
        if first.parent != path.parent:
            twice.append((first.relative_to(root), path.relative_to(root)))
    if not twice:
        return []
    first, second = twice[0]
    return [f"{root}: {len(twice)} images are there twice, {first} for one, the same file as {second}; remove the link"]


def _unknown(folder: Path, entries: list[os.DirEntry[str]]) -> list[str]:
    """Problems with files that are neither images nor known companions of them."""
    names = [Path(entry.name) for entry in entries if is_file(entry) and not _names_image(entry)]
    kinds = Counter(name.suffix.lower() for name in names if name.suffix and name.suffix.lower() not in BESIDE)
    if not kinds:
        return []
    found = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(3))
    known = " ".join(sorted(SUFFIXES))
    return [
        f"{folder}: {kinds.total()} files would be left out: {found}; images are {known}; convert them, or put them elsewhere"
    ]


def _names_image(entry: os.DirEntry[str]) -> bool:
    return Path(entry.name).suffix.lower() in SUFFIXES


def _instead(root: Path, part: str) -> str:
    """What exists in place of a missing part."""
    if not root.is_dir():
        return ""
    deeper = [path for path in sorted(root.iterdir()) if (path / part).is_dir()]
    if deeper:
        return f"; it is one folder too deep, in {deeper[0]}"
    entries = [path.name for path in sorted(root.iterdir()) if path.name not in PARTS]
    return f"; found there: {', '.join(entries[:8])}" if entries else ""


def folder_info(
    name: str, *, classes: int | None, description: str, source: str, folder: str, archive: Archive | None = None
) -> DatasetInfo:
    """Facts about the image folder ``<data_dir>/<folder>`` before it is opened."""

    def missing(data_dir: Path | None) -> list[Path]:
        # A folder with other content is a mistake to report, not data that is still missing.
        root = root_of(data_dir) / folder
        return [] if root.is_dir() else [root / part for part in PARTS]

    return DatasetInfo(
        name,
        lambda data_dir: image_folder(name, root_of(data_dir) / folder, classes),
        classes,
        transform="timm",
        image_size=224,
        where=f"Put the images at <data_dir>/{folder}/train/<class>/*.jpg and in {folder}/test/ likewise{source}",
        description=description,
        missing=missing,
        archive=archive,
    )


def register_image_folder(
    name: str, *, classes: int | None, description: str, source: str, archive: Archive | None = None
) -> None:
    """Register the image folder ``<data_dir>/<name>`` as data set ``name``; ``source`` says where to get its files."""
    info = folder_info(
        name, classes=classes, description=description, source=f"; {source}", folder=name, archive=archive
    )
    datasets.register(name, info)


def _pilot(name: str, archive: str, md5: str, classes: int, description: str) -> None:
    # The splits are PILOT's: the original releases of the three have no such train and test parts.
    source = (
        f"https://github.com/sun-hailong/LAMDA-PILOT links the archive of this layout: {archive}, md5 {md5}; "
        f"`zeroflow download {name} --archive {archive} --data-dir DIR` checks and unpacks it"
    )
    register_image_folder(
        name, classes=classes, description=description, source=source, archive=Archive(archive, md5, name, PARTS)
    )


_pilot("cub", "cub.zip", "85e342a2d5f941e740193602057df7a5", 200, "CUB-200-2011: photos of 200 bird species")
_pilot(
    "imagenet-a",
    "ina.zip",
    "7f4aaf0b1532b7a0bd670822c152d3c5",
    200,
    "ImageNet-A: photos of 200 ImageNet classes that mislead a classifier",
)
_pilot(
    "omnibenchmark",
    "omnibenchmark.zip",
    "f1c30808a707f9197c6c811ea52e5cbb",
    300,
    "OmniBenchmark: photos of 300 classes from many realms",
)

datasets.register_family(
    "folder",
    lambda name: folder_info(
        f"folder:{name}",
        classes=None,
        folder=inside_data_dir(f"folder:{name}", name),
        source="",
        description="any images of your own: <data_dir>/NAME/{train,test}/<class>/*",
    ),
)
