"""The store: a file per finished cell and table, ``<root>/<table>/<cell id>.parquet``, in a folder or an object store.

A cell is done exactly if its file in ``trials/`` is readable, which is why that one is written last. Writing a cell
again replaces its files; no file is ever appended to, so any number of processes may write at once.
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from zeroflow.errors import ConfigError, unknown
from zeroflow.results.schema import SCHEMA_VERSION, SCHEMAS

_MAGIC = b"PAR1"
_SMALLEST = 12  # bytes of a Parquet file: magic, length of the footer, magic
_LEFTOVER_SECONDS = 3600.0
_MANY = 100  # rows from which on a file gains by dictionaries, statistics and compression


class Store:
    """The results of any number of cells. Reading never writes.

    Args:
        root: a folder, made absolute at once, or a URI that pyarrow knows (``s3://bucket/path``, ``gs://``, ``abfs://``).

    Raises:
        ConfigError: a URI nobody knows, or a folder that is a file.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        if "://" not in self.root:
            self.root = str(Path(root).expanduser().absolute())
            self._filesystem, self._base = fs.LocalFileSystem(), self.root
        else:
            try:
                self._filesystem, self._base = fs.FileSystem.from_uri(self.root)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ConfigError(
                    f"results {self.root!r}: expected a folder or an object store's URI; {error}"
                ) from None
        self._local = isinstance(self._filesystem, fs.LocalFileSystem)
        if self._local and Path(self._base).is_file():
            raise ConfigError(f"results {self.root!r}: expected a folder, found a file")

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def write(self, tables: dict[str, pa.Table]) -> None:
        """Write the tables of one cell, ``trials`` last, and drop the record of an earlier failure.

        Raises:
            ValueError: columns other than the declared ones, or rows of more than one cell; nothing is written then.
        """
        encoded = {name: _encode(name, table) for name, table in tables.items()}
        cells = {cell for table in tables.values() for cell in pc.unique(table["cell_id"]).to_pylist()}
        if len(cells) != 1:
            raise ValueError(f"expected the tables of one cell, got those of {sorted(cells)}")
        cell = cells.pop()
        for name in sorted(encoded, key=lambda name: name == "trials"):
            self._put(name, cell, encoded[name])
        if "trials" in tables:
            self._drop("failures", cell)

    def check_writable(self) -> None:
        """Make a local store's folder and see that it takes files; nothing to do for an object store.

        Raises:
            ConfigError: the folder cannot be made or written.
        """
        if not self._local:
            return
        try:
            Path(self._base).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._base):
                pass
        except OSError as error:
            raise ConfigError(f"results {self.root!r}: cannot be written: {error.strerror}") from None

    def write_failure(self, table: pa.Table) -> None:
        """Record that a cell failed: one row from ``records.failure``."""
        self._put("failures", table["cell_id"][0].as_py(), _encode("failures", table))

    def done(self) -> set[str]:
        """Ids of the finished cells.

        Looks at names, sizes and the closing bytes alone: a file cut short or empty does not count.

        Raises:
            ConfigError: a newer zeroflow wrote the store.
        """
        complete, _ = self._files("trials")
        self._refuse_newer(complete)
        return {Path(info.path).stem for info in complete}

    def failed(self) -> dict[str, dict[str, Any]]:
        """The failure of every cell that failed and has not been finished since, by cell id."""
        done = self.done()
        return {row["cell_id"]: row for row in self.load("failures").to_pylist() if row["cell_id"] not in done}

    def load(self, table: str) -> pa.Table:
        """All rows of a table, cells in the order of their ids, in the declared columns; empty if there are none.

        Rows of cells that are not done (the process was killed between two files) are left out. Files that cannot be
        read are skipped, with a warning that names them.

        Raises:
            ConfigError: no such table, or a newer zeroflow wrote the store.
        """
        if table not in SCHEMAS:
            raise unknown("table", table, SCHEMAS)
        done = self.done()
        complete, broken = self._files(table)
        paths = [info.path for info in complete if table == "failures" or Path(info.path).stem in done]
        rows, unreadable = self._read(SCHEMAS[table], paths)
        if broken or unreadable:
            named = ", ".join(sorted([info.path for info in broken] + unreadable))
            warnings.warn(f"skipped files that cannot be read: {named}", stacklevel=2)
        if table == "trials":
            _check_version(rows["schema_version"], self.root)
        return rows

    def _read(self, schema: pa.Schema, paths: list[str]) -> tuple[pa.Table, list[str]]:
        """The rows of some files in the columns of ``schema``, and which files could not be read."""

        def read(some: list[str]) -> pa.Table:
            return ds.dataset(some, schema=schema, format="parquet", filesystem=self._filesystem).to_table()

        if not paths:
            return schema.empty_table(), []
        try:
            return read(paths), []
        except (pa.ArrowException, OSError):
            pass  # at least one is broken inside: find out which
        parts, unreadable = [schema.empty_table()], []
        for path in paths:
            try:
                parts.append(read([path]))
            except (pa.ArrowException, OSError):
                unreadable.append(path)
        return pa.concat_tables(parts), unreadable

    def _files(self, table: str) -> tuple[list[fs.FileInfo], list[fs.FileInfo]]:
        """The files of a table by name: those that look complete, and those that do not."""
        found = self._filesystem.get_file_info(fs.FileSelector(f"{self._base}/{table}", allow_not_found=True))
        named = [i for i in found if i.is_file and i.extension == "parquet" and not i.base_name.startswith(".")]
        complete: list[fs.FileInfo] = []
        broken: list[fs.FileInfo] = []
        for info in sorted(named, key=lambda info: info.base_name):
            (complete if self._looks_complete(info) else broken).append(info)
        return complete, broken

    def _looks_complete(self, info: fs.FileInfo) -> bool:
        if info.size < _SMALLEST:
            return False
        if not self._local:
            return True  # an object appears whole or not at all
        try:
            with Path(info.path).open("rb") as file:
                file.seek(-len(_MAGIC), os.SEEK_END)
                return file.read() == _MAGIC
        except OSError:
            return False

    def _refuse_newer(self, trials: Iterable[fs.FileInfo]) -> None:
        # The latest file tells: this version refuses to add to a store in which it finds a newer one.
        latest = max(trials, key=lambda info: info.mtime_ns, default=None)
        version = pa.schema([SCHEMAS["trials"].field("schema_version")])
        rows, _ = self._read(version, [latest.path] if latest else [])
        _check_version(rows["schema_version"], self.root)

    def _put(self, table: str, cell: str, data: bytes) -> None:
        path = f"{self._base}/{table}/{cell}.parquet"
        if self._local:
            write_atomically(Path(path), data)
        else:
            with self._filesystem.open_output_stream(path) as stream:
                stream.write(data)

    def _drop(self, table: str, cell: str) -> None:
        path = f"{self._base}/{table}/{cell}.parquet"
        if self._filesystem.get_file_info(path).is_file:
            self._filesystem.delete_file(path)


