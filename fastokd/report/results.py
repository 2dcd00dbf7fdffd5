"""The tables of a report: the results, the difference from baseline, and the papers' numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fastokd.data.balance import sentences
from fastokd.recipe.cells import cells_of, tables
from fastokd.recipe.names import Recipe, recipe
from fastokd.report.pools import Pool, numbers_of
from fastokd.report.published import altered
from fastokd.report.statistics import Difference, Sample, welch
from fastokd.report.tables import Cell, Column, Table
from fastokd.run.facts import RunFacts

TOP1 = "test top-1 (%)"
RESULTS = (
    Column("recipe", text=True),
    Column("folder", text=True, aside=True),
    Column("last epoch", TOP1),
    Column("difference from baseline", TOP1),
    Column("best epoch", TOP1),
    Column("ensemble", TOP1),
    Column("best epoch chosen on", text=True),
    Column("diversity on test", digits=3),
    Column("reported", text=True),
    Column("runs"),
    Column("epochs"),
    Column("training (s)", digits=0),
)
PUBLISHED = (
    Column("cell", text=True),
    Column("test top-1 (%)", text=True),
    Column("epochs"),
    Column("ours, best epoch"),
    Column("published"),
    Column("difference"),
    Column("note", text=True),
)
# Fields that belong to the method, in which a cohort may differ from its baseline.
OF_THE_METHOD = {
    *("name", "method", "method_options", "model_options", "model", "sharing", "students"),
    *("ramp_epochs", "ramp_first", "reported", "teacher", "seed"),
}
# What a baseline must have in common with the cohort that it is compared with.
OF_THE_DATA = ("dataset", "val", "test", "image_size", "fraction", "label_noise")


def results_table(pools: Sequence[Pool]) -> Table:
    """The test accuracy of each pool, and its difference from its baseline."""
    rows = tuple(_row(pool, baseline_of(pool, pools)) for pool in pools)
    notes = _notes(pools, rows)
    table = Table("results", "Results", RESULTS, rows, notes, runs=numbers_of(pools))
    return table.without_empty_columns()


def _row(pool: Pool, baseline: Pool | None) -> tuple[Cell, ...]:
    students, epochs = pool.recipe.students, pool.recipe.epochs
    ensemble = pool.of_last(lambda row: 100 * row["test"]["ensemble_top1"])
    seconds = Sample.of([run.seconds for run in pool.runs])
    return (
        pool.label,
        pool.folders,
        pool.last(),
        None if baseline is None else welch(pool.last(), baseline.last()),
        pool.best(),
        None if students == 1 else ensemble,
        pool.best_on,
        pool.of_last(lambda row: row["test"]["diversity"]),
        pool.reported if students == 1 else f"{pool.reported} of {students}",
        len(pool.runs),
        epochs if pool.epochs == epochs else f"{pool.epochs} of {epochs}",
        Sample(seconds.mean, None, seconds.runs),
    )


def _notes(pools: Sequence[Pool], rows: Sequence[Sequence[Cell]]) -> tuple[str, ...]:
    several = any(len(pool.runs) > 1 for pool in pools)
    spread = ": mean ± standard deviation over runs" if several else ""
    notes = [
        f"Every accuracy is top-1 on the test split{spread}. The best epoch is chosen on the split "
        "named in its row, and then scored on test."
    ]
    if any("test" in pool.best_on for pool in pools):
        notes.append("A best epoch chosen on test, as in the papers, is biased upwards.")
    differences = [cell for row in rows for cell in row if isinstance(cell, Difference)]
    if differences:
        note = (
            "Difference from baseline: the last epoch's accuracy minus that of the network trained "
            "alone (same student, data and epochs), in points, with Welch's 95% interval in brackets"
        )
        single = any(difference.interval is None for difference in differences)
        notes.append(
            f"{note}; no interval: one of the two has a single run." if single else f"{note}."
        )
    if any(pool.recipe.dataset in ("imagenet", "imagefolder") for pool in pools):
        notes.append("A set of images on disk that has no test split is tested on its val/.")
    for pool in pools:
        of = RunFacts(pool.runs[0].folder).data()
        notes.extend(f"{pool.recipe.dataset}: {said}." for said in sentences(of))
    environments = [RunFacts(run.folder).environment() for pool in pools for run in pool.runs]
    machines = [e.get("gpu") or e.get("cpu") for e in environments]
    if where := ", ".join(dict.fromkeys(str(name) for name in machines if name)):
        notes.append(f"Measured on {where}.")
    return tuple(dict.fromkeys(notes))


def baseline_of(pool: Pool, pools: Sequence[Pool]) -> Pool | None:
    """The pool of the same student trained alone, on the same data for as many epochs; None if there
    is none. Of several, the one whose other settings are the most similar."""
    student = _student(pool)
    alike = [
        other
        for other in pools
        if other.recipe.method == "baseline"
        and pool.recipe.method != "baseline"
        and other.recipe.model == student
        and other.epochs == pool.epochs
        and not _differing(pool.recipe, other.recipe).intersection(OF_THE_DATA)
    ]
    return min(alike, key=lambda other: len(_differing(pool.recipe, other.recipe)), default=None)


def _student(pool: Pool) -> str | None:
    """The model whose accuracy is reported; None for the mean of several models."""
    names = pool.recipe.model.split("+")
    return names[-1] if len(names) == 1 or pool.recipe.reported == "leader" else None


def _differing(ours: Recipe, theirs: Recipe) -> set[str]:
    names = {field.name for field in dataclasses.fields(Recipe)} - OF_THE_METHOD
    return {name for name in names if getattr(ours, name) != getattr(theirs, name)}


def published_table(pools: Sequence[Pool]) -> Table | None:
    """The papers' cells of these recipes with our results, and all differences of the runs; None if
    there is no such cell."""
    rows: list[tuple[Cell, ...]] = []
    cells = [cell for table in tables() for cell in cells_of(table) if cell.mean is not None]
    for pool in pools:
        for cell in cells:
            if cell.recipe != pool.recipe.name:
                continue
            theirs = Sample(cell.mean or 0.0, cell.std, cell.runs)
            best = pool.best()
            if cell.unit == "error":
                best = Sample(100 - best.mean, best.std, best.runs)
            otherwise = altered(cell, pool.recipe, pool.runs)
            if otherwise is None:
                continue
            rows.append(
                (
                    f"{cell.table}, {cell.row}, {cell.column}",
                    cell.unit,
                    f"{pool.epochs} of {recipe(cell.recipe).epochs}",
                    best,
                    theirs,
                    welch(best, theirs),
                    f"no reproduction: {', '.join(otherwise)}" if otherwise else "",
                )
            )
    if not rows:
        return None
    notes = (
        "Top-1 on the test split in %, mean ± standard deviation over runs. Difference: ours minus the "
        "published number, with Welch's 95% interval where both have a deviation.",
    )
    table = Table("published", "Beside the papers", PUBLISHED, tuple(rows), notes)
    return table.without_empty_columns()
