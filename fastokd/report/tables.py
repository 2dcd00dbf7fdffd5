"""A table with a caption, as Markdown, LaTeX and CSV, and for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

import rich.table
from rich.box import SIMPLE_HEAD

from fastokd.checkpoint import write_durably
from fastokd.errors import DiskError
from fastokd.host.names import as_csv as csv_text
from fastokd.host.names import in_latex, in_markdown, on_a_line
from fastokd.report.statistics import Difference, Sample


@dataclass(frozen=True)
class Written:
    """A number written as ``text``; a CSV has its ``value``, by which a page sorts."""

    text: str
    value: float


Cell = str | int | Written | Sample | Difference | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        group: a heading above this column and its neighbours of the same group.
        digits: of samples and differences, after the point.
        text: words, which may wrap; else numbers, aligned right.
        aside: in HTML below the first column's cell, in LaTeX and on a terminal left out.
    """

    name: str
    group: str = ""
    digits: int = 2
    text: bool = False
    aside: bool = False

    @property
    def full_name(self) -> str:
        """With its group."""
        return f"{self.group}, {self.name}" if self.group else self.name

    def show(self, cell: Cell) -> str:
        """The cell as text; None is empty."""
        if isinstance(cell, (Sample, Difference)):
            return cell.text(self.digits)
        if isinstance(cell, Written):
            return cell.text
        return "" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell


@dataclass(frozen=True)
class Table:
    """Rows of cells under ``columns``; ``notes`` are the sentences of the caption.

    ``name``: of its files, and its id in a page. ``grouped``: a rule separates rows whose first
    cells differ. ``runs``: for each row, the numbers of its runs; a page can filter such a table.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    grouped: bool = False
    runs: tuple[tuple[int, ...], ...] = ()

    def without_empty_columns(self) -> Table:
        """The table without columns that have no value in any row."""
        empty = (None, "")
        kept = [i for i in range(len(self.columns)) if any(r[i] not in empty for r in self.rows)]
        return self._of(kept)

    def without_asides(self) -> Table:
        """The table of a paper or a terminal."""
        return self._of([i for i, column in enumerate(self.columns) if not column.aside])

    def _of(self, kept: Sequence[int]) -> Table:
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in kept), rows=rows)

    def groups(self) -> list[tuple[str, int]]:
        """The headings above the columns, "" for none, and how many columns each spans."""
        return [(name, len([*of])) for name, of in groupby(self.columns, lambda c: c.group)]

    def new_section(self, index: int) -> bool:
        """Whether a rule stands above this row."""
        return self.grouped and index > 0 and self.rows[index][0] != self.rows[index - 1][0]

    @property
    def caption(self) -> str:
        """Title and notes as one paragraph."""
        return " ".join([f"{self.title.rstrip('.')}.", *self.notes])


def as_markdown(table: Table) -> str:
    """A heading, the table and its notes."""
    lines = [
        [column.full_name for column in table.columns],
        [":---" if column.text else "---:" for column in table.columns],
        *(
            [
                in_markdown(text) if column.text else text
                for column, text in zip(table.columns, row, strict=True)
            ]
            for row in _texts(table)
        ),
    ]
    notes = "\n".join(in_markdown(note) for note in table.notes)
    parts = [
        f"## {in_markdown(table.title)}",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
    ]
    return "\n\n".join([*parts, *([notes] if notes else [])]) + "\n"


def as_latex(table: Table) -> str:
    """A ``table`` environment in the style of booktabs."""
    table = table.without_asides().without_empty_columns()
    lines = [
        r"% needs \usepackage{booktabs} in the preamble",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{in_latex(table.caption)}}}",
        rf"\begin{{tabular}}{{{''.join('l' if c.text else 'r' for c in table.columns)}}}",
        r"\toprule",
    ]
    if any(column.group for column in table.columns):
        heads, rules, at = [], [], 1
        for name, span in table.groups():
            heads.append(rf"\multicolumn{{{span}}}{{c}}{{{in_latex(name)}}}")
            rules += [rf"\cmidrule(lr){{{at}-{at + span - 1}}}"] if name else []
            at += span
        lines += [_latex_row(heads), "".join(rules)]
    lines += [_latex_row([in_latex(column.name) for column in table.columns]), r"\midrule"]
    for index, row in enumerate(table.rows):
        lines += [r"\midrule"] if table.new_section(index) else []
        lines.append(_latex_row(map(_latex_cell, table.columns, row)))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _latex_row(cells: Sequence[str] | map[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(column: Column, cell: Cell) -> str:
    text = column.show(cell)
    if isinstance(cell, Sample):
        return f"${text}$".replace("±", r"\pm")
    if isinstance(cell, Difference):
        return f"${text}$"
    return in_latex(text)


def as_csv(table: Table) -> str:
    """One line a row. A mean and its deviation, a difference and its bounds, have a column each."""
    columns = [
        _split(column, [row[i] for row in table.rows]) for i, column in enumerate(table.columns)
    ]
    head = [name for names, _ in columns for name in names]
    rows = (
        [
            value
            for (names, values), cell in zip(columns, row, strict=True)
            for value in values(cell)[: len(names)]
        ]
        for row in table.rows
    )
    return csv_text([head, *rows])


def _split(
    column: Column, cells: Sequence[Cell]
) -> tuple[list[str], Callable[[Cell], list[object]]]:
    """The names of a column's columns in a CSV, and the values of a cell under them (or more)."""
    name = column.full_name
    if any(isinstance(cell, Difference) for cell in cells):
        return [name, f"{name}, low", f"{name}, high"], _of_difference
    if any(isinstance(cell, Sample) for cell in cells):
        spread = any(isinstance(cell, Sample) and cell.std is not None for cell in cells)
        return [name, *([f"{name}, std"] if spread else [])], _of_sample
    return [name], lambda cell: [_plain(cell)]


