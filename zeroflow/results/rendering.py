"""A table, and how it is written: for a terminal, in Markdown, LaTeX, CSV, HTML and JSON.

Whoever has a table to show builds a ``Table`` of columns and values; how it looks anywhere is decided here.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from zeroflow.results.estimates import Estimate

MARKED = "Bold: the best on its stream; underlined: the second best."


@dataclass(frozen=True)
class Cell:
    """What stands in a place: ``text`` for readers, ``value`` for machines; ``rank`` 1 is the best of its column, 2 the second."""

    text: str
    value: Any = None
    half_width: float | None = None
    rank: int = 0


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        head: what stands above it.
        format: how its numbers are written, as Python's ``format`` takes it; words are written as they are.
        left: whether it is set flush left, as words are.
    """

    head: str
    format: str = ""
    left: bool = False

    def cell(self, value: Any) -> Cell:
        """A value as it is shown; ``-`` for None, and for what is no number."""
        if isinstance(value, Cell):
            return value
        number = value.mean if isinstance(value, Estimate) else value
        if number is None or (isinstance(number, float) and math.isnan(number)):
            return Cell("-")
        if isinstance(value, Estimate):
            return Cell(_estimated(value, self.format or ".2f"), value.mean, value.half_width)
        return Cell(value if isinstance(value, str) else format(value, self.format), value)


def words(*heads: str) -> list[Column | str]:
    """Columns of words."""
    return [Column(head, left=True) for head in heads]


@dataclass(frozen=True)
class Mark:
    """What a line says to a page.

    Attributes:
        filters: by key.
        group: lines that compete for the best.
        baseline: whether it is the row to beat.
        cells: the ids of the cells that it is a mean of.
        groups: as ``group``, of single columns by their heading, where they differ.
    """

    filters: Mapping[str, str] = field(default_factory=dict)
    group: Hashable = None
    baseline: bool = False
    cells: tuple[str, ...] = ()
    groups: Mapping[str, Hashable] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One line."""

    cells: tuple[Cell, ...]
    mark: Mark = Mark()


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: from left to right.
        lines: from top to bottom, as many cells in each as there are columns.
        name: for commands.
        title: for readers.
        notes: what the heads mean.
        above: what holds for all lines, before they are read.
        sorted_by: the column by which lines are sorted, the largest first; None: otherwise.
    """

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    name: str = ""
    title: str = ""
    notes: tuple[str, ...] = ()
    above: tuple[str, ...] = ()
    sorted_by: int | None = None

    @classmethod
    def of(
        cls,
        columns: Iterable[Column | str],
        rows: Iterable[Sequence[Any]],
        *,
        name: str = "",
        title: str = "",
        notes: Iterable[str] = (),
        above: Iterable[str] = (),
        marks: Sequence[Mark] | None = None,
    ) -> Table:
        """A table of values.

        Args:
            columns: a head alone is a column of numbers, written as they are.
            rows: a value for each column: a number, words, an estimate, None, or a whole cell.
            name: see the class; so are ``title``, ``notes`` and ``above``.
            title: see the class.
            notes: see the class.
            above: see the class.
            marks: of each row; default: none has any.
        """
        made = tuple(Column(column) if isinstance(column, str) else column for column in columns)
        cells = [tuple(c.cell(value) for c, value in zip(made, row, strict=True)) for row in rows]
        marked = marks if marks is not None else [Mark()] * len(cells)
        lines = tuple(Line(own, mark) for own, mark in zip(cells, marked, strict=True))
        return cls(made, lines, name, title, tuple(notes), tuple(above))

    @property
    def headings(self) -> tuple[str, ...]:
        return tuple(column.head for column in self.columns)

    @property
    def legend(self) -> str:
        return " ".join(self.notes)

    @property
    def is_marked(self) -> bool:
        """Whether the best are marked."""
        return any(cell.rank for line in self.lines for cell in line.cells)

    @property
    def wide(self) -> set[int]:
        """The columns with intervals."""
        return {i for i in range(len(self.columns)) if any(ln.cells[i].half_width is not None for ln in self.lines)}


