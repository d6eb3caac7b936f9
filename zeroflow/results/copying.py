"""Copying from store to store: a file of its own byte for byte, what is packed as it was before, nothing that cannot be read."""

from __future__ import annotations

import warnings

import pyarrow.compute as pc

from zeroflow.results import agreement
from zeroflow.results.store import BY_CELL, Store, file_of, key_of


def copy_cell(target: Store, cell: str, source: Store) -> bool:
    """Copy the rows of a cell that is done in ``source``, ``trials`` last.

    Returns:
        False if the cell is done in ``target``, or no longer in ``source``; nothing is written then.
    """
    if target.has(cell):
        return False
    files = {name: source.bytes_of(name, cell) for name in (*BY_CELL, "trials")}
    if not files["trials"]:
        return False
    for name, data in files.items():
        if data is not None:
            target.storage.write(file_of(name, cell), data)
    target.storage.delete(file_of("failures", cell))
    return True


def complete(target: Store, source: Store) -> None:
    """Copy rows of cells that are done in both stores, in tables where ``target`` has none of them that can be read."""
    both = target.done() & source.done()
    for table in BY_CELL:
        _copy_lacking(target, source, table, source.ids_of(table) & both)


def copy_others(target: Store, source: Store) -> None:
    """Copy the searches and landscapes that ``target`` lacks; warn of searches that have other tries there."""
    agreement.warn_of_differences("searches", [target.load("searches")], source.load("searches"), source.root)
    for table in ("searches", "surfaces", "trajectories"):
        _copy_lacking(target, source, table, source.ids_of(table))


def _copy_lacking(target: Store, source: Store, table: str, ids: set[str]) -> None:
    if not ids:
        return
    with warnings.catch_warnings():  # of what is about to be mended
        warnings.simplefilter("ignore")
        there = target.load(table, [key_of(table)], ids)
    for id_ in sorted(ids - set(pc.unique(there[key_of(table)]).to_pylist())):
        if data := source.bytes_of(table, id_):
            target.storage.write(file_of(table, id_), data)