def _plain(cell: Cell) -> object:
    if isinstance(cell, Written):
        return f"{cell.value:.12g}"
    return "" if cell is None else cell if isinstance(cell, int) else on_a_line(cell)


def _of_difference(cell: Cell) -> list[object]:
    if not isinstance(cell, Difference):
        return [""] * 3
    return [_number(value) for value in (cell.value, *(cell.interval or (None, None)))]


def _of_sample(cell: Cell) -> list[object]:
    if not isinstance(cell, Sample):
        return [""] * 2
    return [_number(cell.mean), _number(cell.std)]


def _number(value: float | None) -> object:
    return "" if value is None else round(value, 6)


def as_rich(table: Table) -> rich.table.Table:
    """The table for a terminal."""
    table = table.without_asides()
    shown = rich.table.Table(
        title=table.title, caption="\n".join(table.notes), box=SIMPLE_HEAD, padding=(0, 1)
    )
    for column in table.columns:
        head = textwrap.fill(column.name, 14)
        justify: Literal["left", "right"] = "left" if column.text else "right"
        shown.add_column(head, justify=justify, overflow="fold")
    for index, texts in enumerate(_texts(table)):
        if table.new_section(index):
            shown.add_section()
        shown.add_row(*texts)
    return shown


def _texts(table: Table) -> list[list[str]]:
    return [
        [on_a_line(c.show(cell)) for c, cell in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]


FORMATS = {"md": as_markdown, "tex": as_latex, "csv": as_csv}


def save_table(table: Table, stem: Path) -> None:
    """Writes ``stem.md``, ``stem.tex`` and ``stem.csv``; existing files are replaced.

    Raises:
        DiskError: one can't be written.
    """
    for suffix, written in FORMATS.items():
        path = stem.with_name(f"{stem.name}.{suffix}")
        try:
            write_durably(path, written(table).encode())
        except OSError as error:
            raise DiskError(f"{path} can't be written: {error}") from error


def files_of(stem: Path) -> str:
    """The files of :func:`save_table`, for a message."""
    first, *others, last = FORMATS
    return f"{stem}.{first}{''.join(f', .{suffix}' for suffix in others)} and .{last}"