def load(results: Store | str | Path, table: str) -> pa.Table:
    """All rows of a table of a store: ``trials``, ``stages``, ``accuracy``, ``steps``, ``probes`` or ``failures``.

    Args:
        results: a store, its folder or its URI. table: see ``zeroflow.results.SCHEMAS`` for the columns.

    Raises:
        ConfigError: no such table, or a newer zeroflow wrote the store.
    """
    return (results if isinstance(results, Store) else Store(results)).load(table)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a local file so that it is there whole or not at all, and remove what killed writers left beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Dot first: readers of a Parquet folder skip such names, and no other ones.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()
        except FileNotFoundError:
            continue  # its writer, or another one, was faster


def _encode(name: str, table: pa.Table) -> bytes:
    if name not in SCHEMAS:
        raise unknown("table", name, SCHEMAS)
    # What a file costs to open grows with its footer. So the columns' descriptions stay out of it (``load`` adds them),
    # and so does, for a few rows, what pays only for many.
    many = len(table) >= _MANY
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.cast(SCHEMAS[name]), sink, store_schema=False, use_dictionary=many, write_statistics=many,
        compression="zstd" if many else "none",
    )  # fmt: skip
    return sink.getvalue().to_pybytes()


def _check_version(versions: pa.ChunkedArray, root: str) -> None:
    newest = pc.max(versions).as_py()
    if newest is not None and newest > SCHEMA_VERSION:
        raise ConfigError(
            f"results {root!r}: written in schema version {newest} by a newer zeroflow; "
            f"this one reads up to {SCHEMA_VERSION}: update zeroflow"
        )
