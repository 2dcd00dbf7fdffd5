"""The order in which the runs of several tables are trained, and what fits a budget.

A *comparison* is a row of a table on one data set: the students that the paper compares with each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fastokd.recipe.cells import Cell
from fastokd.reproduce.wanted import Request, Training, runs_of
from fastokd.run.durations import in_words

# Runs on these images come after all others.
LARGE = "imagenet"
RULE = (
    "Order: the comparison (a row of a table on one data set) with the least work left first, by the "
    "counted FLOPs of the runs that it still needs; ImageNet last. Within it seed by seed, teachers and "
    "baselines first. A run is begun only if it would end in time; one that needs more than the whole "
    "budget is begun when nothing else fits, and continued by the next call."
)


@dataclass(frozen=True)
class Comparison:
    """The runs of a row of a table on one data set, by seed, each seed's in the order of training."""

    table: str
    row: str
    dataset: str
    runs: Mapping[int, tuple[str, ...]]

    def folders(self) -> list[str]:
        """The folders of all seeds' runs, seed by seed."""
        return [folder for seed in self.runs.values() for folder in seed]


def comparisons(
    requests: Iterable[Request], max_steps: int | None = None
) -> tuple[list[Comparison], dict[str, Training]]:
    """The comparisons of the tables, and all their runs by folder. Tables share runs."""
    found: list[Comparison] = []
    known: dict[str, Training] = {}
    for request in requests:
        rows: dict[tuple[str, str], list[Cell]] = {}
        for cell in request.cells():
            rows.setdefault((cell.row, request.recipe(cell, 0).dataset), []).append(cell)
        for (row, dataset), cells in rows.items():
            by_seed = {}
            for seed in request.seeds:
                runs = [run for cell in cells for run in runs_of(request, cell, seed, max_steps)]
                for run in runs:
                    known.setdefault(run.folder, run)
                first = sorted(runs, key=lambda run: run.entry.recipe.method != "baseline")
                by_seed[seed] = tuple(dict.fromkeys(run.folder for run in first))
            found.append(Comparison(request.table, row, dataset, by_seed))
    return found, known


def in_order(found: Sequence[Comparison], work: Mapping[str, float]) -> list[str]:
    """The folders of all runs in the order of training (:data:`RULE`); ``work``: what is left of each."""
    left, taken = list(found), dict[str, None]()

    def left_of(comparison: Comparison) -> tuple[bool, float]:
        new = {folder for folder in comparison.folders() if folder not in taken}
        return comparison.dataset == LARGE, sum(work[folder] for folder in new)

    while left:
        cheapest = min(left, key=left_of)  # the first of equal ones
        taken |= dict.fromkeys(cheapest.folders())
        left.remove(cheapest)
    return list(taken)


@dataclass(frozen=True)
class Job:
    """A run that isn't done: the hours that it still needs, and its teacher's folder or "".

    ``start`` and ``end`` are hours from now; None if it doesn't fit the budget. ``part``: the budget
    ends before it does.
    """

    folder: str
    hours: float
    teacher: str = ""
    start: float | None = None
    end: float | None = None
    part: bool = False


def fit(jobs: Sequence[Job], left: float, slots: int, budget: float) -> list[Job]:
    """The jobs, given in order, on ``slots`` devices within the ``left`` hours of a budget, as :data:`RULE`
    says.

    A student starts after its teacher. A teacher that isn't among the jobs is done.
    """
    free = [0.0] * slots
    placed: dict[str, Job] = {job.folder: job for job in jobs}
    for job in jobs:
        teacher = placed.get(job.teacher)
        if teacher is not None and teacher.end is None:
            continue
        after = 0.0 if teacher is None else teacher.end or 0.0
        # Of the slots where it starts first, the one that would be idle for the shortest time.
        slot = min(range(slots), key=lambda slot: (max(free[slot], after), -free[slot]))
        start = max(free[slot], after)
        if start + job.hours <= left:
            free[slot] = start + job.hours
            placed[job.folder] = replace(job, start=start, end=free[slot])
    # Runs longer than the budget would never be begun otherwise.
    long = [job for job in jobs if job.hours > budget and job.teacher not in placed]
    for slot, job in zip(sorted(range(slots), key=free.__getitem__), long, strict=False):
        if free[slot] < left:
            placed[job.folder] = replace(job, start=free[slot], end=None, part=True)
    return list(placed.values())


def in_hours(hours: float) -> str:
    """``"41 s"``, ``"12 min"`` or ``"3.1 h"``."""
    return in_words(3600 * hours)
