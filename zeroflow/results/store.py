"""The store: what the files of a cell mean.

A finished cell is a file per table, ``<root>/<table>/<cell id>.parquet``, or rows of ``<root>/<table>/packed.parquet``
(see ``packing``); where it is both, the file of its own counts, being the later one. A cell is done exactly if its row in
``trials`` is readable, which is why that file is written last. Writing a cell again replaces its files; no file is ever
appended to, so any number of processes may write at once. Three tables are not by cell: ``searches`` has a file per search,
``trajectories`` and ``surfaces`` one per landscape of two losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.errors import ConfigError, unknown
from zeroflow.results import agreement, packed, parquet
from zeroflow.results.claims import Claims
from zeroflow.results.integrity import READ, as_today, contradictions, without, without_contradictions
from zeroflow.results.packed import PackedTable
from zeroflow.results.schema import SCHEMA_VERSION, SCHEMAS
from zeroflow.results.storage import File, Storage, open_storage

NOT_BY_CELL = ("failures", "searches", "trajectories", "surfaces")
"""Tables whose files are there whether or not a cell is done."""

BY_CELL = tuple(name for name in SCHEMAS if name not in (*NOT_BY_CELL, "trials"))
"""Tables whose rows count if their cells are done."""

_OF_ALL_CELLS = ("stages", "accuracy")  # tables in which every cell that is done has rows

# The columns of ``trials`` that tell whether a row is as it was written, and by whom.
_CHECKED = pa.schema([SCHEMAS["trials"].field(name) for name in (*READ, "schema_version")])
_KEYS = {"searches": "search_id", "trajectories": "landscape_id", "surfaces": "landscape_id"}
_READERS = 16  # threads that wait for files
_AT_ONCE = 128  # files that one of them reads before it decodes them together
_NAMED = 5  # cells that a warning names
_TRIES = 3  # listings of a folder from which files vanish while they are read


def key_of(table: str) -> str:
    """The column that names what a file of a table holds: a cell, a search or a landscape."""
    return _KEYS.get(table, "cell_id")


class _Loaded(NamedTuple):
    """Rows; files that could not be read; whether some vanished since they were listed; done cells without rows."""

    rows: pa.Table
    unreadable: list[str]
    vanished: bool
    lacking: list[str]


class Store:
    """The results of any number of cells. Reading never writes.

    Args:
        root: a folder, made absolute at once, a URI that pyarrow knows (``s3://bucket/path``, ``gs://...``), or a storage.

    Raises:
        ConfigError: a URI nobody knows, or a folder that is a file.
    """

    def __init__(self, root: str | Path | Storage) -> None:
        self.storage = root if isinstance(root, Storage) else open_storage(root)
        self.root = self.storage.root
        self._opened: dict[str, PackedTable] = {}
        self._readable: dict[File, bool] = {}  # of files of ``trials``, whether their row can be read

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    # Writing

    def write(self, tables: dict[str, pa.Table]) -> None:
        """Write the tables of one cell, ``trials`` last, and drop the record of an earlier failure.

        Raises:
            ValueError: columns other than the declared ones, or rows of more than one cell; nothing is written then.
        """
        encoded = {name: parquet.encode(name, table) for name, table in tables.items()}
        cells = {cell for table in tables.values() for cell in pc.unique(table["cell_id"]).to_pylist()}
        if len(cells) != 1:
            raise ValueError(f"expected the tables of one cell, got those of {sorted(cells)}")
        cell = cells.pop()
        for name in sorted(encoded, key=lambda name: name == "trials"):
            self.storage.write(file_of(name, cell), encoded[name])
        if "trials" in tables:
            self.storage.delete(file_of("failures", cell))

    def write_failure(self, table: pa.Table) -> None:
        """Record that a cell failed: one row from ``rows.failure``."""
        self.storage.write(file_of("failures", table["cell_id"][0].as_py()), parquet.encode("failures", table))

    def write_search(self, table: pa.Table) -> None:
        """Write a search: all of its rows, in place of those of an earlier run of it.

        Raises:
            ValueError: columns other than the declared ones, or rows of more than one search.
        """
        (search,) = pc.unique(table["search_id"]).to_pylist()
        self.storage.write(file_of("searches", search), parquet.encode("searches", table))

    def write_landscape(self, trajectories: pa.Table, surface: pa.Table) -> None:
        """Write a landscape of two losses and the runs on it, in place of an earlier one that is the same.

        Raises:
            ValueError: columns other than the declared ones, or rows of more than one landscape; nothing is written then.
        """
        found = {"surfaces": surface, "trajectories": trajectories}
        encoded = {name: parquet.encode(name, table) for name, table in found.items()}
        (landscape,) = {id_ for table in found.values() for id_ in pc.unique(table["landscape_id"]).to_pylist()}
        for name, data in encoded.items():
            self.storage.write(file_of(name, landscape), data)

    # Files that are no tables, and what belongs to the storage

    def exists(self) -> bool:
        """Whether anything has been written here."""
        return self.storage.exists(tuple(SCHEMAS))

    def check_room(self, cells: int) -> None:
        """See that there is room for the files of so many cells. Nothing is written.

        Raises:
            ConfigError: the disk has too little.
        """
        self.storage.check_room(cells)

    def check_writable(self) -> None:
        """See that the store takes files, and make a local store's folder.

        Raises:
            ConfigError: the folder cannot be made or written; no such bucket, no credentials, no access.
        """
        self.storage.check_writable()

    def claims(self) -> Claims:
        """A process's claims on cells, so that sweeps on the same store at the same time run no cell twice.

        Raises:
            ConfigError: the store cannot be written.
        """
        return self.storage.claims()

    def put_file(self, name: str, data: bytes) -> None:
        """Write a small file that is no table, whole; ``name`` is relative to the store."""
        self.storage.write(name, data)

    def drop_file(self, name: str) -> None:
        """Remove such a file if it is there."""
        self.storage.delete(name)

    def files(self, folder: str) -> list[tuple[str, bytes]]:
        """Such files in a folder of the store, by name, and what is in them."""
        found = self.storage.list(folder)
        return [(file.name.rpartition("/")[2], data) for file in found if (data := self.storage.read(file.name))]

    def names(self, folder: str) -> list[str]:
        """The names of such files in a folder of the store and below, relative to it."""
        return [file.name.removeprefix(f"{folder}/") for file in self.storage.list(folder, recursive=True)]

    # Reading

    def has(self, cell: str) -> bool:
        """Whether a cell is finished; see ``done``."""
        file = self.storage.stat(file_of("trials", cell))
        if file is not None and self._readable_of([file]):
            return True
        table = self.packed("trials")
        return table is not None and cell in table.ids

    def done(self) -> set[str]:
        """Ids of the finished cells.

        Every file of ``trials`` is read, once, for its checksum: one that is not as it was written does not count.

        Raises:
            ConfigError: a newer zeroflow wrote the store, a packed file cannot be read, or the object store cannot be reached.
        """
        trials = self.loose("trials")
        self._refuse_newer(trials)
        return self._done(trials)

    def failure(self, cell: str) -> File | None:
        """The file that records a cell's failure."""
        return self.storage.stat(file_of("failures", cell))

    def failures(self) -> dict[str, File]:
        """The files that record failures, by cell."""
        return {file.stem: file for file in self.loose("failures")}

    def failed(self) -> dict[str, dict[str, Any]]:
        """The failure of every cell that failed and has not been finished since, by cell id."""
        done = self.done()
        return {row["cell_id"]: row for row in self.load("failures").to_pylist() if row["cell_id"] not in done}

    def row(self, table: str, cell: str) -> dict[str, Any] | None:
        """The row of one cell in a table that has one for each; None if there is none, or none that can be read."""
        rows = self._read(SCHEMAS[table], [file_of(table, cell)])[0]
        if not len(rows) and (whole := self.packed(table)):
            rows = whole.rows_of(cell, SCHEMAS[table])
        return rows.to_pylist()[0] if len(rows) else None

    def load(self, table: str, columns: Sequence[str] | None = None, cells: Collection[str] | None = None) -> pa.Table:
        """The rows of a table, cells in the order of their ids, in the declared columns; empty if there are none.

        Rows of cells that are not done (the process was killed between two files) are left out. Files that cannot be
        read, or hold rows of another cell than their name says (a copy under another name), are skipped, with a warning that
        names them; one of a packed table is an error. So are rows of ``trials`` that contradict their own configuration.

        Args:
            table: its name.
            columns: the ones to read, which is quicker than all; default: all.
            cells: ids of those to read (of searches, of landscapes), which is quicker than all; default: all.

        Raises:
            ConfigError: no such table, a newer zeroflow wrote the store, a packed file cannot be read, or the object store
                cannot be reached.
        """
        if table not in SCHEMAS:
            raise unknown("table", table, SCHEMAS)
        schema = SCHEMAS[table]
        if columns is not None:
            schema = pa.schema([field for field in schema if field.name in columns], metadata=schema.metadata)
        # Whatever is asked for: which rows are as they were written takes more of them.
        needed = pa.unify_schemas([schema, _CHECKED]) if table == "trials" else schema
        for _ in range(_TRIES):
            found = self._load(table, needed, None if cells is None else set(cells))
            if not found.vanished or table == "failures":
                break
        if found.unreadable:
            named = ", ".join(f"{self.root}/{name}" for name in found.unreadable)
            warnings.warn(
                f"skipped files that cannot be read, or hold other rows than their name says: {named}", stacklevel=2
            )
        if found.lacking:
            warnings.warn(
                f"done cells of {self.root} have no rows in {table}: {', '.join(found.lacking[:_NAMED])}"
                f"{', ...' if len(found.lacking) > _NAMED else ''}; if it was copied while it was written, merge the original into it",
                stacklevel=2,
            )
        if table == "trials":
            self._check_version(found.rows["schema_version"])
        rows = as_today(found.rows) if table == "trials" else found.rows
        return rows.select(schema.names).replace_schema_metadata(schema.metadata)

    def loose(self, table: str) -> list[File]:
        """The files of a table that hold one cell each (one search, one landscape), whole or not, by name."""
        return [
            file
            for file in self.storage.list(table)
            if file.name.endswith(".parquet") and file.name != f"{table}/{packed.NAME}"
        ]

    def packed(self, table: str) -> PackedTable | None:
        """The packed file of a table; None if it has none.

        Raises:
            ConfigError: it cannot be read.
        """
        file = self.storage.stat(f"{table}/{packed.NAME}")
        if file is None:
            return None
        opened = self._opened.get(table)
        if opened is None or opened.file != file:
            opened = self._opened[table] = PackedTable(self.storage, file, key_of(table))
        return opened

    def _load(self, table: str, schema: pa.Schema, cells: set[str] | None) -> _Loaded:
        # Listed first: what is done by then has its files in every other table. And a packed file after the loose ones:
        # who packs removes these when that one is there.
        trials = self.loose("trials")
        self._refuse_newer(trials)
        kept = cells
        if table != "trials" and table not in NOT_BY_CELL:
            done = self._done([file for file in trials if cells is None or file.stem in cells])
            kept = done if cells is None else cells & done
        files = trials if table == "trials" else self.loose(table)
        whole = self.packed(table)
        files = [file for file in files if kept is None or file.stem in kept]

        key = key_of(table)
        keyed = schema if key in schema.names else schema.insert(0, SCHEMAS[table].field(key))
        rows, unreadable, vanished = self._read(keyed, [file.name for file in files])
        if table == "trials":
            rows = without_contradictions(rows, self.root, stacklevel=3)
            self._note(files, rows)
        if whole is not None:
            rows = self._joined(table, keyed, rows, whole, kept)
        lacking: set[str] = set()
        if table in _OF_ALL_CELLS and kept is not None:
            lacking = kept - set(pc.unique(rows[key]).to_pylist()) - {Path(name).stem for name in unreadable}
        return _Loaded(rows.select(schema.names), unreadable, vanished, sorted(lacking))

    def _joined(
        self, table: str, schema: pa.Schema, rows: pa.Table, whole: PackedTable, kept: set[str] | None
    ) -> pa.Table:
        """Loose and packed rows in the order of their ids; of a cell that is both, the loose ones."""
        key = key_of(table)
        own = set(pc.unique(rows[key]).to_pylist())
        both = own & whole.ids.keys()
        missing = whole.ids.keys() - own if kept is None else whole.ids.keys() & kept - own
        others = whole.read(schema, None if len(missing) == len(whole.ids) else missing)
        if table == "trials":
            others = without_contradictions(others, self.root, stacklevel=4)
        for found in self.differences(whole, both) if table == "trials" and both else ():
            there = f"{self.root}/{whole.file.name}", f"{self.root}/{file_of('trials', found.cell)}"
            warnings.warn(f"{found.described(*there)}; the latter counts", stacklevel=4)
        if not len(rows) or not len(others):
            return rows if len(rows) else others
        together = pa.concat_tables([others, rows])
        return together.take(pc.sort_indices(together[key]))  # a stable sort: a cell's rows stay in their order

    def differences(self, whole: PackedTable, cells: Collection[str]) -> list[agreement.Difference]:
        """Where the loose rows of cells in ``trials`` have other results than the packed ones."""
        loose = self._read(agreement.SCHEMA, [file_of("trials", cell) for cell in sorted(cells)])[0]
        return agreement.differences(whole.read(agreement.SCHEMA, cells), loose)

    def _done(self, trials: Sequence[File]) -> set[str]:
        readable = self._readable_of(trials)
        whole = self.packed("trials")
        return {file.stem for file in readable} | (whole.ids.keys() if whole else set())

    def _readable_of(self, trials: Sequence[File]) -> list[File]:
        """Those of some files whose row is as it was written; what is known of a file is not looked at again."""
        if fresh := [file for file in trials if file not in self._readable]:
            rows = self._read(_CHECKED, [file.name for file in fresh])[0]
            self._check_version(rows["schema_version"])
            self._note(fresh, without(rows, contradictions(rows)))
        return [file for file in trials if self._readable[file]]

    def _note(self, trials: Sequence[File], rows: pa.Table) -> None:
        ids = set(rows["cell_id"].to_pylist())
        self._readable |= {file: file.stem in ids for file in trials}

    def _refuse_newer(self, trials: Sequence[File]) -> None:
        # The latest file tells: this version refuses to add to a store in which it finds a newer one.
        latest = max(trials, key=lambda file: file.mtime_ns, default=None)
        version = pa.schema([SCHEMAS["trials"].field("schema_version")])
        self._check_version(self._read(version, [latest.name] if latest else [])[0]["schema_version"])
        if whole := self.packed("trials"):
            self._check_version(whole.read(version)["schema_version"])

    def ids_of(self, table: str) -> set[str]:
        """What there is of a table, whether or not it can be read: ids of cells, of searches, of landscapes."""
        whole = self.packed(table)
        return {file.stem for file in self.loose(table)} | (whole.ids.keys() if whole else set())

    def bytes_of(self, table: str, id_: str) -> bytes | None:
        """The file of a cell, a search or a landscape, as it is or as it was before it was packed; None if none can be read."""
        name = file_of(table, id_)
        data = self.storage.read(name)
        if data is not None:
            rows, unreadable = parquet.decode_all({name: data}, SCHEMAS[table], key_of(table))
            data = None if unreadable or (table == "trials" and contradictions(rows)) else data
        whole = None if data else self.packed(table)
        if whole is not None and id_ in whole.ids:
            return parquet.encode(table, whole.rows_of(id_, SCHEMAS[table]))
        return data

    def _read(self, schema: pa.Schema, names: Sequence[str]) -> tuple[pa.Table, list[str], bool]:
        """The rows of some files in the columns of ``schema``; which could not be read; whether some are not there."""
        key = next((key_of(name.partition("/")[0]) for name in names), None)
        key = key if key in schema.names else None

        decoding = Lock()  # work of the interpreter, for which threads would only get in each other's way

        def read(some: Sequence[str]) -> tuple[pa.Table, list[str], int]:
            found = {name: self.storage.read(name) for name in some}
            there = {name: data for name, data in found.items() if data is not None}
            with decoding:
                return *parquet.decode_all(there, schema, key), len(found) - len(there)

        batches = [names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE)]
        with ThreadPoolExecutor(_READERS) as pool:
            parts = list(pool.map(read, batches))
        rows = pa.concat_tables([schema.empty_table(), *(part for part, _, _ in parts)])
        unreadable = sorted(name for _, some, _ in parts for name in some)
        return rows, unreadable, any(gone for _, _, gone in parts)

    def _check_version(self, versions: pa.ChunkedArray) -> None:
        newest = pc.max(versions).as_py()
        if newest is not None and newest > SCHEMA_VERSION:
            raise ConfigError(
                f"results {self.root!r}: written in schema version {newest} by a newer zeroflow; "
                f"this one reads up to {SCHEMA_VERSION}: update zeroflow"
            )


def file_of(table: str, id_: str) -> str:
    """The name of the file of a cell, a search or a landscape."""
    return f"{table}/{id_}.parquet"
