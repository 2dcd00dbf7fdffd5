"""A table of the papers: our results beside the published numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastokd.host.names import counted
from fastokd.methods import method_class
from fastokd.recipe.cells import Cell
from fastokd.recipe.names import Recipe, recipe
from fastokd.report.published import altered
from fastokd.report.statistics import Difference, Sample, welch
from fastokd.report.tables import Column, Table
from fastokd.reproduce.wanted import Request, run_of
from fastokd.run.folder import Run
from fastokd.run.summary import summarise

ANOTHER_TASK = "another task"


@dataclass(frozen=True)
class Result:
    """Our result for one cell.

    ``row`` and ``column`` name what was run, in the place of the cell's where that differs. ``last``
    and ``best`` are on test, in the cell's unit, in %. ``difference``: the best epoch, as in the
    papers' protocol, minus the published number; None for another task. ``caveat``: the differences
    of the runs from the cell; with a caveat there is no ``verdict``. ``from_baseline``: the last epoch
    minus that of the row's baseline.
    """

    cell: Cell
    recipe: Recipe
    row: str
    column: str
    last: Sample
    best: Sample
    best_on: str
    difference: Difference | None
    verdict: str
    caveat: str
    from_baseline: Difference | None = None


@dataclass(frozen=True)
class Reproduction:
    """The results of a table; ``title`` names epochs and data."""

    table: str
    title: str
    notes: tuple[str, ...]
    results: tuple[Result, ...]

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        cells = [{**dataclasses.asdict(r), "recipe": r.recipe.name} for r in self.results]
        return {"title": self.title, "notes": list(self.notes), "cells": cells}


def reproduction_of(
    request: Request, found: Mapping[str, Run], max_steps: int | None
) -> Reproduction:
    """The table of the runs ``found``, by their folders; cells without a run have no result.

    Cells that are the same runs by ``model`` or ``dataset`` are one; the paper's own task counts.
    """
    by_place: dict[tuple[str, str], Result] = {}
    for cell in request.cells():
        judged = [request.recipe(cell, seed) for seed in request.seeds]
        folders = [run_of(request, cell, seed, max_steps).folder for seed in request.seeds]
        runs = [found[folder] for folder in folders if folder in found]
        if not runs:
            continue
        result = _result(cell, judged[0], runs)
        before = by_place.get((result.row, result.column))
        if before is None or before.caveat == ANOTHER_TASK != result.caveat:
            by_place[result.row, result.column] = result
    results = [_beside_baseline(result, by_place) for result in by_place.values()]
    if not results:
        return Reproduction(request.table, f"{request.table}, without a run", (), ())
    return Reproduction(request.table, _title(request, results), _notes(results), tuple(results))


def _result(cell: Cell, judged: Recipe, runs: Sequence[Run]) -> Result:
    def in_unit(fractions: list[float]) -> Sample:
        percent = [100 * value for value in fractions]
        return Sample.of([100 - v for v in percent] if cell.unit == "error" else percent)

    sums = [summarise(run, judged) for run in runs]
    best = in_unit([s.best for s in sums])
    otherwise = altered(cell, judged, runs)
    caveat = ANOTHER_TASK if otherwise is None else ", ".join(otherwise)
    difference = None
    if cell.mean is not None and caveat != ANOTHER_TASK:
        difference = welch(best, Sample(cell.mean, cell.std, cell.runs))
    return Result(
        cell,
        judged,
        row=_as_run(cell.row, cell, judged),
        column=_as_run(cell.column, cell, judged),
        last=in_unit([s.last for s in sums]),
        best=best,
        best_on=sums[0].best_on,
        difference=difference,
        verdict=_verdict(cell, difference) if not caveat else "",
        caveat=caveat,
    )


def _as_run(name: str, cell: Cell, judged: Recipe) -> str:
    """The name of a row or column; the model or data set of the run in place of the paper's."""
    _, model, dataset = cell.recipe.split("/")
    return {model: judged.model, dataset: judged.dataset}.get(name, name)


