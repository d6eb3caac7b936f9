"""The YAML of grid files: safe, with 1e-3 as a number, and strict about what is probably a mistake."""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml

from zeroflow.errors import ConfigError


def parse_yaml(text: str, where: str) -> Any:
    """The content of a grid file's text.

    Args:
        text: of the file.
        where: its path, for messages.

    Raises:
        ConfigError: not YAML, or a key given twice.
    """
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def load_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        yaml.YAMLError: it is not such YAML; the error has line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, OverflowError) as error:  # PyYAML's own of an escape beyond Unicode
        raise yaml.YAMLError(str(error)) from None
    except RecursionError:
        raise yaml.YAMLError("values nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number; anchors and merge keys (``<<``) work.

    Refused, with line and column: a key given twice or that is no text, an anchor inside its own value, dates, what YAML has
    besides texts, numbers, truth values, lists and mappings, and numbers that hardly anyone reads as YAML 1.1 does: 010 is 8 to it,
    1:30 is 90.
    """

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError):
            _refuse(f"{node.value[:40]!r} is no {node.tag.rpartition(':')[2]}", node)

    def construct_yaml_int(self, node: Any) -> int:
        self._refuse_old_spelling(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> float:
        self._refuse_old_spelling(node)
        return super().construct_yaml_float(node)

    def _refuse_old_spelling(self, node: Any) -> None:
        text = self.construct_scalar(node)
        if ":" in text or re.fullmatch(r"[-+]?0[0-7_]*[1-7][0-7_]*", text):
            _refuse(
                f"{text!r} can be read as several numbers; write its decimal digits, or quotes around a string", node
            )

    def get_single_node(self) -> Any:
        root = super().get_single_node()
        _refuse_circles(root, set(), set())
        return root

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:  # as written: what is merged comes later, and may be overridden
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if merge else self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                _refuse(f"key {key!r} is not a string", key_node)
            if key in seen:
                _refuse(f"key {key!r} is given twice", key_node)
            seen.add(key)
        return node


def _refuse(why: str, node: Any) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)


def _refuse_circles(node: Any, around: set[Any], seen: set[Any]) -> None:
    """Raise for a value that holds itself; ``around`` are the nodes that hold it, ``seen`` those that are known to be right."""
    if node in around:
        _refuse("an anchor is used inside its own value", node)
    if node in seen or not isinstance(node, yaml.CollectionNode):
        return
    pairs = isinstance(node, yaml.MappingNode)
    for value in node.value:
        _refuse_circles(value[1] if pairs else value, around | {node}, seen)
    seen.add(node)


def _refuse_kind(loader: _Loader, node: Any) -> NoReturn:
    kind = node.tag.rpartition(":")[2]
    _refuse(f"a {kind} is not allowed here; put a string such as a date in quotes", node)


for _kind in ("timestamp", "binary", "set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _refuse_kind)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
