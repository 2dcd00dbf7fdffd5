"""The section of a page about many runs: a filter, parallel coordinates, and a table of every run."""

from __future__ import annotations

from collections.abc import Sequence

from fastokd.report.charts import Chart, as_figure
from fastokd.report.fields import Fields, filter_form, said
from fastokd.report.parallel import MOST_AXES, axes_of, draw_parallel, parallel_spec
from fastokd.report.plots import as_svg, in_page
from fastokd.report.tables import Cell, Column, Shown, Table

# Fewer runs are seen at a glance.
MANY = 5
# A phone's width is enough for as many axes.
BROAD = 6
# Columns of a result, and its cells.
Result = tuple[Column, Sequence[Cell]]


def runs_table(names: Sequence[str], fields: Fields, results: Sequence[Result]) -> Table:
    """A row for each run: its name, the settings in which the runs differ, and its results."""
    columns = [Column("run", text=True)]
    cells: list[Sequence[Cell]] = [names]
    for name, values in fields.items():
        words = any(isinstance(value, (str, bool)) for value in values)
        columns.append(Column(name, text=words))
        cells.append(
            [None if v is None else said(v) if words else Shown(said(v), v) for v in values]
        )
    for column, its in results:
        columns.append(column)
        cells.append(its)
    rows = tuple(zip(*cells, strict=True))
    numbers = tuple((number,) for number in range(len(names)))
    return Table("runs", "Every run", tuple(columns), rows, runs=numbers).without_empty_columns()


def parallel_chart(
    names: Sequence[str], fields: Fields, result: str, values: Sequence[float]
) -> Chart | None:
    """The chart of runs that differ in more than one setting beside the seed; else None."""
    if len(fields.keys() - {"seed"}) < 2:
        return None
    axes = axes_of(fields, result, values)
    left = [*fields][MOST_AXES - 1 :]
    caption = (
        "A line is a run, an axis a setting in which the runs differ; the last axis, and the line's colour "
        f"from orange (lowest) to blue (highest), is the {result}. Lines through the same value are ordered by "
        "that result. Point at a line for its run; click to mark it, with Shift several, here and in the tables. "
        "The table below has the same numbers."
    )
    if left:
        caption += f" Without an axis here: {', '.join(left)}."
    static = in_page(as_svg(draw_parallel(axes)))
    return Chart(
        "parallel", "Settings and result", caption, parallel_spec(axes, names), static, wide=True
    )


def many_runs(
    names: Sequence[str], fields: Fields, tables: Sequence[str], chart: Chart | None
) -> str:
    """A ``<section>`` with ``tables`` (HTML) and the chart, and above them a form that filters them."""
    form = filter_form(fields, names) if fields else ""
    figure = as_figure(chart) if chart else ""
    if len(fields) > BROAD:
        figure = f'<div class="broad">{figure}</div>'
    first, *others = tables
    return f"<section>{form}{first}{figure}{''.join(others)}</section>"
