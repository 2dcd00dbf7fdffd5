"""The part of a page about many runs: a filter, parallel coordinates, and a table of every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastokd.report.charts import Chart, as_figure
from fastokd.report.fields import Fields, filter_form, said, varying
from fastokd.report.html_tables import as_html
from fastokd.report.parallel import MOST_AXES, Axis, axes_of, draw_parallel, parallel_spec
from fastokd.report.pools import Pool
from fastokd.report.statistics import Sample
from fastokd.report.tables import Cell, Column, Table, Written
from fastokd.run.summary import summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Fewer runs are seen at a glance.
MANY = 5
# A phone's width is enough for the names of as many settings.
BROAD = 3
CAPTION = (
    "A line is a run, an axis a setting in which the runs differ. The last axis, and the line's colour from "
    "orange (lowest) to blue (highest), is the result of its last epoch: {result}. Lines through the same value "
    "are ordered by that result. Point at a line for its run; click to mark it, with Shift several, here and in "
    "the tables. The table “Every run” has the same numbers."
)


@dataclass(frozen=True)
class Many:
    """Runs by name, the ``fields`` in which they differ, and a result, called ``result``, of each."""

    names: Sequence[str]
    fields: Fields
    result: str
    values: Sequence[float]
    table: Table

    def section(self, first: str, others: str, static: str) -> str:
        """The filter and what it filters: HTML with the ``first`` tables, the chart with its ``static`` form
        (SVG, "" for no chart), the ``others``, and the table of every run."""
        form = filter_form(self.fields, self.names) if self.fields else ""
        every = f"<h3>{self.table.title}</h3>{as_html(self.table)}"
        return f"{form}{first}{self._figure(static)}{others}{every}"

    def _figure(self, static: str) -> str:
        axes = self.axes
        if not axes or not static:
            return ""
        left = [*self.fields][MOST_AXES - 1 :]
        caption = CAPTION.format(result=self.result)
        caption += f" Without an axis here: {', '.join(left)}." if left else ""
        spec = parallel_spec(axes, self.names)
        figure = as_figure(
            Chart("parallel", "Settings and result", caption, spec, static, wide=True)
        )
        return f'<div class="broad">{figure}</div>' if len(self.fields) > BROAD else figure

    @property
    def axes(self) -> list[Axis]:
        """Of parallel coordinates; none if the runs differ in fewer than two settings beside the seed."""
        if len(self.fields.keys() - {"seed"}) < 2:
            return []
        return axes_of(self.fields, self.result, self.values)

    def draw(self) -> Figure | None:
        """The parallel coordinates as a static figure."""
        return draw_parallel(self.axes) if self.axes else None


def many_of(pools: Sequence[Pool]) -> Many | None:
    """The runs of all pools, numbered as by :func:`numbers_of`; None if they are few."""
    runs = [run for pool in pools for run in pool.runs]
    if len(runs) < MANY:
        return None
    fields, names = varying(runs), [str(run.folder) for run in runs]
    found = [summarise(run) for run in runs]
    seconds = [run.seconds for run in runs]
    results: dict[Column, Sequence[Cell]] = {
        Column("last epoch", "test top-1 (%)"): [_one(100 * one.last) for one in found],
        Column("best epoch", "test top-1 (%)"): [_one(100 * one.best) for one in found],
        Column("best epoch"): [one.best_epoch for one in found],
        Column("epochs trained"): [run.standing.epochs for run in runs],
        Column("training (s)", digits=1): [_one(value) for value in seconds],
    }
    notes = ("Top-1 on the test split as reported, from each run's metrics.jsonl.",)
    table = runs_table(names, fields, results, notes)
    return Many(names, fields, "test top-1 (%)", [100 * one.last for one in found], table)


def _one(value: float) -> Sample:
    return Sample(value, None, 1)


def runs_table(
    names: Sequence[str],
    fields: Fields,
    results: dict[Column, Sequence[Cell]],
    notes: tuple[str, ...],
) -> Table:
    """A row for each run: its name, the first of its results, the settings in which the runs differ, and the
    other results."""
    first, *others = results.items()
    columns = [Column("run", text=True), first[0]]
    cells: list[Sequence[Cell]] = [names, first[1]]
    for name, values in fields.items():
        words = any(isinstance(value, (str, bool)) for value in values)
        columns.append(Column(name, text=words))
        cells.append(
            [None if v is None else said(v) if words else Written(said(v), v) for v in values]
        )
    for column, its in others:
        columns.append(column)
        cells.append(its)
    rows = tuple(zip(*cells, strict=True))
    numbers = tuple((number,) for number in range(len(names)))
    table = Table("runs", "Every run", tuple(columns), rows, notes, runs=numbers)
    return table.without_empty_columns()
