"""Docstrings are Google style: every argument, attribute and error has an entry of its own, and exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from places import ROOT

PACKAGE = ROOT / "zeroflow"
EXEMPT: tuple[str, ...] = ()
"""Folders and files of the package that are not checked."""

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Section = dict[str, str]
"""Text of the entries by what stands before their colon."""


def sections(docstring: str) -> dict[str, Section]:
    """Entries of the sections ``Args``, ``Attributes`` and ``Raises``; lines that start none have an empty text."""
    found: dict[str, Section] = {}
    for title, body in re.findall(r"^(Args|Attributes|Raises):\n((?:    .*\n?)+)", docstring, re.MULTILINE):
        entries = re.split(r"\n {4}(?=\S)", body.removeprefix("    ").rstrip())
        found[title] = dict(
            (*entry.split(": ", 1), "")[:2] if re.match(r"\*{0,2}\w+: ", entry) else (entry, "") for entry in entries
        )
    return found


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    known = function.args
    variadic = {
        star + argument.arg for star, argument in (("*", known.vararg), ("**", known.kwarg)) if argument is not None
    }
    return {argument.arg for argument in (*known.posonlyargs, *known.args, *known.kwonlyargs)} | variadic


def attributes(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Names of a class and of its bases in the package: fields, methods, ``self.x = ...`` and buffers."""
    names: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef):
            names.add(part.name)
        elif isinstance(part, ast.Name | ast.Attribute) and isinstance(part.ctx, ast.Store):
            names.add(part.id if isinstance(part, ast.Name) else part.attr)
        elif isinstance(part, ast.Call) and ast.unparse(part.func) == "self.register_buffer":
            names.update(argument.value for argument in part.args if isinstance(argument, ast.Constant))
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes and base.id != node.name:
            names |= attributes(classes[base.id], classes)
    return names


def arguments(node: Documented, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Parameters of a function; of a class those of its ``__init__``, or its fields where it has none."""
    if not isinstance(node, ast.ClassDef):
        return parameters(node)
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return parameters(part)
    return attributes(node, classes)


def problems(node: Documented, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    docstring = ast.get_docstring(node) or ""
    fields = attributes(node, classes) if isinstance(node, ast.ClassDef) else set()
    allowed = {"Args": arguments(node, classes), "Attributes": fields, "Raises": set[str]()}
    for name in re.findall(r"^(\*{0,2}\w+)(?:, \w+)*: ", docstring, re.MULTILINE):
        if name in allowed["Args"] | fields:
            yield f"{name} is explained outside of a section; put it into Args or Attributes"
    for title, entries in sections(docstring).items():
        known = allowed[title]
        for name, text in entries.items():
            if not text:
                yield f"{title}: expected 'name: text', found {name!r}"
            elif title != "Raises" and name not in known:
                yield f"{title}: {name} does not exist"
            for second in re.findall(r"(?<![`\w.*])(\*{0,2}\w+): ", " ".join(text.split())):
                if second in known or (title == "Raises" and re.fullmatch(r"[A-Z]\w*(Error|Loss)", second)):
                    yield f"{title}: {second} stands in the entry of {name}; give it an entry of its own"


def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def classes_of(modules: dict[str, ast.Module]) -> dict[str, ast.ClassDef]:
    return {node.name: node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@pytest.mark.slow
def test_every_documented_name_exists_and_has_an_entry_of_its_own() -> None:
    modules = trees()
    classes = classes_of(modules)
    found = [
        f"zeroflow/{file}:{node.lineno} {node.name}: {problem}"
        for file, tree in modules.items()
        if not any(file == exempt or file.startswith(exempt + "/") for exempt in EXEMPT)
        for node in ast.walk(tree)
        if isinstance(node, Documented)
        for problem in problems(node, classes)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("width: features.\n    height: rows.", []),
        ("width: features, of\n        a block. height: rows.", ["height stands in the entry of width"]),
        ("width, height: features.", ["expected 'name: text'"]),
        ("depth: blocks.", ["depth does not exist"]),
        ("width: features.\n\nheight: rows.", ["height is explained outside"]),
    ],
)
def test_a_name_that_tools_do_not_see_is_found(entries: str, expected: list[str]) -> None:
    docstring = f"Resize.\n\nArgs:\n    {entries}".replace("\n", "\n    ")
    (function,) = ast.parse(f'def resize(width, height):\n    """{docstring}\n    """').body
    assert isinstance(function, ast.FunctionDef)
    found = list(problems(function, {}))
    assert len(found) == len(expected)
    assert all(part in problem for part, problem in zip(expected, found, strict=True))
