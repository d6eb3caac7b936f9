"""A packed table: one Parquet file, ``<table>/packed.parquet``, of the rows that many small files held.

It is sorted by cell (by search, by landscape), and a row group holds whole cells: the smallest and largest id of a row
group, which the footer knows, say whether a cell can be in it. ``packing`` writes such files; they are read here.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zeroflow.errors import ConfigError
from zeroflow.results.parquet import declared
from zeroflow.results.storage import File, Storage

NAME = "packed.parquet"


class PackedTable:
    """The packed file of a table.

    Args:
        storage: where it is.
        file: which one.
        key: the column that names the cell, the search or the landscape.

    Raises:
        ConfigError: it cannot be read, or is not what ``packing`` writes. So does every method.
    """

    def __init__(self, storage: Storage, file: File, key: str) -> None:
        self.storage, self.file, self.key = storage, file, key
        self._lock = threading.Lock()  # a reader of Parquet is for one thread
        with self._reading():
            self._parquet = pq.ParquetFile(storage.open(file.name), pre_buffer=True, page_checksum_verification=True)
            self.columns: list[str] = list(self._parquet.schema_arrow.names)
            if key not in self.columns:
                raise pa.ArrowInvalid(f"no column {key}")
            self._bounds = list(self._ranges())
            if self._bounds != sorted(self._bounds):
                raise pa.ArrowInvalid(f"not sorted by {key}")
            ids = pc.unique(self._parquet.read(columns=[key])[key]).to_pylist()
        self.ids: dict[str, None] = dict.fromkeys(ids)
        self._group: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return int(self._parquet.metadata.num_rows)

    def read(self, schema: pa.Schema, ids: Collection[str] | None = None) -> pa.Table:
        """The rows in the columns of ``schema``, of some ids or of all; of row groups that cannot hold them nothing is read."""
        names = [name for name in schema.names if name in self.columns]
        with self._reading():
            if ids is None:
                return declared(self._parquet.read(columns=names), schema)
            wanted = sorted(ids)
            groups = [
                number
                for number, (first, last) in enumerate(self._bounds)
                if (place := bisect.bisect_left(wanted, first)) < len(wanted) and wanted[place] <= last
            ]
            rows = self._parquet.read_row_groups(groups, columns=list(dict.fromkeys([self.key, *names])))
            kept = rows.filter(pc.is_in(rows[self.key], pa.array(wanted, pa.string())))
            return declared(kept, schema)

    def rows_of(self, id_: str, schema: pa.Schema) -> pa.Table:
        """The rows of one id. One after the other in their order is quick: the last row group is kept."""
        number = bisect.bisect_left([last for _, last in self._bounds], id_)
        if id_ not in self.ids:
            return schema.empty_table()
        with self._reading():
            if self._group is None or self._group[0] != number:
                self._group = number, self._parquet.read_row_group(number)
            _, rows = self._group
            return declared(rows.filter(pc.field(self.key) == id_), schema)

    def _ranges(self) -> Iterator[tuple[str, str]]:
        """The smallest and the largest id of each row group."""
        footer = self._parquet.metadata
        names = [footer.schema.column(number).path for number in range(footer.num_columns)]
        for group in range(footer.num_row_groups):
            found = footer.row_group(group).column(names.index(self.key)).statistics
            if found is None or not found.has_min_max:
                raise pa.ArrowInvalid(f"no statistics of {self.key}")
            yield found.min, found.max

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ConfigError(
                f"results {self.storage.root!r}: {self.file.name} cannot be read: {' '.join(str(error).split())}; expected what 'zeroflow pack' "
                "writes: bring it back from a copy, or remove it and run its cells again"
            ) from None
