"""Seeded mutations: what people, editors, disks and copying programs do to the files that zeroflow reads.

Each ends as success with the right numbers, or as one refusal before any cell runs that names its place: never another error, a
wrong number or a lost cell. Every mutation is drawn from ``SEED``, the kind of its input, the input and its number; ``-m long``
takes ten times as many others.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from zeroflow.errors import ConfigError

SEED = 20251
Check = Callable[[], str | None]
"""Returns what is wrong with what was accepted; None: nothing."""


VALUES = (
    ".nan", "-.inf", "1e999", "-1", "0", "-0.0", "1", "1.0", "7", "1e-320", "9" * 400, "9" * 5000, "''", "null", "~", "[]", "{}", "[[]]",
    "[1, 2, 2]", "{a: 1}", "2024-02-30", "2024-01-01", "true", "off", "'12'", "'1e-3'", "12abc", "1:30", "010", "0x1F", "1_000", "!!int abc",
    "!!bool maybe", "!!float x", "!!binary x", r'"\UFFFFFFFF"', r'"\0"', r'"\uD800"', "[" * 1000 + "]" * 1000, "*nowhere", "&a [*a]",
    "!!python/object/apply:os.system [true]", "../..", "/", "'>= nan'", "é",
)  # fmt: skip
"""What may stand in the place of a value, as YAML text."""
_HOLE = "@hole@"  # quoted wherever it stands, for no plain text begins so


def damaged(data: bytes, random: Random) -> tuple[str, bytes]:
    """What a disk or an interrupted copy makes of some bytes."""
    place = random.randrange(len(data))
    end = min(len(data), place + random.choice((1, 16, 512)))
    kind = random.choice(("cut", "flip", "flip", "flip", "zero", "lose", "insert", "double", "empty", "front"))
    if kind == "flip":
        return f"flip a bit of byte {place}", data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[
            place + 1 :
        ]
    found = {
        "cut": data[:place],
        "zero": data[:place] + bytes(end - place) + data[end:],
        "lose": data[:place] + data[end:],
        "insert": data[:place] + random.randbytes(end - place) + data[place:],
        "double": data + data,
        "empty": b"",
        "front": random.randbytes(16) + data,
    }[kind]
    return f"{kind} at byte {place} to {end}", found


def numbers(count: int) -> list[Any]:
    """The numbers of a kind's mutations: those of every run, and those of a long one."""
    return [
        pytest.param(range(count), id=f"seed-{SEED}"),
        pytest.param(range(count, 11 * count), id=f"seed-{SEED}-long", marks=pytest.mark.long),
    ]


def judged(kind: str, some: range, one: Callable[[Random, int], tuple[str, Check, str]]) -> list[str]:
    """What is wrong with the mutations of these numbers, each with kind, number and description.

    Args:
        kind: of the input, and which.
        some: numbers of the mutations.
        one: makes a mutation; returns its description, its check, and what a refusal must name.
    """
    problems = []
    for number in some:
        what, check, name = one(Random(f"{SEED} {kind} {number}"), number)
        try:
            wrong = check()
        except ConfigError as error:
            wrong = None if name in str(error) else f"the refusal does not name {name}: {error}"
        except Exception as error:
            wrong = f"raw {type(error).__name__}: {error}"
        if wrong:
            problems.append(f"{kind}, number {number} of seed {SEED}: {what}: {wrong[:600]}")
    return problems


# Grid files


def places(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values of a tree of mappings and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*here, key)
        yield from places(value, (*here, key))


def parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def misspelt(word: str, random: Random) -> str:
    place = random.randrange(max(1, len(word) - 1))
    return random.choice(
        (
            word[:place] + word[place + 1 :],
            word[:place] + word[place : place + 2][::-1] + word[place + 2 :],
            word + "s",
            word.upper(),
        )
    )


def changed_tree(tree: Any, random: Random) -> tuple[str, str]:
    """A value replaced, or a key lost, misspelt or put elsewhere."""
    tree = copy.deepcopy(tree)
    path = random.choice(list(places(tree)))
    holder, key = parent(tree, path), path[-1]
    kind = random.choice(("value", "value", "value", "value", "lose", "misspell"))
    if kind == "misspell" and isinstance(key, str):
        new = misspelt(key, random)
        holder[new] = holder.pop(key)
        return f"{path}: misspelt as {new!r}", dumped(tree)
    if kind == "lose":
        del holder[key]
        return f"{path}: lost", dumped(tree)
    value = random.choice(VALUES)
    holder[key] = _HOLE
    return f"{path}: {value[:40]}", dumped(tree).replace(f"'{_HOLE}'", value)


