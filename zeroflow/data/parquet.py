"""Images in Parquet files in the layout of Hugging Face data sets: ``dataset: parquet:NAME`` opens ``<data_dir>/NAME``.

The split of a file is in its name (``data/train-00000-of-00002.parquet``) or in its folder's (``test/0.parquet``), as in the
``datasets`` library (``parquet_files``). Without a test split, validation takes its place. The image column is a struct with ``bytes``, or plain
binary; labels are class numbers with names in the schema's Hugging Face metadata, or any integers or strings.
``parquet:NAME#COLUMN`` names the label column where it is ambiguous.
"""

from __future__ import annotations

import json
import reprlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from zeroflow.data.dataset import DatasetInfo, ImageDataset, datasets, inside_data_dir, root_of, unlike
from zeroflow.data.decoded import fingerprint
from zeroflow.data.images import read_image
from zeroflow.data.parquet_files import files_of_splits
from zeroflow.errors import ConfigError, all_at_once, unknown

IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "labels")
CACHED_BYTES = 2 * 2**30  # of row groups that have been read and may be asked for again


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file: its ``number``, and the index in the split of its first row."""

    file: Path
    number: int
    first: int


@dataclass(frozen=True, eq=False)
class ParquetSamples:
    """Samples whose images are compressed in Parquet files, read by row group on access.

    Row groups are kept in memory, compressed, up to ``CACHED_BYTES``: below that, each is read from disk once.

    Attributes:
        groups: row groups in order.
        column: name of the image column.
        labels: int64 ``[N]``.
    """

    groups: Sequence[RowGroup]
    column: str
    labels: npt.NDArray[np.int64]
    _cached: OrderedDict[RowGroup, Any] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def images(self, indices: npt.NDArray[np.int64]) -> list[Tensor]:
        """The images at ``indices``, each uint8 ``[3, H, W]`` in its own size; ``ConfigError`` if one is unreadable."""
        firsts = [group.first for group in self.groups]
        found = []
        for index, place in zip(indices, np.searchsorted(firsts, indices, side="right") - 1, strict=True):
            group = self.groups[place]
            row = int(index) - group.first
            name = f"{group.file}: row {row} of row group {group.number}"
            content = self._rows(group)[row].as_py()
            if content is None:
                raise ConfigError(f"{name}: holds no image; a path to one elsewhere is not followed")
            found.append(read_image(content, name))
        return found

    def identity(self) -> str:
        files = dict.fromkeys(group.file for group in self.groups)
        return fingerprint(files, self.column, len(self.groups))

    def _rows(self, group: RowGroup) -> Any:
        """The images' bytes in a row group, as an Arrow array."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        with self._lock:
            if group not in self._cached:
                try:
                    rows = pq.ParquetFile(group.file).read_row_group(group.number, columns=[self.column])[self.column]
                except (OSError, pa.ArrowException) as error:
                    raise ConfigError(f"{group.file}: row group {group.number} cannot be read: {error}") from error
                self._cached[group] = pc.struct_field(rows, "bytes") if pa.types.is_struct(rows.type) else rows
                while len(self._cached) > 1 and sum(rows.nbytes for rows in self._cached.values()) > CACHED_BYTES:
                    self._cached.popitem(last=False)
            self._cached.move_to_end(group)
            return self._cached[group]


