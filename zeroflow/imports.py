"""Python files of one's own that register what a grid may name, and travel with a sweep as text."""

from __future__ import annotations

import hashlib
import importlib
import linecache
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zeroflow.errors import ConfigError
from zeroflow.registry import registered_meanwhile

if TYPE_CHECKING:
    from zeroflow.trial.config import TrialConfig


@dataclass(frozen=True)
class SourceFile:
    """A Python file as text, as it goes to the processes of a sweep.

    Attributes:
        path: where it was read.
        text: its content.
    """

    path: str
    text: str

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def digest(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of its text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


MODULE = "zeroflow_import_"
"""What the names of the modules of imported files begin with."""

_imported: dict[str, SourceFile] = {}
_importing: list[SourceFile] = []
_registered: dict[str, frozenset[str]] = {}


def import_file(path: str | Path) -> SourceFile:
    """Run a Python file that registers methods, optimizers, data sets and the like; once in a process.

    Args:
        path: of the file. It may import what is installed, but no other file beside it.

    Raises:
        ConfigError: it cannot be read, or does not run.
    """
    file = Path(path).expanduser()
    try:
        source = SourceFile(str(file.resolve()), file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"import {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    run_source(source)
    return source


def run_source(source: SourceFile) -> None:
    """The same for a file that was read elsewhere.

    Raises:
        ConfigError: it does not run, or another file of its name was run before.
    """
    known = _imported.get(source.name)
    if known is not None:
        if known.digest != source.digest:
            raise ConfigError(
                f"import {source.path}: another {source.name} is imported already ({known.digest}, now {source.digest}); "
                "rename the file, or start a new process"
            )
        return
    importlib.import_module("zeroflow.trial.trial")  # whose own registrations are none of the file's
    module = ModuleType(_module_name(source))
    module.__file__ = source.path
    # Dataclasses look their module up; tracebacks show lines also where the file itself is not.
    sys.modules[module.__name__] = module
    linecache.cache[source.path] = (len(source.text), None, source.text.splitlines(keepends=True), source.path)
    _importing.append(source)
    try:
        with registered_meanwhile() as registered:
            exec(compile(source.text, source.path, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise ConfigError(f"import {source.path}: does not run: {_line_of(error, source.path)}") from error
    finally:
        _importing.pop()
    _imported[source.name], _registered[source.name] = source, frozenset(name for _, name in registered)


def refuse_while_importing() -> None:
    """Refuse what an imported file may not do while it is imported, in every process again: run a trial."""
    if _importing:
        raise ConfigError('a trial is run while the file is imported; put that below if __name__ == "__main__":')


def imported_files() -> tuple[SourceFile, ...]:
    """The files that this process has imported, in that order."""
    return tuple(_imported.values())


def imports_of(config: TrialConfig) -> dict[str, str]:
    """The imported files that a cell computes with: their digests by name.

    They registered or define something that the cell names, or that stands by default where it names nothing: the transform
    of its data set, the classifier of its method.
    """
    if not _imported:
        return {}
    from zeroflow.trial.own_code import modules_of, parts_of  # late: it knows all registries

    parts = parts_of(config)
    named = {*_strings(vars(config)), *(part.name for part in parts)}
    named |= {name for part in parts for name in _strings(part.options)}
    return imports_with(named, modules_of(part.entry for part in parts))


def imports_with(named: Set[str], modules: Set[str]) -> dict[str, str]:
    """The imported files that registered one of some names, or are one of some modules: their digests by name."""
    named = named | {name.partition(":")[0] for name in named}  # families of data sets
    return {
        name: source.digest
        for name, source in _imported.items()
        if _registered[name] & named or _module_name(source) in modules
    }


def is_imported(file: Path) -> bool:
    """Whether this process has imported the file at a path."""
    known = _imported.get(file.name)
    return known is not None and Path(known.path) == file.resolve()


def _module_name(source: SourceFile) -> str:
    return f"{MODULE}{Path(source.name).stem}"


def _strings(values: Mapping[str, Any]) -> Iterator[str]:
    """All strings among values, and in the mappings and lists among them."""
    left: list[Any] = list(values.values())
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list | tuple):
            left += value.values() if isinstance(value, Mapping) else value


def _line_of(error: BaseException, path: str) -> str:
    """An error with the line of the file that it comes from."""
    line, frame = getattr(error, "lineno", None), error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == path:
            line = frame.tb_lineno
        frame = frame.tb_next
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {error}"
