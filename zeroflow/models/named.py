"""Import a Python callable by its name, ``module:attribute``, as in a grid file."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from zeroflow.errors import ConfigError, unknown

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_searched: list[str] = []


def is_name(text: str) -> bool:
    """Whether a string has the form ``module:attribute``."""
    return bool(_NAME.fullmatch(text))


def find_modules_in(*folders: str | Path) -> None:
    """Make modules of these folders importable, after all others, so that none shadows an installed one.

    The change is permanent, since a module may import its neighbours as late as when it is called.
    """
    for folder in map(str, folders):
        if folder not in _searched:
            _searched.append(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def import_callable(name: str, where: str = "endpoint") -> Callable[..., Any]:
    """Import a callable by name. Its module is installed, in the current folder, or in one of ``find_modules_in``.

    Args:
        name: ``module:attribute``.
        where: the key that holds the name, for messages.

    Raises:
        ConfigError: the module or attribute does not exist, the import fails, or the attribute cannot be called with images.
    """
    find_modules_in(Path.cwd())
    place = f"{where}={name!r}"
    module_name, _, attribute = name.partition(":")
    module = _imported(module_name, place)
    if not hasattr(module, attribute):
        raise unknown(f"name in module {module_name}", attribute, _callables(module), where=place)
    found = getattr(module, attribute)
    if isinstance(found, type) or not callable(found):
        kind = "a class" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise ConfigError(f"{place}: it is {kind}; expected a function, or an object that is called with images")
    return found


def _imported(name: str, place: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise ConfigError(f"{place}: {name} cannot be imported: {type(error).__name__}: {error}") from error
    beside = sorted({file.stem for folder in _searched for file in Path(folder).glob("*.py")})
    nearest = difflib.get_close_matches(name, beside, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
    raise ConfigError(
        f"{place}: no module {missing!r}; {hint}it may be installed, or a file in {' or '.join(_searched)}"
    )


def _callables(module: ModuleType) -> list[str]:
    """Names of the callables that a module itself defines, without classes."""
    functions = FunctionType | BuiltinFunctionType
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and not isinstance(value, type) and not name.startswith("_")
        if not isinstance(value, functions) or value.__module__ == module.__name__
    ]
