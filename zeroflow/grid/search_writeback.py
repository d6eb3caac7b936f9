"""Chosen values in the text of a grid file: rules between two comment lines, all else stays byte for byte."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
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
    before, after = changed_by(file, rules)
    if after == before:
        return False
    write_atomically(file.resolve(), after.encode("utf-8"))
    return True


def changed_by(file: Path, rules: Sequence[Rule]) -> tuple[str, str]:
    """The text of a grid file as it is, and with these rules in it; see ``write_chosen``."""
    before = file.read_bytes().decode("utf-8")
    problems = []
    for behind in (False, True):
        after = with_chosen(before, rules, str(file), behind)
        problem = _not_held(before, after, rules, file)
        if problem is None:
            return before, after
        problems.append(problem)
    raise ConfigError(problems[0])


def with_chosen(text: str, rules: Sequence[Rule], where: str, behind: bool = False) -> str:
    """The text of a grid file with these rules in it.

    Args:
        text: the file's.
        rules: what was chosen.
        where: the file, for messages.
        behind: whether all are written behind those of earlier searches; otherwise one with the same condition takes them up.

    Raises:
        ConfigError: see ``write_chosen``.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    content, merged = parse_yaml(text, where), list(rules)
    old: list[Rule] = []
    if BEGIN in text or END in text:
        found = _BLOCK.search(text)
        if not found or text.count(BEGIN) != 1 or text.count(END) != 1:
            raise ConfigError(f"{where}: settings: expected one line '{BEGIN}' and, below it, one '{END}'")
        old = parse_yaml(found[0], where) or []
        merged = [*old, *rules] if behind else _merged(old, rules)
        after = text[: found.start()] + render(merged, found["indent"], newline) + text[found.end() :]
    else:
        after = _inserted(text, content, rules, newline, where)
    # Whatever the layout of the file: nothing but these rules may be other than before.
    now, added = parse_yaml(after, where), [*old, *merged]
    same = all(now.get(key) == content.get(key) for key in {*now, *content} - {"settings"})
    before, rest = ([rule for rule in part.get("settings") or [] if rule not in added] for part in (content, now))
    if not same or before != rest:
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


def _not_held(before: str, after: str, rules: Sequence[Rule], file: Path) -> str | None:
    """What is wrong with a text in which a cell ends with other values than those it had and those chosen for it."""
    grids = [
        parse_grid(
            parse_yaml(text, str(file)), where=str(file), default_name=file.stem, folder=file.parent, trail=(file,)
        )
        for text in (before, after)
    ]
    for (old, _), (new, _) in zip(*(grid.own for grid in grids), strict=True):
        chosen: dict[str, Any] = {}
        for rule in rules:
            if old.optimizer is not None and matches(vars(old), rule["when"]):
                chosen |= rule["set"]
        wanted = TrialConfig.from_dict(merge_overrides([*dataclasses.asdict(old).items(), *chosen.items()]))
        if new.cell_id == wanted.cell_id:
            continue
        keep, get = (_other(new, wanted, keys) for keys in (chosen, dataclasses.asdict(new)))
        return (
            f"{file}: settings: {new.label()} would keep {keep} and not get the chosen {chosen}: a rule below the line "
            f"'{END}' says otherwise; move it up"
            if keep
            else f"{file}: settings: {old.label()} with the chosen {chosen} would get {get}: a rule below the line '{END}' "
            "has a condition on what is chosen; move it up"
        )
    return None


def _other(config: TrialConfig, wanted: TrialConfig, keys: Iterable[str]) -> dict[str, Any]:
    """What a cell has of some keys where another one was wanted."""
    values = {key: readings(vars(config), key)[0] for key in keys}
    return {key: value for key, value in values.items() if value != readings(vars(wanted), key)[0]}


def _flow(value: Any) -> str:
    """A value as one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True).strip()
