"""The one exception for bad input: it names the place, the value, what was expected and the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ConfigError(ValueError):
    """A value given by the user cannot be used. The message is complete: no traceback is needed to act on it."""


def unknown(kind: str, value: object, known: Iterable[str], *, where: str = "", otherwise: str = "") -> ConfigError:
    """Build the error for a name that is not among ``known``, with the nearest right ones first.

    Args:
        kind: what the name stands for, e.g. ``"optimizer"``.
        value: what was given.
        known: every name that would have been right.
        where: file and key the value came from, if known.
        otherwise: added where nothing is near, since the name may well be right.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    if nearest:
        hint = f"did you mean {' or '.join(map(repr, nearest))}?"
    else:
        hint = f"known: {', '.join(names) or 'none'}{otherwise}"
    return ConfigError(f"{where + ': ' if where else ''}unknown {kind} {value!r}; {hint}")


def all_at_once(title: str, problems: Sequence[str], *, shown: int = 200) -> ConfigError:
    """Build the error for several problems, one line each; beyond ``shown`` of them, only the number of the others."""
    left = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return ConfigError("\n  ".join([title, *problems[:shown], *left]))


def is_text(value: str) -> bool:
    """Whether a name can be written as UTF-8; one of the command line or of a folder that is not has surrogates in it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)