def _beside_baseline(result: Result, by_place: Mapping[tuple[str, str], Result]) -> Result:
    alone = by_place.get((result.row, "baseline"))
    if alone is None or alone is result or alone.recipe.model != result.recipe.model:
        return result
    return dataclasses.replace(result, from_baseline=welch(result.last, alone.last))


def _verdict(cell: Cell, difference: Difference | None) -> str:
    """Whether our mean agrees with the published one; single runs aren't judged."""
    if cell.mean is None:
        return "no number published"
    if cell.std is None:
        return "the paper has a single run"
    if difference is None or difference.interval is None:
        return "one seed"
    low, high = difference.interval
    return "agrees" if low <= 0 <= high else "differs"


def _title(request: Request, results: Sequence[Result]) -> str:
    recipes = [result.recipe for result in results]
    published = [recipe(result.cell.recipe) for result in results]
    what = f"{_data(recipes)}, {counted(len(request.seeds), 'seed')}"
    if request.model is not None:
        what = f"{request.model} on {what}"
    if any(result.caveat for result in results):
        return f"{request.table} in small, no reproduction: {what} (the paper: {_data(published)})"
    return f"{request.table}, reproduced: {what}"


def _data(recipes: Sequence[Recipe]) -> str:
    """Data and epochs, for the title."""
    names = " and ".join(dict.fromkeys(r.dataset for r in recipes))
    held_out = max(r.val for r in recipes)
    apart = f" without {held_out} held out" if held_out else ""
    low, high = min(r.epochs for r in recipes), max(r.epochs for r in recipes)
    epochs = counted(high, "epoch") if low == high else f"{low} to {high} epochs"
    return f"{names}{apart}, {epochs}"


def _notes(results: Sequence[Result]) -> tuple[str, ...]:
    chosen = {
        "val": "The best epoch is chosen on held-out images (val), then scored on test.",
        "test": "The best epoch is chosen on test, as the papers did it: biased upwards.",
    }
    splits = {result.best_on for result in results}
    on_row = "The best epoch is chosen on the split named in its row, then scored on test."
    notes = [
        f"Top-1 {results[0].cell.unit} on the test split in %, mean ± standard deviation over seeds.",
        chosen[splits.pop()] if len(splits) == 1 else on_row,
    ]
    if all(result.caveat == ANOTHER_TASK for result in results):
        notes.append("No published numbers: the student or the data aren't the paper's.")
    if any(result.difference for result in results):
        notes.append(
            "Difference: best epoch minus published, with Welch's 95% interval where both have one."
        )
    elif any(result.from_baseline for result in results):
        notes.append(
            "Difference from baseline: last epoch, in points, with Welch's 95% interval (two seeds or "
            "more)."
        )
    if any(method_class(r.recipe.method).needs.teacher for r in results):
        notes.append("One teacher, of seed 0, taught the students of all seeds.")
    return tuple(notes)


def as_table(reproduction: Reproduction) -> Table:
    """The table that the command prints and writes.

    Of another task than the paper's it has no published numbers, but the differences from baseline.
    What is the same in all rows and said in a note has no column.
    """
    results = reproduction.results
    unit = f"{results[0].cell.unit} (%)"
    columns = (
        Column("row", text=True),
        Column("column", text=True),
        Column(f"last epoch, {unit}"),
        Column(f"best epoch, {unit}"),
        Column("chosen on", text=True),
        Column("published"),
        Column("difference"),
        Column("difference from baseline"),
        Column("verdict", text=True),
    )
    compared = any(result.difference for result in results)
    several_splits = len({result.best_on for result in results}) > 1
    no_other = all(result.caveat == ANOTHER_TASK for result in results)
    rows = []
    for result in results:
        cell, judged = result.cell, result.caveat != ANOTHER_TASK
        published = None
        if judged and cell.mean is not None:
            published = Sample(cell.mean, cell.std, cell.runs)
        rows.append(
            (
                *(result.row, result.column, result.last, result.best),
                result.best_on if several_splits else None,
                *(published, result.difference),
                None if compared else result.from_baseline,
                None if no_other else result.caveat or result.verdict,
            )
        )
    title, notes = reproduction.title, reproduction.notes
    table = Table(reproduction.table, title, columns, tuple(rows), notes, grouped=True)
    return table.without_empty_columns()
