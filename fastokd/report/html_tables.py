"""A table in a page: HTML that ``tables.js`` makes sortable, and that a form filters."""

from __future__ import annotations

import math
import re
from pathlib import Path

from fastokd.host.names import in_html
from fastokd.report.statistics import Difference, Sample
from fastokd.report.tables import Cell, Column, Table, Written

# Inlined once into each page with tables, which are plain without it.
SCRIPT = Path(__file__).with_name("tables.js").read_text("utf-8")
_SLASH = re.compile(r"/(?!s\b)")
_NUMBER = re.compile(r"\[?([-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)")


def as_html(table: Table) -> str:
    """The table, which scrolls where it is too wide, and its notes.

    Cells of numbers have their value in ``data-value``, missing ones none; rows of runs have their
    numbers in ``data-runs``.
    """
    shown = table.without_asides()
    asides = [i for i, column in enumerate(table.columns) if column.aside]
    rows = []
    for index, (whole, row) in enumerate(zip(table.rows, shown.rows, strict=True)):
        below = "".join(
            f"<small>{_breakable(table.columns[i].show(whole[i]))}</small>" for i in asides
        )
        runs = f' data-runs="{" ".join(map(str, table.runs[index]))}"' if table.runs else ""
        first, *others = map(_cell, shown.columns, row)
        cells = "".join(f"<td{marks}>{text}</td>" for marks, text in others)
        rows.append(f'<tr{runs}><th scope="row"{first[0]}>{first[1]}{below}</th>{cells}</tr>')
    notes = "".join(f"<p>{in_html(note)}</p>" for note in table.notes)
    title = in_html(table.title)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">'
        f'<table id="{table.name}" aria-label="{title}"><thead>{_head(shown)}</thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><div class="note">{notes}</div>'
    )


def _head(table: Table) -> str:
    """The columns' names, and above them the groups'. The first column, which stays in sight, has a cell of
    its own in both."""
    names = "".join(
        f'<th scope="col"{" class=text" if column.text else ""}>{_breakable(column.name)}</th>'
        for column in table.columns
    )
    if not any(column.group for column in table.columns):
        return f"<tr>{names}</tr>"
    (first, span), *others = table.groups()
    spans = [(first, span), *others] if first or span == 1 else [("", 1), ("", span - 1), *others]
    groups = "".join(
        f'<th scope="colgroup" colspan="{span}" class=group>{in_html(name)}</th>'
        if name
        else f'<td colspan="{span}"></td>'
        for name, span in spans
    )
    return f"<tr>{groups}</tr><tr>{names}</tr>"


def _cell(column: Column, cell: Cell) -> tuple[str, str]:
    """Its attributes and its text."""
    text = _breakable(column.show(cell))
    if column.text:
        return " class=text", text
    value = sort_value(cell)
    return "" if value is None else f' data-value="{value:.12g}"', text


def sort_value(cell: Cell) -> float | None:
    """The number by which a column is sorted: the mean of a sample, the lower bound of an interval, the
    first of ``"3 of 300"``; None for a missing one."""
    value: float | None
    if isinstance(cell, Sample):
        value = cell.mean
    elif isinstance(cell, (Written, Difference)):
        value = cell.value
    elif isinstance(cell, str):
        found = _NUMBER.match(cell)
        value = float(found[1].replace(",", "")) if found else None
    else:
        value = cell
    return value if value is None or math.isfinite(value) else None


def _breakable(text: str) -> str:
    """Names of recipes and paths may break behind a slash, and a unit such as ``images/s`` not."""
    return _SLASH.sub("/<wbr>", in_html(text))
