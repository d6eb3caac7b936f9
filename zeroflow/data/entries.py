"""What lies in the folders of a data set: files that are used, and what may lie beside them."""

from __future__ import annotations

import os
from pathlib import Path

# What may lie beside images, and Parquet files, without being one: notes, annotations, what file managers leave.
# docs/data.md lists them.
BESIDE = frozenset(
    {".txt", ".md", ".json", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html", ".pdf", ".db", ".ini", ".py", ".log"}
)


def entries_of(folder: Path, problems: list[str]) -> list[os.DirEntry[str]]:
    """Sorted entries of a folder without hidden ones; entries cache their kind. Appends to ``problems``."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"{folder}: {error.strerror}")
        return []


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; a link that leads nowhere or to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """The same for files."""
    try:
        return entry.is_file()
    except OSError:
        return False