def dumped(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10**6)


def changed_text(text: str, random: Random) -> tuple[str, bytes]:
    """Lines or encodings that an editor, or a person, has got wrong."""
    lines = text.splitlines(keepends=True)
    line = random.choice([number for number, words in enumerate(lines) if words.strip()])
    kind = random.choice(("twice", "lost", "tab", "utf-16", "latin-1", "nul", "indent", "swap"))
    if kind == "utf-16":
        return kind, text.encode("utf-16")
    if kind == "latin-1":
        return kind, (text + "# caf\xe9\n").encode("latin-1")
    if kind == "swap":
        other = random.randrange(len(lines))
        lines[line], lines[other] = lines[other], lines[line]
    else:
        words = lines[line]
        lines[line] = {"twice": words * 2, "lost": "", "tab": f"\t{words}", "indent": f" {words}", "nul": f"\0{words}"}[
            kind
        ]
    return f"line {line}: {kind}", "".join(lines).encode()


def shuffled(tree: Any, random: Random) -> Any:
    """The same tree with its keys in another order."""
    if isinstance(tree, dict):
        return {key: shuffled(tree[key], random) for key in random.sample(list(tree), len(tree))}
    return [shuffled(value, random) for value in tree] if isinstance(tree, list) else tree


def respelt(tree: Any, random: Random) -> str:
    """The same numbers in other spellings; an integer stays one."""
    tree, texts = copy.deepcopy(tree), []
    for path in list(places(tree)):
        value, key = parent(tree, path)[path[-1]], path[-1]
        if isinstance(value, int | float) and not isinstance(value, bool):
            whole = (
                (f"+{value}", hex(value), f"0b{value:b}") if isinstance(value, int) and value >= 0 else (repr(value),)
            )
            spellings = (
                whole if isinstance(value, int) else (repr(value), f"{value:.17e}", f"+{value!r}", f"{value:.17E}")
            )
            if isinstance(value, float) and value.is_integer():
                spellings = (*spellings, str(int(value)))
            texts.append(random.choice(spellings))
            parent(tree, path)[key] = f"@{len(texts) - 1}@"
    text = dumped(tree)
    for number, spelling in enumerate(texts):
        text = text.replace(f"'@{number}@'", spelling)
    return text


def same_grid(text: str, tree: Any, random: Random) -> tuple[str, bytes]:
    """Another spelling of a grid file."""
    spellings: dict[str, Callable[[], bytes]] = {
        "CRLF": lambda: text.replace("\n", "\r\n").encode(),
        "BOM": lambda: text.encode("utf-8-sig"),
        "comments": lambda: "".join(f"{line}\n# caf\xe9: [\n" for line in text.splitlines()).encode(),
        "keys in another order": lambda: dumped(shuffled(tree, random)).encode(),
        "numbers": lambda: respelt(tree, random).encode(),
        "one line": lambda: yaml.safe_dump(tree, default_flow_style=True, sort_keys=False).encode(),
        "document marks": lambda: f"---\n{text}\n...\n".encode(),
    }
    kind = random.choice(list(spellings))
    return kind, spellings[kind]()


# Files and folders


def beside(folder: Path, random: Random, suffixes: tuple[str, ...], content: bytes) -> str:
    """Put something into a folder that does not belong there."""
    suffix = random.choice(suffixes)
    name = random.choice(
        (
            f"junk{suffix}",
            f".hidden{suffix}",
            f"a b\n{suffix}",
            os.fsdecode(b"caf\xe9") + suffix,
            f"copy (1){suffix}",
            f"{'n' * 200}{suffix}",
        )
    )
    path = folder / name
    kind = random.choice(
        ("file", "copy", "empty", "folder", "nested", "dangling link", "circular link", "link to itself", "pipe")
    )
    if kind in ("file", "copy", "empty"):
        path.write_bytes({"file": random.randbytes(50), "copy": content, "empty": b""}[kind])
    elif kind in ("folder", "nested"):
        path.mkdir()
        if kind == "nested":
            (path / f"inner{suffix}").write_bytes(content)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        target = {"dangling link": folder / "nowhere", "circular link": folder, "link to itself": path}[kind]
        path.symlink_to(target)
    return f"{kind} {name!r} in {folder.name}"
