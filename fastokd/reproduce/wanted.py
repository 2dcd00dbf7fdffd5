"""The runs that the cells of the papers' tables need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastokd.errors import UserError
from fastokd.recipe.cells import Cell, cells_of
from fastokd.recipe.names import Recipe, recipe
from fastokd.recipe.settings import WantedRun
from fastokd.student.teacher import teacher_recipe


@dataclass(frozen=True)
class Request:
    """Which cells of a table to train, and with which changes.

    ``dataset`` and ``model`` replace the paper's, ``epochs`` scales its schedule; ``only`` selects
    the cells whose recipe's name contains it; ``val`` images are held out to choose the best epoch.
    ``batch_size`` and ``lr`` replace the recipe's, for runs whose accuracy doesn't matter.
    """

    table: str
    seeds: tuple[int, ...] = (0, 1, 2)
    dataset: str | None = None
    model: str | None = None
    epochs: int | None = None
    val: float | None = None
    only: str = ""
    batch_size: int | None = None
    lr: float | None = None

    def cells(self) -> list[Cell]:
        """The selected cells; only those of ``dataset`` if the table has any."""
        cells = [cell for cell in cells_of(self.table) if self.only in cell.recipe]
        if not cells:
            every = (self.recipe(cell, 0).name for cell in cells_of(self.table))
            names = ", ".join(dict.fromkeys(every))
            raise UserError(f"--only {self.only!r} leaves no cell of {self.table}: it has {names}")
        of_it = [cell for cell in cells if cell.recipe.endswith(f"/{self.dataset}")]
        return of_it or cells

    def recipe(self, cell: Cell, seed: int) -> Recipe:
        """The recipe of a cell; it also says whose accuracy is reported."""
        return _recipe_of(self, cell, seed)

    def teacher(self, student: Recipe) -> Recipe:
        """A teacher is trained for as many epochs as its students, by the same batch size."""
        return teacher_recipe(student, **self.scaled())

    def scaled(self) -> dict[str, Any]:
        """The settings that students and teachers share."""
        changes = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr}
        return {name: value for name, value in changes.items() if value is not None}


@cache
def _recipe_of(request: Request, cell: Cell, seed: int) -> Recipe:
    method, model, dataset = cell.recipe.split("/")
    if request.model is not None and "teacher" not in cell.column:
        model = request.model
    changes = {"seed": seed, "val": request.val, **request.scaled()}
    changes = {name: value for name, value in changes.items() if value is not None}
    return recipe(f"{method}/{model}/{request.dataset or dataset}", **changes)


@dataclass(frozen=True)
class Training:
    """A run that is wanted; ``teacher`` is the folder of the run that teaches it, "" for none."""

    entry: WantedRun
    teacher: str = ""

    @property
    def folder(self) -> str:
        """The name of the run's folder, which says the recipe, epochs, held-out images and seed."""
        return self.entry.folder


def trainings(request: Request, max_steps: int | None) -> dict[str, Training]:
    """The runs of a table by their folders, teachers before all others.

    Cells that differ only in whose accuracy they report share their runs.
    """
    found: dict[str, Training] = {}
    for cell in request.cells():
        for seed in request.seeds:
            for training in runs_of(request, cell, seed, max_steps):
                found.setdefault(training.folder, training)
    taught = {training.teacher for training in found.values()}
    return dict(sorted(found.items(), key=lambda item: item[0] not in taught))


def runs_of(request: Request, cell: Cell, seed: int, max_steps: int | None) -> Iterator[Training]:
    """The run of a cell, after its teacher if it has one."""
    entry = run_of(request, cell, seed, max_steps)
    if not entry.recipe.teacher:
        yield Training(entry)
        return
    taught_by = _training(request.teacher(entry.recipe), max_steps)
    yield Training(taught_by)
    yield Training(entry, taught_by.folder)


@cache
def run_of(request: Request, cell: Cell, seed: int, max_steps: int | None) -> WantedRun:
    """The run of a cell, independent of whose accuracy is reported.

    With ``max_steps`` the folder has another name, so that a complete student never has an
    incomplete teacher.
    """
    return _training(request.recipe(cell, seed), max_steps)


def _training(judged: Recipe, max_steps: int | None) -> WantedRun:
    method, model, dataset = judged.name.split("/", 2)
    plain = recipe(f"{method.replace('-ensemble', '')}/{model}/{dataset}")
    trained = dataclasses.replace(judged, name=plain.name, reported=plain.reported)
    folder = f"{plain.name.replace('/', '-')}-{trained.epochs}epochs"
    folder += f"-val{trained.val}" if trained.val else ""
    folder += "" if max_steps is None else f"-{max_steps}steps"
    return WantedRun(f"{folder}-seed{trained.seed}", trained, {"seed": trained.seed})
