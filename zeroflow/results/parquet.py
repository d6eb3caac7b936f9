"""Rows as a Parquet file and back.

Between the magic bytes and the first column, where the format leaves room and Parquet readers skip it, stand a checksum of
the whole file and a line. Opening a Parquet file costs by the column, whatever the rows: a store of many cells would be slow
to load. So a file of one row holds that row a second time, as JSON in that line; a reader here decodes nothing else as long
as the checksum holds. The line of other files is empty.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from zeroflow.errors import unknown
from zeroflow.results.schema import SCHEMAS

_MAGIC = b"PAR1"
_NO_CHECKSUM = b"\0" * 8  # until the file is whole
_ROW_START = len(_MAGIC) + len(_NO_CHECKSUM)
_NO_ROW = b"\n"
_MANY = 100  # rows from which on a file gains by dictionaries, statistics and compression


def encode(name: str, table: pa.Table) -> bytes:
    """A table as a Parquet file with its checksum in front; a single row also as JSON.

    Args:
        name: of the table, which says its columns.
        table: the rows.

    Raises:
        ValueError: columns other than the declared ones.
    """
    if name not in SCHEMAS:
        raise unknown("table", name, SCHEMAS)
    table = table.cast(SCHEMAS[name])
    line = _as_line(table) if len(table) == 1 else _NO_ROW
    # What a file costs to open grows with its footer. So the columns' descriptions stay out of it (``load`` adds them),
    # and so does, for a few rows, what pays only for many.
    many = len(table) >= _MANY
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        store_schema=False,
        use_dictionary=many,
        write_statistics=many,
        compression="zstd" if many else "none",
    ) as writer:
        sink.write(_NO_CHECKSUM + line)
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return _MAGIC + _checksum(data) + data[_ROW_START:]


def decode_all(files: Mapping[str, bytes], schema: pa.Schema, key: str | None = None) -> tuple[pa.Table, list[str]]:
    """Read the rows of some files.

    Args:
        files: content by name.
        schema: the columns to read.
        key: the column whose one value a file is named after; None: that is not looked at.

    Returns:
        The rows, and the names of files that cannot be read, or hold rows of another name or a finished cell twice.
    """
    try:
        lines = [row_in_front(data) for data in files.values()]
        if all(lines):
            rows = decode_lines(lines, schema)
            if key is None or rows[key].to_pylist() == [PurePosixPath(name).stem for name in files]:
                return rows, []
    except pa.ArrowException:
        pass  # one is broken: each by itself
    parts, unreadable = [schema.empty_table()], []
    for name, data in files.items():
        try:
            rows = decode(data, schema)
        except (pa.ArrowException, OSError):
            unreadable.append(name)
            continue
        path = PurePosixPath(name)
        twice = path.parent.name == "trials" and len(rows) > 1
        if key is None or (set(pc.unique(rows[key]).to_pylist()) <= {path.stem} and not twice):
            parts.append(rows)
        else:
            unreadable.append(name)
    return pa.concat_tables(parts).combine_chunks(), unreadable


def decode(data: bytes, schema: pa.Schema) -> pa.Table:
    """A Parquet file's rows in the columns of ``schema``; a column that it lacks is null."""
    row_in_front(data)  # for its check
    # Not ``read_table``: what it does beyond this takes longer than the reading.
    return declared(pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False), schema)


def declared(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The same rows in the columns of ``schema``; a column that is lacking is null, and so is NaN, which others may write."""
    names = set(table.column_names)
    if len(names) < table.num_columns:
        raise pa.ArrowInvalid("a column is there twice")
    columns = [_measured(table[f.name]) if f.name in names else pa.nulls(len(table), f.type) for f in schema]
    return pa.table(columns, names=schema.names).cast(schema)


def _measured(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type) or not pc.any(nan := pc.is_nan(column)).as_py():
        return column
    return pc.if_else(nan, pa.scalar(None, column.type), column)


def columns_of(data: bytes) -> list[str]:
    """The columns that a Parquet file has.

    Raises:
        ArrowInvalid: it is none.
    """
    return list(pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).schema_arrow.names)


def row_in_front(data: bytes) -> bytes | None:
    """The line that ``encode`` put in front; None if the file has none.

    Raises:
        ArrowInvalid: the file is not what was written.
    """
    checksum = data[len(_MAGIC) : _ROW_START]
    if len(checksum.strip(b"0123456789abcdef")) or not checksum:  # a column's first page starts with another byte
        return None
    if checksum != _checksum(data):
        raise pa.ArrowInvalid("the file is not what was written")
    line = data[_ROW_START : data.index(b"\n", _ROW_START) + 1]
    return None if line == _NO_ROW else line


def decode_lines(lines: Iterable[bytes | None], schema: pa.Schema) -> pa.Table:
    """The rows of ``row_in_front`` in the columns of ``schema``; a column that a line lacks is null."""
    text = b"".join(line for line in lines if line)
    if not text:
        return schema.empty_table()
    return pyarrow.json.read_json(
        io.BytesIO(text),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    ).cast(schema)


def _as_line(table: pa.Table) -> bytes:
    """A table's one row as a line of JSON; an empty one for what JSON has no word for (infinity)."""
    try:
        text = json.dumps(table.to_pylist()[0], default=str, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError:
        return _NO_ROW
    return text.encode() + b"\n"


def _checksum(data: bytes) -> bytes:
    """Of a file, from its line of JSON to its end: eight hexadecimal digits."""
    return b"%08x" % zlib.crc32(memoryview(data)[_ROW_START:])
