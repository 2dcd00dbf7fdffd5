"""``reproduction.html``, ``.md`` and ``.json``: every cell of the tables, and where its runs stand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastokd.checkpoint import write_durably
from fastokd.errors import DiskError
from fastokd.host.names import in_html, in_markdown
from fastokd.recipe.cells import Cell
from fastokd.report.charts import page_of
from fastokd.report.html_tables import as_html
from fastokd.report.statistics import Sample
from fastokd.report.tables import Column, Table, as_markdown, save_table
from fastokd.reproduce.everything import Everything, summary
from fastokd.reproduce.order import RULE, in_hours
from fastokd.reproduce.results import ANOTHER_TASK, Result, as_table, reproduction_of
from fastokd.reproduce.speeds import HOW, Estimate
from fastokd.reproduce.standing import Standing
from fastokd.reproduce.wanted import Request, run_of
from fastokd.run.folder import Run

STEM = "reproduction"
UNFINISHED = "Runs that failed, lack data or are running"
NOTE = (
    "Ours: the best epoch's top-1 in the published unit, mean ± standard deviation over the seeds that are "
    "done. Difference: ours minus published, with Welch's 95% interval where both have a deviation. Time: "
    "of training so far, measured, without evaluation. Time left: estimated. Cells that share a run each "
    "count its time."
)
DRAWN = (
    "The images are drawn at random and the runs are a few steps long. A cell that is done has started, "
    "stopped, resumed, evaluated and reported. Accuracies have no meaning."
)


@dataclass(frozen=True)
class Row:
    """One cell: its result so far, or None, and the sum over its runs."""

    cell: Cell
    result: Result | None
    state: str
    hours: float
    left: float


def write_page(of: Everything, *, drawn: bool = False) -> Path:
    """Writes the page, and each table's own files as ``fastokd reproduce TABLE`` does; returns the page.

    Raises:
        DiskError: one can't be written.
    """
    at = of.standings()
    hours = of.estimates(at)
    # A run whose metrics can't be read is failed, and so isn't here.
    found = {n: Run.load(of.out / n) for n, one in at.items() if one.state == "done"}
    tables, rows = [], []
    for request in of.requests:
        made = reproduction_of(request, found, of.options.max_steps)
        results = {r.cell: r for r in made.results}
        mine = _one_each(
            request, [_row(of, request, cell, results, at, hours) for cell in request.cells()]
        )
        rows += mine
        whole = all(row.state == "done" for row in mine)
        title = made.title if whole else f"{request.table}, not finished"
        if made.results and not drawn:
            save_table(as_table(replace(made, title=title)), of.out / request.table)
        table = _table(request, mine, title)
        tables.append(_tried(request, mine) if drawn else table)
    facts = _facts(of, at, {} if drawn else hours)
    notes = [DRAWN] if drawn else [NOTE, RULE]
    title = f"The papers' tables{', a dry run on drawn images' if drawn else ''}"
    texts = {
        "html": _html(title, facts, notes, tables, _reasons(at)),
        "md": _markdown(title, facts, notes, tables, _reasons(at)),
        "json": json.dumps(_json(of, rows, at, hours), indent=1) + "\n",
    }
    for suffix, text in texts.items():
        path = of.out / f"{STEM}.{suffix}"
        try:
            write_durably(path, text.encode())
        except OSError as error:
            raise DiskError(f"{path} can't be written: {error}") from error
    return of.out / f"{STEM}.html"


def _one_each(request: Request, rows: Sequence[Row]) -> list[Row]:
    """With another data set or model several cells have the same runs, of which one is shown."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        place = request.recipe(row.cell, 0).name, row.cell.column
        if place not in found or (found[place].result is None and row.result is not None):
            found[place] = row
    return list(found.values())


def _row(
    of: Everything,
    request: Request,
    cell: Cell,
    results: Mapping[Cell, Result],
    at: Mapping[str, Standing],
    hours: Mapping[str, Estimate],
) -> Row:
    names = [run_of(request, cell, s, of.options.max_steps).folder for s in request.seeds]
    states = [at[name].state for name in names]
    left = [hours[name] for name in names if at[name].state != "done"]
    return Row(
        cell,
        results.get(cell),
        _words(states),
        sum(at[name].seconds for name in names) / 3600,
        sum(one.hours for one in left),
    )


def _words(states: Sequence[str]) -> str:
    """``"done"``, or ``"1 done, 2 missing"``."""
    each = {state: states.count(state) for state in dict.fromkeys(states)}
    if len(each) == 1:
        return states[0]
    return ", ".join(f"{count} {state}" for state, count in each.items())


