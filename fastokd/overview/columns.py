"""The columns of the list of runs: for the terminal, a page, CSV and JSON."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from typing import Any

from rich.cells import cell_len
from rich.table import Table

from fastokd.errors import unknown_name
from fastokd.host.console import console
from fastokd.host.names import as_csv, counted, on_a_line
from fastokd.overview.listing import STATES, Listed

# What a narrow terminal leaves out, in this order.
_SPARED = ("size", "age", "seed", "recipe", "epoch", "top-1")
# May be broken into lines.
_BROKEN = {"run", "recipe"}
_STYLES = {"running": "green", "failed": "red", "interrupted": "yellow"}


@dataclass(frozen=True)
class Column:
    """``text``: a run's cell; ``key``: what it is sorted by, None if it isn't known."""

    text: Callable[[Listed], str]
    key: Callable[[Listed], Any]
    number: bool = False


def _path(run: Listed) -> list[Any]:
    """The path, so that seed10 comes after seed9."""
    parts = re.split(r"(\d+)", on_a_line(run.folder))
    return [(int(part) if place % 2 else 0, part) for place, part in enumerate(parts)]


COLUMNS = {
    "run": Column(lambda run: on_a_line(run.folder), _path),
    "recipe": Column(lambda run: on_a_line(run.recipe or "?"), lambda run: run.recipe),
    "seed": Column(lambda run: _known(run.seed), lambda run: run.seed, number=True),
    "epoch": Column(
        lambda run: "?" if run.epoch is None else f"{run.epoch}/{run.epochs}",
        lambda run: run.epoch,
        number=True,
    ),
    "top-1": Column(
        lambda run: "" if run.top1 is None else f"{run.top1:.4f}", lambda run: run.top1, number=True
    ),
    "state": Column(lambda run: run.state, lambda run: STATES.index(run.state)),
    "age": Column(lambda run: age(run.modified), lambda run: -run.modified, number=True),
    "size": Column(lambda run: in_bytes(run.bytes), lambda run: run.bytes, number=True),
}
# Of JSON and CSV.
FIELDS = [
    *("run", "recipe", "seed", "epoch", "epochs", "top1", "of", "measured", "state"),
    *("modified", "age_seconds", "bytes", "reason"),
]
MEANING = (
    "top-1: the test accuracy that the recipe reports, after the last measured epoch; epoch: whole "
    "epochs so far; age: since the run last wrote"
)


def chosen(
    runs: Sequence[Listed], *, states: str | None = None, recipe: str | None = None
) -> list[Listed]:
    """The runs in one of some ``states`` (``"running,failed"``) and of a ``recipe``: a pattern such as
    ``okddip*``.

    Raises:
        UserError: an unknown state.
    """
    wanted = STATES if states is None else [state.strip() for state in states.split(",")]
    for state in wanted:
        if state not in STATES:
            raise unknown_name("state", state, STATES)
    return [
        run
        for run in runs
        if run.state in wanted and (recipe is None or fnmatchcase(run.recipe or "", recipe))
    ]


def in_order(runs: Sequence[Listed], by: str = "run") -> list[Listed]:
    """The runs sorted by a column, with a ``-`` before its name from the largest; where it isn't known,
    last.

    Raises:
        UserError: there is no such column.
    """
    name = by.removeprefix("-")
    name = "top-1" if name == "top1" else name
    if name not in COLUMNS:
        raise unknown_name("column", name, COLUMNS)
    key = COLUMNS[name].key
    known = [run for run in runs if key(run) is not None]
    ordered = sorted(sorted(known, key=_path), key=key, reverse=by.startswith("-"))
    return ordered + [run for run in runs if key(run) is None]


def print_table(runs: Sequence[Listed]) -> None:
    """Prints the runs."""
    print_cells(
        {name: [column.text(run) for run in runs] for name, column in COLUMNS.items()},
        [_STYLES.get(run.state, "") for run in runs],
    )


def print_cells(cells: dict[str, list[str]], styles: Sequence[str] | None = None) -> None:
    """Prints a table of columns; of these a narrow terminal gets those that fit into it."""
    out = console()
    if not out.is_terminal:
        out.width = 1 << 20
    cells = _fitting(cells, out.width)
    table = Table(box=None, pad_edge=False)
    for name in cells:
        justify: Any = "right" if name in COLUMNS and COLUMNS[name].number else "left"
        table.add_column(name, justify=justify, no_wrap=name not in _BROKEN, overflow="fold")
    rows = list(zip(*cells.values(), strict=True))
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        table.add_row(*row, style=style)
    out.print(table)


def _fitting(cells: dict[str, list[str]], width: int) -> dict[str, list[str]]:
    """The columns that a terminal of ``width`` has room for."""
    needed = {name: max(map(cell_len, [name, *texts])) + 2 for name, texts in cells.items()}
    for name in _BROKEN & needed.keys():
        needed[name] = min(needed[name], 18)
    for name in _SPARED:
        if sum(needed.values()) > width:
            needed.pop(name, None)
    return {name: cells[name] for name in needed}


def counts(runs: Sequence[Listed]) -> str:
    """How many runs there are, in which states, and how large they are."""
    states = [run.state for run in runs]
    each = ", ".join(f"{states.count(name)} {name}" for name in STATES if name in states)
    size = in_bytes(sum(run.bytes for run in runs))
    return f"{counted(len(runs), 'run')}: {each}; {size}" if runs else "no run"


def as_rows(runs: Iterable[Listed]) -> list[dict[str, Any]]:
    """Each run as JSON values: accuracies as fractions, its time in ISO 8601 and its age in seconds."""
    now = time.time()
    rows = []
    for run in runs:
        values = asdict(run) | {"run": str(run.folder), "age_seconds": round(now - run.modified)}
        moment = datetime.fromtimestamp(run.modified, timezone.utc)
        values["modified"] = moment.isoformat(timespec="seconds")
        rows.append({name: values[name] for name in FIELDS})
    return rows


def in_csv(runs: Iterable[Listed]) -> str:
    """:func:`as_rows` as the text of a CSV file."""
    return as_csv([FIELDS, *(list(row.values()) for row in as_rows(runs))])


def in_bytes(count: float) -> str:
    """``512 B``, ``1.5 MB``; a kB has 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def age(modified: float) -> str:
    """How long ago a moment is: ``<1 min``, ``5 min``, ``3 h``, ``12 d``."""
    seconds = max(0.0, time.time() - modified)
    if seconds < 60:
        return "<1 min"
    for unit, length, most in (("min", 60, 3600), ("h", 3600, 172800), ("d", 86400, math.inf)):
        if seconds < most:
            return f"{int(seconds // length)} {unit}"
    raise AssertionError


def _known(value: object) -> str:
    return "?" if value is None else str(value)
