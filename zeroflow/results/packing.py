"""Packing: the many small files of a store become one Parquet file for each table.

A packed file is written beside the loose ones, read back, and only then are those removed that it holds: whoever dies in
between leaves rows twice, which count once, and the next packing goes on. Failures stay loose, for they come and go.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zeroflow.errors import ConfigError
from zeroflow.results import parquet
from zeroflow.results.packed import NAME, PackedTable
from zeroflow.results.schema import SCHEMAS
from zeroflow.results.storage import File
from zeroflow.results.store import Store, key_of
from zeroflow.results.sweeps import sweeps
from zeroflow.telling import Tell, silent

_TABLES = (*(name for name in SCHEMAS if name not in ("trials", "failures")), "trials")
_AT_ONCE = 1024  # cells that are in memory together
_GROUP = 2**16  # rows from which on a row group ends with the cell
_THREADS = 16  # that wait for an object store while files are removed


@dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        files: loose files that are packed now, and gone.
        bytes: of the packed files that were written.
        cells: finished cells of the store.
    """

    files: int
    bytes: int
    cells: int


def pack(results: Store | str | Path, tell: Tell = silent) -> Packed:
    """Pack a store: everything in it reads as before, from a file for each table.

    A sweep goes on from a packed store, and packing again takes in what it added.

    Args:
        results: the store, its folder or its URI.
        tell: see ``Tell``; a unit is a table.

    Raises:
        ConfigError: nothing is there, it cannot be written, a sweep is at work on it, a newer zeroflow wrote it, a packed
            file cannot be read, or a cell that is packed already has another result in a file of its own. Nothing is
            changed then.
    """
    store = results if isinstance(results, Store) else Store(results)
    if not store.exists():
        raise ConfigError(f"results {store.root!r}: expected a store to pack, found nothing")
    _refuse_at_work(store)
    store.check_writable()
    claims = store.claims()
    try:
        if not claims.take_all():
            raise ConfigError(f"results {store.root!r}: cells are claimed by a sweep; pack when it has ended")
        done = store.done()
        _refuse_contradictions(store)
        files = size = 0
        for number, table in enumerate(_TABLES):
            tell(f"packing {table}", number, len(_TABLES))
            packed = _pack(store, table, done)
            files, size = files + packed[0], size + packed[1]
        return Packed(files, size, len(done))
    finally:
        claims.close()


def _refuse_at_work(store: Store) -> None:
    for record in sweeps(store):
        if record["state"] == "running":
            raise ConfigError(
                f"results {store.root!r}: the sweep of {record['grid']} that began at {record['started_at']} is at work; pack "
                "when it has ended"
            )


def _refuse_contradictions(store: Store) -> None:
    whole = store.packed("trials")
    both = [file.stem for file in store.loose("trials") if whole and file.stem in whole.ids]
    for found in store.differences(whole, both) if whole and both else ():
        words = found.described(whole.file.name if whole else "", f"trials/{found.cell}.parquet")
        raise ConfigError(f"results {store.root!r}: {words}; nothing was packed: remove the file that is wrong")


def _pack(store: Store, table: str, done: Collection[str]) -> tuple[int, int]:
    """Pack a table; how many loose files went, and the packed file's bytes."""
    by_cell = key_of(table) == "cell_id"
    loose = [file for file in store.loose(table) if not by_cell or file.stem in done]
    if not loose:
        return 0, 0
    whole = store.packed(table)
    if whole is not None:
        _refuse_columns(store, table, whole.file.name, whole.columns)
    taken: list[File] = []
    data, rows, ids = _encode(table, _chunks(store, table, loose, whole, taken))
    name = f"{table}/{NAME}"
    store.storage.write(name, data)
    store.storage.sync(table)
    back = store.packed(table)
    if back is None or back.file.size != len(data) or len(back) != rows or len(back.ids) != ids:
        raise ConfigError(f"results {store.root!r}: {name} is not what was written; nothing was removed")
    with ThreadPoolExecutor(_THREADS) as pool:
        # One that was written anew since it was read stays.
        gone = list(pool.map(lambda file: store.storage.stat(file.name) == file and _delete(store, file), taken))
    return sum(gone), len(data)


def _delete(store: Store, file: File) -> bool:
    store.storage.delete(file.name)
    return True


def _chunks(
    store: Store, table: str, loose: Sequence[File], whole: PackedTable | None, taken: list[File]
) -> Iterator[pa.Table]:
    """The rows of a table by id, some cells at a time; the files that could be read are added to ``taken``."""
    files = {file.stem: file for file in loose}
    ids = sorted(files.keys() | (whole.ids.keys() if whole else set()))
    for start in range(0, len(ids), _AT_ONCE):
        some = ids[start : start + _AT_ONCE]
        rows, read = _read(store, table, [files[id_] for id_ in some if id_ in files])
        taken += read
        if whole is not None:
            own = {file.stem for file in read}
            rows = pa.concat_tables([whole.read(SCHEMAS[table], [id_ for id_ in some if id_ not in own]), rows])
        yield rows.take(pc.sort_indices(rows[key_of(table)]))


def _read(store: Store, table: str, files: Sequence[File]) -> tuple[pa.Table, list[File]]:
    """The rows of loose files, and which of them could be read."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(files, pool.map(lambda file: store.storage.read(file.name), files), strict=True))
    there: dict[str, bytes] = {}
    for file, data in found.items():
        try:
            _refuse_columns(store, table, file.name, parquet.columns_of(data or b""))
            there[file.name] = data or b""
        except (pa.ArrowException, OSError):
            warnings.warn(f"not packed, for it cannot be read: {store.root}/{file.name}", stacklevel=5)
    rows, unreadable = parquet.decode_all(there, SCHEMAS[table], key_of(table))
    for name in unreadable:
        warnings.warn(
            f"not packed, for it cannot be read, or holds other rows than its name says: {store.root}/{name}",
            stacklevel=5,
        )
    return rows, [file for file in files if file.name in there.keys() - set(unreadable)]


def _refuse_columns(store: Store, table: str, name: str, columns: Collection[str]) -> None:
    """Refuse what packing would lose."""
    if unknown := [column for column in columns if column not in SCHEMAS[table].names]:
        raise ConfigError(
            f"results {store.root!r}: {name} has columns that this zeroflow does not know: {', '.join(unknown)}; nothing was "
            "lost: pack with the version that wrote it"
        )


def _encode(table: str, chunks: Iterator[pa.Table]) -> tuple[bytes, int, int]:
    """Rows as one Parquet file of row groups that hold whole cells; how many rows and how many ids."""
    sink, rows, ids = pa.BufferOutputStream(), 0, 0
    with pq.ParquetWriter(
        sink, SCHEMAS[table].remove_metadata(), store_schema=False, compression="zstd", write_page_checksum=True
    ) as writer:
        for chunk in chunks:
            for first, last in pairwise(_ends(chunk[key_of(table)])):
                writer.write_table(chunk.slice(first, last - first), row_group_size=last - first)
            rows, ids = rows + len(chunk), ids + pc.count_distinct(chunk[key_of(table)]).as_py()
    return sink.getvalue().to_pybytes(), rows, ids


def _ends(ids: pa.ChunkedArray) -> list[int]:
    """Where row groups begin and end: at the first cell's begin and wherever a cell ends after enough rows."""
    counts = np.array([each["counts"] for each in pc.value_counts(ids).to_pylist()], dtype=np.int64)
    ends = [0]
    for place in np.cumsum(counts).tolist():
        if place - ends[-1] >= _GROUP:
            ends.append(place)
    return ends if not len(ids) or ends[-1] == len(ids) else [*ends, len(ids)]
