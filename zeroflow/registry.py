"""Registries that other packages can add to: methods, optimizers, data sets, transforms.

One decorator or one call registers an entry. Packages outside zeroflow register through an entry point of the group
``zeroflow.<kind>s`` (for example ``zeroflow.optimizers``): it names a module, and importing that module registers its entries.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from zeroflow.errors import ConfigError, unknown

T = TypeVar("T")

_listening: list[list[tuple[dict[str, Any], str]]] = []


@contextmanager
def registered_meanwhile() -> Iterator[list[tuple[dict[str, Any], str]]]:
    """What is registered within the block, families too: where, and its name. All of it is undone if the block raises."""
    found: list[tuple[dict[str, Any], str]] = []
    _listening.append(found)
    try:
        yield found
    except BaseException:
        for entries, name in found:
            del entries[name]
        raise
    finally:
        _listening.pop()  # blocks are nested, and two lists may be equal


class Registry(Generic[T]):
    """A mapping from names to entries, filled by registrations and by entry points (loaded on the first look-up).

    Args:
        kind: the singular noun used in messages and in the entry point group, e.g. ``"optimizer"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self.families: dict[str, Callable[[str], T]] = {}
        self._loaded = False

    def register(self, name: str, entry: T) -> T:
        """Add ``entry`` under ``name``; a name can be taken only once."""
        self._add(self._entries, name, entry)
        return entry

    def register_family(self, prefix: str, make: Callable[[str], T]) -> None:
        """Let every name ``<prefix>:<rest>`` stand for ``make(rest)``, without a registration of its own."""
        self._add(self.families, prefix, make)

    def _add(self, entries: dict[str, Any], name: str, entry: Any) -> None:
        if name in entries:
            raise ConfigError(f"{self.kind} {name!r} is registered already")
        entries[name] = entry
        for found in _listening:
            found.append((entries, name))

    def names(self, pattern: str = "*") -> list[str]:
        """Names that match a shell-style ``pattern``, sorted."""
        self._load_entry_points()
        return sorted(fnmatch.filter(self._entries, pattern))

    def get(self, name: str, *, where: str = "") -> T:
        """The entry registered as ``name``.

        Raises:
            ConfigError: nothing has that name; the message names the nearest ones.
        """
        self._load_entry_points()
        prefix, colon, rest = str(name).partition(":")
        if colon and prefix in self.families:
            try:
                return self.families[prefix](rest)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}" if where else str(error)) from None
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            known = [*self._entries, *(f"{prefix}:NAME" for prefix in self.families)]
            own = "; one of your own must be imported first (--import FILE)"
            raise unknown(self.kind, name, known, where=where, otherwise=own) from None

    def items(self) -> Iterator[tuple[str, T]]:
        for name in self.names():
            yield name, self._entries[name]

    def _load_entry_points(self) -> None:
        if self._loaded:
            return
        for entry_point in entry_points(group=f"zeroflow.{self.kind}s"):
            entry_point.load()
        self._loaded = True