def parquet_images(name: str, root: str | Path, label_column: str | None = None) -> ImageDataset:
    """Open Parquet files of a training and a test split. Labels are read now, images on access.

    Args:
        name: of the data set, for messages.
        root: the folder of the files, at any depth.
        label_column: default: the one that the schema declares as class labels, else ``label``, else the only candidate.

    Raises:
        ConfigError: the message lists all problems: a split without files, a file with no or an ambiguous split, a missing or
            unreadable file, files that would be left out (a validation split beside a test split, for one), several sets of
            shards, a column that is missing, ambiguous or another one in the other split,
            equal class names, a row without a class, a class without images in one split.
    """
    root = Path(root)
    problems: list[str] = []
    files = files_of_splits(root, problems)
    parts: list[_Split] = []
    for part in ("train", "test"):
        split = "validation" if part == "test" and "test" not in files else part
        if split in files:
            parts += _Split.read(split, files[split], label_column, problems)
        else:
            there = f"; found: {', '.join(sorted(files))}" if files else ""
            problems.append(f"{root}: no Parquet files of a {part} split, as data/{part}-00000-of-00001.parquet{there}")
    names, labels = ([], []) if problems else _numbered(parts, problems)
    for split_read, numbers in zip(parts, labels, strict=False):
        empty = np.flatnonzero(np.bincount(numbers, minlength=len(names)) == 0)
        problems += [f"{split_read.where}: class {names[i]!r}: no images" for i in empty]
    if problems:
        raise all_at_once(f"data set {name!r} cannot be used:", problems)
    train, test = (
        ParquetSamples(split.groups, split.image_column, numbers) for split, numbers in zip(parts, labels, strict=True)
    )
    return ImageDataset(name, tuple(names), train, test)