def _table(request: Request, rows: Sequence[Row], title: str) -> Table:
    columns = (
        Column("row", text=True),
        Column("column", text=True),
        Column("published"),
        Column("ours"),
        Column("difference"),
        Column("verdict", text=True),
        Column("state", text=True),
        Column("time"),
        Column("time left"),
    )
    lines = []
    for row in rows:
        cell, result = row.cell, row.result
        published = None if cell.mean is None else Sample(cell.mean, cell.std, cell.runs)
        caveat = "" if result is None else result.caveat or result.verdict
        lines.append(
            (
                *(cell.row if result is None else result.row, cell.column),
                None if caveat == ANOTHER_TASK else published,
                None if result is None else result.best,
                None if result is None else result.difference,
                caveat,
                row.state,
                in_hours(row.hours) if row.hours else "",
                in_hours(row.left) if 0 < row.left < math.inf else "",
            )
        )
    unit = rows[0].cell.unit
    return Table(request.table, f"{title} ({unit}, %)", columns, tuple(lines), (), grouped=True)


def _tried(request: Request, rows: Sequence[Row]) -> Table:
    """The table of a dry run: what each cell's run came to."""
    columns = (
        Column("row", text=True),
        Column("column", text=True),
        Column("recipe", text=True),
        Column("state", text=True),
        Column("time of the steps"),
    )
    lines = [
        (row.cell.row, row.cell.column, row.cell.recipe, row.state, in_hours(row.hours))
        for row in rows
    ]
    return Table(request.table, request.table, columns, tuple(lines), (), grouped=True)


def _facts(of: Everything, at: Mapping[str, Standing], hours: Mapping[str, Estimate]) -> list[str]:
    """The first lines of the page."""
    spent = sum(one.seconds for one in at.values()) / 3600
    left = [one for name, one in hours.items() if at[name].state != "done"]
    known = [one for one in left if not math.isinf(one.hours)]
    facts = [f"{summary(at)}; {in_hours(spent)} of training so far (measured)."]
    if known:
        by = {how: sum(one.how == how for one in known) for how in HOW}
        ways = "; ".join(f"{count} by {HOW[how]}" for how, count in by.items() if count)
        total = in_hours(sum(one.hours for one in known))
        facts.append(f"About {total} are left on one {of.speeds.machine} (estimated: {ways}).")
    if len(known) < len(left):
        facts.append(
            f"The time of {len(left) - len(known)} runs isn't known: no speed is measured."
        )
    return facts


def _reasons(at: Mapping[str, Standing]) -> list[str]:
    """Why runs failed or can't be trained; what runs of a data set have in common once."""
    lines = [f"no data: {one.note}" for one in at.values() if one.state == "no data"]
    lines += [f"{name} failed: {one.note}" for name, one in at.items() if one.state == "failed"]
    lines += [
        f"{name} is trained by {one.note}" for name, one in at.items() if one.state == "running"
    ]
    return [*dict.fromkeys(lines)]


def _html(
    title: str,
    facts: Sequence[str],
    notes: Sequence[str],
    tables: Sequence[Table],
    reasons: Sequence[str],
) -> str:
    listed = "".join(f"<li>{in_html(line)}</li>" for line in (*facts, *notes))
    why = "".join(f"<li>{in_html(line)}</li>" for line in reasons)
    parts = [
        f'<ul class="rules">{listed}</ul>',
        f"<h2>{UNFINISHED}</h2><ul>{why}</ul>" if reasons else "",
        *(f"<h2>{in_html(table.title)}</h2>{as_html(table)}" for table in tables),
    ]
    return page_of(title, "\n".join(parts))


def _markdown(
    title: str,
    facts: Sequence[str],
    notes: Sequence[str],
    tables: Sequence[Table],
    reasons: Sequence[str],
) -> str:
    parts = [f"# {in_markdown(title)}"]
    parts.append("\n".join(f"- {in_markdown(line)}" for line in (*facts, *notes)))
    if reasons:
        parts.append(f"## {UNFINISHED}")
        parts.append("\n".join(f"- {in_markdown(line)}" for line in reasons))
    return "\n\n".join([*parts, *(as_markdown(table).rstrip() for table in tables)]) + "\n"


def _json(
    of: Everything,
    rows: Sequence[Row],
    at: Mapping[str, Standing],
    hours: Mapping[str, Estimate],
) -> dict[str, Any]:
    """The same facts, and those of each run."""
    runs = {
        name: {
            "state": one.state,
            "note": one.note,
            "epochs": one.epochs,
            "hours": one.seconds / 3600,
            "hours_left": _finite(hours[name].hours),
            "estimated_by": hours[name].how,
        }
        for name, one in at.items()
    }
    cells = [
        {
            "table": row.cell.table,
            "row": row.cell.row,
            "column": row.cell.column,
            "published": row.cell.mean,
            "ours": None if row.result is None else row.result.best.mean,
            "seeds": 0 if row.result is None else row.result.best.runs,
            "verdict": "" if row.result is None else row.result.caveat or row.result.verdict,
            "state": row.state,
            "hours": row.hours,
            "hours_left": _finite(row.left),
        }
        for row in rows
    ]
    return {"machine": of.speeds.machine, "cells": cells, "runs": runs}


def _finite(hours: float) -> float | None:
    return None if math.isinf(hours) else hours