def _estimated(found: Estimate, spec: str) -> str:
    return f"{found.mean:{spec}}" + ("" if found.half_width is None else f" ± {found.half_width:.2f}")


# A grid alone: heads and lines


def text_grid(table: Table, *, rule: bool = True) -> str:
    """Columns of even width; ``rule``: a line below the heads. The best is marked ``*``, the second best ``'``."""
    lines = [[cell.text + ("" if not cell.rank else " *'"[cell.rank]) for cell in ln.cells] for ln in table.lines]
    columns = []
    for column, *values in zip(table.columns, *lines, strict=True):
        width = max(map(len, [column.head, *values]))
        adjust = str.ljust if column.left else str.rjust
        between = ["-" * width] if rule else []
        columns.append([adjust(value, width) for value in [column.head, *between, *values]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


@dataclass(frozen=True)
class Rule:
    """The line below the heads of a Markdown table: of columns of words, of numbers, and what is around each."""

    left: str
    right: str
    blank: str


DENSE, SPACED, EXPLICIT = Rule("---", "---:", ""), Rule("---", "---:", " "), Rule(":--", "--:", " ")


def markdown_grid(table: Table, rule: Rule = DENSE, *, escape: Callable[[str], str] = str, padded: bool = False) -> str:
    """A grid in GitHub's Markdown.

    Args:
        table: what is written.
        rule: the line below the heads.
        escape: of what in texts and heads would be Markdown; default: they may be Markdown.
        padded: whether columns are even, for a terminal.
    """
    heads = [escape_bars(head) if escape is not str else head for head in table.headings]
    lines = [[_MARKDOWN[cell.rank].format(escape(cell.text)) for cell in line.cells] for line in table.lines]
    if padded:
        widths = [max(3, *map(len, column)) for column in zip(heads, *lines, strict=True)]
        heads, *lines = [[text.ljust(width) for text, width in zip(ln, widths, strict=True)] for ln in [heads, *lines]]
        below = [":" + "-" * (width - 1) for width in widths]
    else:
        below = [rule.left if column.left else rule.right for column in table.columns]
    blank = " " if padded else rule.blank
    between = f"{blank}|{blank}"
    rows = [f"| {' | '.join(line)} |" for line in [heads, *lines]]
    return "\n".join([rows[0], f"|{blank}{between.join(below)}{blank}|", *rows[1:]])


_MARKDOWN = ("{}", "**{}**", "<u>{}</u>")


def escape_bars(text: str) -> str:
    """Markdown in which nothing ends a column of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|")


def html_grid(table: Table, *, kind: str = "", buttons: bool = False) -> str:
    """An HTML table.

    Args:
        table: what is written; with a name its lines carry their marks.
        kind: a class of every cell; default: ``text`` of words.
        buttons: whether heads can be pressed.
    """
    kinds = [kind or ("text" if column.left else "") for column in table.columns]
    named = bool(table.name)
    head = "".join(
        f"<th scope='col'{_class(own)}{' aria-sort=descending' if i == table.sorted_by else ''}>{f'<button type={chr(39)}button{chr(39)}>{escape(name)}</button>' if buttons else escape(name)}</th>"
        for i, (own, name) in enumerate(zip(kinds, table.headings, strict=True))
    )
    # Words that begin a line say what it is of.
    first = next((i for i, column in enumerate(table.columns) if not column.left), len(kinds))
    first = first if named else min(first, 1)
    body = []
    for line in table.lines:
        mark = {**line.mark.filters, "baseline": line.mark.baseline}
        keys = f' data-keys="{escape(json.dumps(mark, separators=(",", ":")), quote=True)}"' if named else ""
        cells = f" data-cells='{' '.join(line.mark.cells)}'" if line.mark.cells else ""
        inner = "".join(
            f"<{'th scope=row' if i < first else 'td'}{_class(own)}>{_HTML[cell.rank].format(escape(cell.text))}</{'th' if i < first else 'td'}>"
            for i, (own, cell) in enumerate(zip(kinds, line.cells, strict=True))
        )
        body.append(f"<tr{_class('baseline' if line.mark.baseline else '')}{keys}{cells}>{inner}</tr>")
    top = f"<thead><tr>{head}</tr></thead>" if any(table.headings) else ""
    return f"<table{f' data-table={chr(39)}{table.name}{chr(39)}' if named else ''}>{top}<tbody>{''.join(body)}</tbody></table>"


_HTML = ("{}", "<b>{}</b>", "<u>{}</u>")


def _class(name: str) -> str:
    return f" class='{name}'" if name else ""


# Whole tables: title, grid, notes


def _text(table: Table) -> str:
    marked = "\n*: the best on its stream; ': the second best." if table.is_marked else ""
    above = "".join(f"{sentence}\n\n" for sentence in table.above)
    return f"{table.title}\n\n{above}{text_grid(table)}\n\n{table.legend}{marked}\n"


def _markdown(table: Table) -> str:
    def escaped(text: str) -> str:
        return re.sub(r"([\\|*_<>`])", r"\\\1", text)

    grid = markdown_grid(table, EXPLICIT, escape=escaped)
    above = "".join(f"{escaped(sentence)}\n\n" for sentence in table.above)
    legend = f"{table.legend} " if table.legend else ""
    return f"### {table.title}\n\n{above}{grid}\n\n{legend}{MARKED if table.is_marked else ''}".rstrip() + "\n"


_LATEX = ("{}", r"\textbf{{{}}}", r"\underline{{{}}}")
_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}", "|": r"\textbar{}", ">": r"\textgreater{}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def _latex(table: Table) -> str:
    body = []
    for i, line in enumerate(table.lines):
        if i and line.mark.group != table.lines[i - 1].mark.group:
            body.append(r"\midrule")
        texts = ("--" if cell.text == "-" else _tex(cell.text) for cell in line.cells)
        body.append(" & ".join(_LATEX[c.rank].format(t) for c, t in zip(line.cells, texts, strict=True)) + r" \\")
    legend = " ".join([*table.above, *table.notes, *([MARKED] if table.is_marked else [])])
    columns = "".join("l" if column.left else "r" for column in table.columns)
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(f'{table.title}. {legend}')}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(_tex, table.headings)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _csv(table: Table) -> str:
    """Values as they were measured; beside an estimate the half width of its interval."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    wide = table.wide
    writer.writerow(n for i, h in enumerate(table.headings) for n in ((h, f"{h} ±") if i in wide else (h,)))
    for line in table.lines:
        pairs = [(cell.value, cell.half_width)[: 2 if i in wide else 1] for i, cell in enumerate(line.cells)]
        writer.writerow("" if value is None else value for pair in pairs for value in pair)
    return out.getvalue()


FORMATS: Mapping[str, Callable[[Table], str]] = {"text": _text, "markdown": _markdown, "latex": _latex, "csv": _csv}


def render(found: Sequence[Table], format: str) -> str:
    """Tables one after the other.

    Args:
        found: the tables.
        format: a key of ``FORMATS``. CSV holds one table: give one.
    """
    return "\n".join(FORMATS[format](table) for table in found)


def as_values(table: Table) -> dict[str, Any]:
    """A table as plain values for JSON: of every line the values by head, and the half widths as in CSV."""
    wide = table.wide
    lines = []
    for line in table.lines:
        values: dict[str, Any] = {}
        for i, (head, cell) in enumerate(zip(table.headings, line.cells, strict=True)):
            values |= {head: cell.value} | ({f"{head} ±": cell.half_width} if i in wide else {})
        lines.append(values)
    return {"table": table.name, "title": table.title, "legend": table.legend, "lines": lines}