@dataclass(frozen=True)
class _Split:
    """Content of a split that is read on opening: ``values`` of the labels, and their ``names`` by number, or None."""

    where: str
    groups: Sequence[RowGroup]
    image_column: str
    label_column: str
    values: list[Any]
    names: tuple[str, ...] | None

    def place(self, index: int) -> tuple[Path, int]:
        """The file of a sample, and its row there."""
        file = next(group.file for group in reversed(self.groups) if group.first <= index)
        return file, index - next(group.first for group in self.groups if group.file == file)

    @classmethod
    def read(cls, split: str, files: Sequence[Path], label_column: str | None, problems: list[str]) -> list[_Split]:
        """Read the labels of all files; returns None and appends to ``problems`` where that is not possible."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        before = len(problems)
        groups: list[RowGroup] = []
        values: list[Any] = []
        columns: tuple[str, str, tuple[str, ...] | None] | None = None
        for path in files:
            try:
                with pq.ParquetFile(path) as file:
                    found = _columns(file.schema_arrow, label_column)
                    if found != (columns or found):
                        raise ConfigError("other columns or other class names than in the split's first file")
                    columns = found
                    for number in range(file.num_row_groups):
                        groups.append(RowGroup(path, number, len(values)))
                        values += file.read_row_group(number, columns=[columns[1]])[columns[1]].to_pylist()
            except ConfigError as error:
                problems.append(f"{path}: {error}")
            except (OSError, pa.ArrowException, UnicodeError) as error:  # the last of a name that is not UTF-8
                problems.append(f"{path}: cannot be read as a Parquet file: {error}")
        if len(problems) > before or columns is None:
            return []
        image, label, names = columns
        return [cls(f"{files[0].parent}, {split} split", groups, image, label, values, names)]


def _columns(schema: Any, label_column: str | None) -> tuple[str, str, tuple[str, ...] | None]:
    """Find the image column, the label column, and the class names if the schema has them."""
    import pyarrow as pa

    def binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def image(kind: Any) -> bool:
        struct = pa.types.is_struct(kind)
        return binary(kind.field("bytes").type) if struct and kind.get_field_index("bytes") >= 0 else binary(kind)

    def label(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)

    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    features = features if isinstance(features, dict) else {}
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    if twice := sorted(name for name, count in Counter(schema.names).items() if count > 1):
        raise ConfigError(f"several columns of one name: {', '.join(twice)}")
    fields = {schema.field(i).name: schema.field(i).type for i in range(len(schema.names))}
    images = [name for name, kind in fields.items() if image(kind)]
    labels = [name for name, kind in fields.items() if label(kind)]
    for what, able in (("images", images), ("labels", labels)):
        if not able:
            there = ", ".join(f"{name} ({kind})" for name, kind in fields.items())
            wanted = "binary, or a struct with bytes" if what == "images" else "integers or texts"
            raise ConfigError(f"no column of {what}, which are {wanted}; its columns: {there}")
    chosen_image = _chosen("images", images, [n for n in images if kinds.get(n) == "Image"], IMAGE_NAMES)
    if label_column is not None:
        if label_column not in labels:
            raise unknown("column of labels", label_column, labels)
        chosen = label_column
    else:
        chosen = _chosen("labels", labels, [n for n in labels if kinds.get(n) == "ClassLabel"], LABEL_NAMES)
    names = features[chosen].get("names") if kinds.get(chosen) == "ClassLabel" else None
    if isinstance(names, dict):  # as the cards of data sets have them
        names = [names.get(str(number)) for number in range(len(names))]
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str | int) for name in names)):
        found = reprlib.repr(features[chosen]["names"])
        raise ConfigError(f"names of {chosen!r} in the Hugging Face metadata: {found}; expected a list of names")
    if not names or not pa.types.is_integer(fields[chosen]):
        return chosen_image, chosen, None
    return chosen_image, chosen, tuple(map(str, names))


def _chosen(what: str, possible: Sequence[str], declared: Sequence[str], usual: Sequence[str]) -> str:
    """Choose a column among those declared by the metadata, else among all: the one with the usual name, or the only one."""
    candidates = declared or possible
    named = [name for name in usual if name in candidates]
    if named or len(candidates) == 1:
        return [*named, *candidates][0]
    name_it = "; name one: parquet:NAME#COLUMN" if what == "labels" else ""
    raise ConfigError(f"several columns may be the {what}: {', '.join(candidates)}{name_it}")


def _numbered(splits: Sequence[_Split], problems: list[str]) -> tuple[list[str], list[npt.NDArray[np.int64]]]:
    """The class names of the training and the test split, and each one's labels as numbers of these."""
    train, test = splits
    for split in splits:
        unlabelled = [i for i, value in enumerate(split.values) if not _is_class(value, split.names)]
        if unlabelled:
            first = unlabelled[0]
            file, row = split.place(first)
            wanted = f"0 to {len(split.names) - 1}" if split.names else ">= 0, or texts"
            problems.append(
                f"{split.where}: {len(unlabelled)} rows without a class, row {row} of {file} for one "
                f"({split.label_column}={split.values[first]}); expected labels {wanted} (-1 and null mean none)"
            )
    if train.label_column != test.label_column:
        problems.append(
            f"{test.where}: its labels are in column {test.label_column!r}, those of {train.where} in "
            f"{train.label_column!r}; expected the same column"
        )
    if train.names != test.names:
        problems.append(f"{test.where}: other class names than in {train.where}")
    if not problems and len({type(value) for split in splits for value in split.values}) > 1:
        problems.append(f"{test.where}: labels of another type than in {train.where}")
    if problems:
        return [], []
    known = range(len(train.names)) if train.names else sorted({value for split in splits for value in split.values})
    texts = train.names or [name for name in known if isinstance(name, str)]
    problems += [f"{train.where}: {problem}" for problem in unlike(texts)]
    number = {value: i for i, value in enumerate(known)}
    labels = [np.array([number[value] for value in split.values], dtype=np.int64) for split in splits]
    return list(train.names or map(str, known)), labels


def _is_class(value: Any, names: Sequence[str] | None) -> bool:
    """Whether a label stands for a class: one of the names, or any text or number that is not negative."""
    if value is None or isinstance(value, str):
        return value is not None
    return value >= 0 and (names is None or value < len(names))


def _info(name: str) -> DatasetInfo:
    folder, asked, column = name.partition("#")
    if asked and not column:  # two names of one data set would be two cells
        raise ConfigError(
            f"dataset 'parquet:{name}': expected a column of labels behind '#', or none: parquet:{folder}"
        )
    inside_data_dir(f"parquet:{name}", folder)

    def missing(data_dir: Path | None) -> list[Path]:
        root = root_of(data_dir) / folder
        return [] if root.is_dir() else [root]

    return DatasetInfo(
        f"parquet:{name}",
        lambda data_dir: parquet_images(f"parquet:{name}", root_of(data_dir) / folder, column or None),
        None,
        transform="timm",
        image_size=224,
        where=f"Put the Parquet files at <data_dir>/{folder}/data/train-00000-of-00001.parquet and test-... likewise",
        description="any images of your own or of the Hugging Face hub: <data_dir>/NAME/**/{train,test}*.parquet",
        missing=missing,
    )


datasets.register_family("parquet", _info)
