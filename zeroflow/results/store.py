"""The store: a file per finished cell and table, ``<root>/<table>/<cell id>.parquet``, in a folder or an object store.

A cell is done exactly if its file in ``trials/`` is readable, which is why that one is written last. Writing a cell
again replaces its files; no file is ever appended to, so any number of processes may write at once. Three tables are not by
cell: ``searches`` has a file per search, ``trajectories`` and ``surfaces`` one per landscape of two losses.

Opening a Parquet file costs by the column, whatever the rows: a store of many cells would be slow to load. So a file of
one row holds that row a second time, as a line of JSON between the magic bytes and the first column, where the format
leaves room. Parquet readers skip it; ``load`` decodes nothing else as long as its checksum of the whole file holds.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
import uuid
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq
from pyarrow import fs

from zeroflow.errors import ConfigError, unknown
from zeroflow.results.claims import Claims, FolderClaims, ObjectClaims
from zeroflow.results.schema import SCHEMA_VERSION, SCHEMAS

_MAGIC = b"PAR1"
_NO_CHECKSUM = b"\0" * 8  # until the file is whole
_ROW_START = len(_MAGIC) + len(_NO_CHECKSUM)
_SMALLEST = 12  # bytes of a Parquet file: magic, length of the footer, magic
_ENOUGH = 2**14  # bytes that must find room where a cell is to be written
_LEFTOVER_SECONDS = 3600.0
_NOT_BY_CELL = {
    "failures",
    "searches",
    "trajectories",
    "surfaces",
}  # tables whose files are there whether or not a cell is done
_KEYS = {"searches": "search_id", "trajectories": "landscape_id", "surfaces": "landscape_id"}
"""What a file is named by, where not by its cell."""

_MANY = 100  # rows from which on a file gains by dictionaries, statistics and compression
_READERS = 16  # threads that wait for files
_AT_ONCE = 128  # files that one of them reads before it decodes them together


class Store:
    """The results of any number of cells. Reading never writes.

    Args:
        root: a folder, made absolute at once, or a URI that pyarrow knows (``s3://bucket/path``, ``gs://...``).

    Raises:
        ConfigError: a URI nobody knows, or a folder that is a file.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        if "://" not in self.root:
            self.root = str(Path(root).expanduser().absolute())
            self._filesystem, self._base = fs.LocalFileSystem(), self.root
        else:
            if "@" in self.root.split("://", 1)[1].split("/")[0]:
                raise ConfigError(
                    "results: the address has credentials in it, which would go into logs and reports; expected them in the "
                    "environment, in ~/.aws/credentials, or in the machine's role"
                )
            try:
                self._filesystem, self._base = fs.FileSystem.from_uri(_whole_objects(self.root))
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ConfigError(
                    f"results {self.root!r}: expected a folder or an object store's URI; {error}"
                ) from None
        self._local = isinstance(self._filesystem, fs.LocalFileSystem)
        self._swept: set[str] = set()
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

    def copy(self, cell: str, source: Store) -> bool:
        """Copy the files of a cell that is done in ``source``, byte for byte and ``trials`` last.

        Returns:
            False if the cell is done here, or no longer there; nothing is written then.
        """
        if self._looks_complete(self._filesystem.get_file_info(self._path("trials", cell))):
            return False
        names = sorted(SCHEMAS.keys() - _NOT_BY_CELL, key=lambda name: name == "trials")
        files = {name: source._get(source._path(name, cell)) for name in names}
        if not files["trials"]:
            return False
        for name, data in files.items():
            if data is not None:
                self._put(name, cell, data)
        self._drop("failures", cell)
        return True

    def exists(self) -> bool:
        """Whether anything has been written here."""
        with self._reaching("read"):
            tables = self._filesystem.get_file_info([f"{self._base}/{name}" for name in SCHEMAS])
        return any(table.type == fs.FileType.Directory for table in tables)

    def check_writable(self) -> None:
        """Make a local store's folder and see that the store takes files: one is written and removed.

        Raises:
            ConfigError: the folder cannot be made or written; no such bucket, no credentials, no access.
        """
        if self._local:
            try:
                Path(self._base).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._base, buffering=0) as file:
                    file.write(bytes(_ENOUGH))
            except OSError as error:
                raise ConfigError(f"results {self.root!r}: cannot be written: {error.strerror}") from None
        else:
            with self._reaching("written"):
                path = f"{self._base}/.writable-{uuid.uuid4().hex}"
                self._put_object(path, b"")
                self._filesystem.delete_file(path)

    def claims(self) -> Claims:
        """A process's claims on cells, so that sweeps on the same store at the same time run no cell twice.

        Raises:
            ConfigError: the store cannot be written.
        """
        try:
            return FolderClaims(self._base) if self._local else ObjectClaims(self._filesystem, self._base)
        except OSError as error:
            raise ConfigError(f"results {self.root!r}: cannot be written: {error.strerror}: {error.filename}") from None

    def has(self, cell: str) -> bool:
        """Whether a cell is finished; see ``done``."""
        with self._reaching("read"):
            return self._looks_complete(self._filesystem.get_file_info(self._path("trials", cell)))

    def failed_at(self, cell: str) -> float | None:
        """When a cell's failure was recorded, seconds since 1970; None if there is none."""
        with self._reaching("read"):
            info = self._filesystem.get_file_info(self._path("failures", cell))
        return info.mtime_ns / 1e9 if info.is_file else None

    def row(self, table: str, cell: str) -> dict[str, Any] | None:
        """The row of one cell in a table that has one for each; None if there is none, or none that can be read."""
        rows, _ = self._read(SCHEMAS[table], [self._path(table, cell)])
        return rows.to_pylist()[0] if len(rows) else None

    def write_failure(self, table: pa.Table) -> None:
        """Record that a cell failed: one row from ``rows.failure``."""
        self._put("failures", table["cell_id"][0].as_py(), _encode("failures", table))

    def write_search(self, table: pa.Table) -> None:
        """Write a search: all of its rows, in place of those of an earlier run of it.

        Raises:
            ValueError: columns other than the declared ones, or rows of more than one search.
        """
        (search,) = pc.unique(table["search_id"]).to_pylist()
        self._put("searches", search, _encode("searches", table))

    def write_landscape(self, trajectories: pa.Table, surface: pa.Table) -> None:
        """Write a landscape of two losses and the runs on it, in place of an earlier one that is the same.

        Raises:
            ValueError: columns other than the declared ones, or rows of more than one landscape; nothing is written then.
        """
        encoded = {"surfaces": _encode("surfaces", surface), "trajectories": _encode("trajectories", trajectories)}
        (landscape,) = {
            *pc.unique(surface["landscape_id"]).to_pylist(),
            *pc.unique(trajectories["landscape_id"]).to_pylist(),
        }
        for name, data in encoded.items():
            self._put(name, landscape, data)

    def copy_others(self, source: Store) -> None:
        """Copy the searches and landscapes of another store that are not here."""
        for name in ("searches", "surfaces", "trajectories"):
            here = {info.base_name for info in self._files(name)}
            for info in source._files(name):
                if info.base_name not in here and (data := source._get(info.path)):
                    self._put(name, _cell(info), data)

    def done(self) -> set[str]:
        """Ids of the finished cells.

        Looks at names, sizes and the closing bytes alone: a file cut short or empty does not count.

        Raises:
            ConfigError: a newer zeroflow wrote the store, or the object store cannot be reached.
        """
        complete = [info for info in self._files("trials") if self._looks_complete(info)]
        self._refuse_newer(complete)
        return {_cell(info) for info in complete}

    def failed(self) -> dict[str, dict[str, Any]]:
        """The failure of every cell that failed and has not been finished since, by cell id."""
        done = self.done()
        return {row["cell_id"]: row for row in self.load("failures").to_pylist() if row["cell_id"] not in done}

    def load(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a table, cells in the order of their ids, in the declared columns; empty if there are none.

        Args:
            table: its name. columns: the ones to read, which is quicker than all; default: all.

        Rows of cells that are not done (the process was killed between two files) are left out. Files that cannot be
        read are skipped, with a warning that names them.

        Raises:
            ConfigError: no such table, a newer zeroflow wrote the store, or the object store cannot be reached.
        """
        if table not in SCHEMAS:
            raise unknown("table", table, SCHEMAS)
        # Listed first: what is done by then has its files in every other table.
        trials = self._files("trials")
        self._refuse_newer(trials)
        files = trials
        if table != "trials":
            done = {_cell(info) for info in trials if self._looks_complete(info)}
            files = [info for info in self._files(table) if table in _NOT_BY_CELL or _cell(info) in done]
        schema = SCHEMAS[table]
        if columns is not None:
            schema = pa.schema([field for field in schema if field.name in columns], metadata=schema.metadata)
        rows, unreadable = self._read(schema, [info.path for info in files])
        if unreadable:
            warnings.warn(f"skipped files that cannot be read: {', '.join(unreadable)}", stacklevel=2)
        if table == "trials" and "schema_version" in rows.column_names:
            _check_version(rows["schema_version"], self.root)
        return rows

    def put_file(self, name: str, data: bytes) -> None:
        """Write a small file that is no table, whole; ``name`` is relative to the store."""
        if self._local:
            write_atomically(Path(self._base) / name, data)
        else:
            self._put_object(f"{self._base}/{name}", data)

    def drop_file(self, name: str) -> None:
        """Remove such a file if it is there."""
        if self._filesystem.get_file_info(f"{self._base}/{name}").is_file:
            self._filesystem.delete_file(f"{self._base}/{name}")

    def files(self, folder: str) -> list[tuple[str, bytes]]:
        """Such files in a folder of the store, by name, and what is in them."""
        with self._reaching("read"):
            found = self._filesystem.get_file_info(fs.FileSelector(f"{self._base}/{folder}", allow_not_found=True))
        named = sorted((i for i in found if i.is_file and not i.base_name.startswith(".")), key=lambda i: i.base_name)
        return [(i.base_name, data) for i in named if (data := self._get(i.path))]

    def names(self, folder: str) -> list[str]:
        """The names of such files in a folder of the store and below, relative to it."""
        with self._reaching("read"):
            selector = fs.FileSelector(f"{self._base}/{folder}", allow_not_found=True, recursive=True)
            found = self._filesystem.get_file_info(selector)
        return sorted(info.path.removeprefix(f"{self._base}/{folder}/") for info in found if info.is_file)

    def _read(self, schema: pa.Schema, paths: Sequence[str]) -> tuple[pa.Table, list[str]]:
        """The rows of some files in the columns of ``schema``, and which files could not be read."""
        unreadable: list[str] = []

        def read(some: Sequence[str]) -> pa.Table:
            found = [(path, self._get(path)) for path in some]
            files = {path: data for path, data in found if data is not None}
            try:
                rows = [_row(data) for data in files.values()]
                if all(rows):
                    return _decode_rows(rows, schema)
            except pa.ArrowException:
                pass  # one is broken: each by itself
            parts = [schema.empty_table()]
            for path, data in files.items():
                try:
                    parts.append(_decode(data, schema))
                except (pa.ArrowException, OSError):
                    unreadable.append(path)
            return pa.concat_tables(parts).combine_chunks()

        batches = [paths[start : start + _AT_ONCE] for start in range(0, len(paths), _AT_ONCE)]
        with ThreadPoolExecutor(_READERS) as pool:
            parts = list(pool.map(read, batches))
        return pa.concat_tables([schema.empty_table(), *parts]), sorted(unreadable)

    def _files(self, table: str) -> list[fs.FileInfo]:
        """The files of a table, whole or not, by name."""
        with self._reaching("read"):
            found = self._filesystem.get_file_info(fs.FileSelector(f"{self._base}/{table}", allow_not_found=True))
            bucket = self._base.partition("/")[0]
            if not found and not self._local and self._filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
                raise ConfigError(f"results {self.root!r}: no such bucket: {bucket}")
        named = [i for i in found if i.is_file and i.extension == "parquet" and not i.base_name.startswith(".")]
        return sorted(named, key=lambda info: info.base_name)

    def _looks_complete(self, info: fs.FileInfo) -> bool:
        if not info.is_file or info.size < _SMALLEST:
            return False
        if not self._local:
            return True  # an object appears whole or not at all
        try:
            file = os.open(info.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            return os.pread(file, len(_MAGIC), info.size - len(_MAGIC)) == _MAGIC
        finally:
            os.close(file)

    def _refuse_newer(self, trials: Iterable[fs.FileInfo]) -> None:
        # The latest file tells: this version refuses to add to a store in which it finds a newer one.
        latest = max(trials, key=lambda info: info.mtime_ns, default=None)
        version = pa.schema([SCHEMAS["trials"].field("schema_version")])
        rows, _ = self._read(version, [latest.path] if latest else [])
        _check_version(rows["schema_version"], self.root)

    def _path(self, table: str, cell: str) -> str:
        return f"{self._base}/{table}/{cell}.parquet"

    def _get(self, path: str) -> bytes | None:
        """A file's bytes; None if it has gone, none of them if the disk refuses."""
        try:
            if self._local:
                return Path(path).read_bytes()
            with self._reaching("read"), self._filesystem.open_input_file(path) as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError:
            return b""

    def _put(self, table: str, cell: str, data: bytes) -> None:
        if self._local:
            path = Path(self._path(table, cell))
            write_atomically(path, data)
            if table not in self._swept:  # once: it looks at every name in the folder
                self._swept.add(table)
                remove_leftovers(path.parent, "*.parquet")
        else:
            self._put_object(self._path(table, cell), data)

    def _put_object(self, path: str, data: bytes) -> None:
        with self._filesystem.open_output_stream(path) as stream:
            stream.write(data)

    def _drop(self, table: str, cell: str) -> None:
        path = self._path(table, cell)
        if self._filesystem.get_file_info(path).is_file:
            self._filesystem.delete_file(path)

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        """Turn what an object store's client raises into one message."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigError(
                f"results {self.root!r}: cannot be {what}: check bucket, credentials and endpoint; {error}"
            ) from None


def load(results: Store | str | Path | Sequence[Store | str | Path], table: str) -> pa.Table:
    """All rows of a table of a store, or of several stores together.

    Args:
        results: a store, its folder or its URI; or several, of which a cell (a search, a landscape) counts in the first that
            has it. table: see ``zeroflow.results.SCHEMAS`` for the names and their columns.

    Raises:
        ConfigError: no such table, or a newer zeroflow wrote the store.
    """
    several = results if isinstance(results, Sequence) and not isinstance(results, str) else [results]
    parts = [(each if isinstance(each, Store) else Store(each)).load(table) for each in several]
    if len(parts) == 1:
        return parts[0]
    key = _KEYS.get(table, "cell_id")
    kept: list[pa.Table] = []
    seen: set[str] = set()
    for part in parts:
        kept.append(part.filter(pc.invert(pc.is_in(part[key], pa.array(sorted(seen), pa.string())))))
        seen.update(pc.unique(part[key]).to_pylist())
    if table not in SCHEMAS:
        raise unknown("table", table, SCHEMAS)
    return pa.concat_tables([SCHEMAS[table].empty_table(), *kept])


def write_atomically(path: Path, data: bytes) -> None:
    """Write a local file so that it is there whole or not at all."""
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


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed writers of files ``name`` (may hold ``*``) left in a local folder an hour ago or earlier."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()
        except FileNotFoundError:
            continue  # its writer, or another one, was faster


def _whole_objects(uri: str) -> str:
    """Have S3 objects of our size written by one request, so that a killed writer leaves no parts of an upload."""
    if not uri.startswith("s3://") or "allow_delayed_open" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def _cell(info: fs.FileInfo) -> str:
    return str(info.base_name).removesuffix(".parquet")


def _encode(name: str, table: pa.Table) -> bytes:
    """A table as a Parquet file; a single row also as JSON in front."""
    if name not in SCHEMAS:
        raise unknown("table", name, SCHEMAS)
    table = table.cast(SCHEMAS[name])
    row = _as_line(table) if len(table) == 1 else b""
    # What a file costs to open grows with its footer. So the columns' descriptions stay out of it (``load`` adds them),
    # and so does, for a few rows, what pays only for many.
    many = len(table) >= _MANY
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, table.schema, store_schema=False, use_dictionary=many, write_statistics=many,
        compression="zstd" if many else "none",
    ) as writer:  # fmt: skip
        sink.write(_NO_CHECKSUM + row if row else b"")
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return _MAGIC + _checksum(data) + data[_ROW_START:] if row else data


def _as_line(table: pa.Table) -> bytes:
    """A table's one row as a line of JSON; nothing for what JSON has no word for (infinity)."""
    try:
        text = json.dumps(table.to_pylist()[0], default=str, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError:
        return b""
    return text.encode() + b"\n"


def _checksum(data: bytes) -> bytes:
    """Of a file, from its line of JSON to its end: eight hexadecimal digits."""
    return b"%08x" % zlib.crc32(memoryview(data)[_ROW_START:])


def _row(data: bytes) -> bytes | None:
    """The line that ``_encode`` put in front; None if the file has none.

    Raises:
        ArrowInvalid: the file is not what was written.
    """
    checksum = data[len(_MAGIC) : _ROW_START]
    if len(checksum.strip(b"0123456789abcdef")) or not checksum:  # a column's first page starts with another byte
        return None
    if checksum != _checksum(data):
        raise pa.ArrowInvalid("the file is not what was written")
    return data[_ROW_START : data.index(b"\n", _ROW_START) + 1]


def _decode_rows(lines: Iterable[bytes | None], schema: pa.Schema) -> pa.Table:
    """The rows of ``_row`` in the columns of ``schema``; a column that a line lacks is null."""
    text = b"".join(line for line in lines if line)
    if not text:
        return schema.empty_table()
    return pyarrow.json.read_json(
        io.BytesIO(text),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    ).cast(schema)


def _decode(data: bytes, schema: pa.Schema) -> pa.Table:
    """A Parquet file's rows in the columns of ``schema``; a column that it lacks is null."""
    _row(data)  # for its check
    # Not ``read_table``: what it does beyond this takes longer than the reading.
    table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
    names = set(table.column_names)
    columns = [table[f.name] if f.name in names else pa.nulls(len(table), f.type) for f in schema]
    return pa.table(columns, names=schema.names).cast(schema)


def _check_version(versions: pa.ChunkedArray, root: str) -> None:
    newest = pc.max(versions).as_py()
    if newest is not None and newest > SCHEMA_VERSION:
        raise ConfigError(
            f"results {root!r}: written in schema version {newest} by a newer zeroflow; "
            f"this one reads up to {SCHEMA_VERSION}: update zeroflow"
        )
