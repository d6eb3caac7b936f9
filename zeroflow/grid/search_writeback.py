"""Chosen values in the text of a grid file: rules between two comment lines, all else stays byte for byte."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from zeroflow.durable import write_atomically
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import merge_overrides, parse_grid
from zeroflow.grid.readings import readings
from zeroflow.grid.rules import matches
from zeroflow.grid.yaml_loader import parse_yaml
from zeroflow.trial.config import TrialConfig

BEGIN, END = "# chosen by zeroflow search, which writes here again", "# end of chosen"

Rule = Mapping[str, Any]

_BLOCK = re.compile(rf"^(?P<indent> *){re.escape(BEGIN)}.*?^ *{re.escape(END)}", re.MULTILINE | re.DOTALL)


def render(rules: Sequence[Rule], indent: str = "  ", newline: str = "\n") -> str:
    """Rules as lines of a grid file, between the comments that mark them."""
    return newline.join(indent + line for line in [BEGIN, *(f"- {_flow(rule)}" for rule in rules), END])


def write_chosen(file: Path, rules: Sequence[Rule]) -> bool:
    """Put chosen values into the ``settings`` of a grid file; those of earlier searches for other cells stay.

    Args:
        file: the grid file.
        rules: what was chosen.

    Returns:
        Whether the file is another one now.

    Raises:
        ConfigError: they cannot be placed, or would not hold because of other rules; the file stays as it is.
    """
    before = file.read_bytes().decode("utf-8")
    after = with_chosen(before, rules, str(file))
    _check_hold(after, rules, file)
    if after == before:
        return False
    write_atomically(file.resolve(), after.encode("utf-8"))
    return True


def with_chosen(text: str, rules: Sequence[Rule], where: str) -> str:
    """The text of a grid file with these rules in it; see ``write_chosen``."""
    newline = "\r\n" if "\r\n" in text else "\n"
    content, merged = parse_yaml(text, where), list(rules)
    old: list[Rule] = []
    if BEGIN in text or END in text:
        found = _BLOCK.search(text)
        if not found or text.count(BEGIN) != 1 or text.count(END) != 1:
            raise ConfigError(f"{where}: settings: expected one line '{BEGIN}' and, below it, one '{END}'")
        old = parse_yaml(found[0], where) or []
        merged = _merged(old, rules)
        after = text[: found.start()] + render(merged, found["indent"], newline) + text[found.end() :]
    else:
        after = _inserted(text, content, rules, newline, where)
    # Whatever the layout of the file: nothing but these rules may be other than before.
    now, added = parse_yaml(after, where), [*old, *merged]
    same = all(now.get(key) == content.get(key) for key in {*now, *content} - {"settings"})
    before, behind = ([rule for rule in part.get("settings") or [] if rule not in added] for part in (content, now))
    if not same or before != behind:
        raise _unplaceable(where)
    return after


def _merged(old: Sequence[Rule], new: Sequence[Rule]) -> list[Rule]:
    """The old rules, each with the values of a new one with the same condition on top, then the rest of the new ones.

    What the new search did not choose stays: its candidates had it from the old rule.
    """
    fresh = {_flow(rule["when"]): rule for rule in new}
    merged = []
    for rule in old:
        changes = fresh.pop(_flow(rule["when"]), {"set": {}})["set"]
        merged.append({**rule, "set": {**rule["set"], **changes}} if changes else rule)
    return merged + list(fresh.values())


def _inserted(text: str, content: Mapping[str, Any], rules: Sequence[Rule], newline: str, where: str) -> str:
    """The text with the rules at the end of its settings."""
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise _unplaceable(where)
    node = next((value for key, value in root.value if key.value == "settings"), None)
    if node is None:
        start = "" if text.endswith("\n") else newline
        return f"{text}{start}{newline}settings:{newline}{render(rules, newline=newline)}{newline}"
    if content["settings"] is None:
        end, indent = node.start_mark.index, "  "
    elif isinstance(node, yaml.SequenceNode) and not node.flow_style:
        # A list ends where the next thing begins: before it go back over empty lines and comments.
        lines, indent = text[: node.end_mark.index].split("\n"), " " * node.start_mark.column
        while not lines[-1].strip() or lines[-1].lstrip().startswith("#"):
            lines.pop()
        end = len("\n".join(lines))
    else:
        raise _unplaceable(where)
    line_end = text.find("\n", end)
    head, tail = (text + newline, "") if line_end < 0 else (text[: line_end + 1], text[line_end + 1 :])
    return f"{head}{render(rules, indent, newline)}{newline}{tail}"


def _unplaceable(where: str) -> ConfigError:
    return ConfigError(
        f"{where}: settings: the chosen values cannot be placed here: expected a list with a line '- ...' for each rule; "
        "--print prints them"
    )


def _check_hold(text: str, rules: Sequence[Rule], file: Path) -> None:
    """Refuse a text in which a cell that a rule is for ends with other values."""
    content = parse_yaml(text, str(file))
    grid = parse_grid(content, where=str(file), default_name=file.stem, folder=file.parent, trail=(file,))
    for config, _ in grid.own:
        for rule in rules:
            if config.optimizer is None or not matches(vars(config), rule["when"]):
                continue
            chosen = rule["set"]
            wanted = TrialConfig.from_dict(merge_overrides([*dataclasses.asdict(config).items(), *chosen.items()]))
            other = {
                key: value
                for key in chosen
                if (value := readings(vars(config), key)[0]) != readings(vars(wanted), key)[0]
            }
            if other:
                raise ConfigError(
                    f"{file}: settings: {config.label()} would keep {other} and not get the chosen {chosen}: a rule below the "
                    f"line '{END}' says otherwise; move it up"
                )


def _flow(value: Any) -> str:
    """A value as one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True).strip()
