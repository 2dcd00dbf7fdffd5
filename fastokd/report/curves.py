"""The curves of a report as numbers: :mod:`fastokd.report.plots` and :mod:`fastokd.report.live` draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from fastokd.report.pools import EpochMetrics, Pool
from fastokd.report.tables import Cell, Column, Table

Value = Callable[[Pool, EpochMetrics], float | None]


@dataclass(frozen=True)
class Curve:
    """Mean and standard deviation (0 for a single run) over the runs, epoch by epoch (from 1).

    ``kind``: of the leader, of the ensemble, or a student or recipe, which ``index`` gives its style.
    """

    label: str
    index: int
    epochs: Sequence[int]
    means: Sequence[float]
    deviations: Sequence[float]
    kind: Literal["", "leader", "ensemble"] = ""

    def cells(self, digits: int) -> dict[int, str]:
        """The numbers of each epoch as text, with so many significant digits."""
        spread = any(self.deviations)
        return {
            epoch: f"{mean:.{digits}g} ± {deviation:.{digits}g}" if spread else f"{mean:.{digits}g}"
            for epoch, mean, deviation in zip(self.epochs, self.means, self.deviations, strict=True)
        }


@dataclass(frozen=True)
class Panel:
    """One figure. ``title`` names the quantity, its split and its unit; ``digits``: of its table."""

    name: str
    title: str
    curves: Sequence[Curve]
    digits: int = 4

    @property
    def logarithmic(self) -> bool:
        """Whether the values, all above 0, span a factor of 10."""
        values = [v for curve in self.curves for v in curve.means if math.isfinite(v)]
        return bool(values) and 0 < 10 * min(values) <= max(values)

    @property
    def heading(self) -> str:
        """Of the figure."""
        return f"{self.title}, logarithmic" if self.logarithmic else self.title

    def table(self) -> Table:
        """A row an epoch, a column a curve."""
        found = [curve.cells(self.digits) for curve in self.curves]
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (epoch, *(cells.get(epoch, "") for cells in found))
            for epoch in sorted({epoch for cells in found for epoch in cells})
        )
        columns = (Column("epoch"), *(Column(curve.label) for curve in self.curves))
        spread = any(any(curve.deviations) for curve in self.curves)
        notes = (
            ("Mean ± standard deviation, where the runs of several seeds differ.",)
            if spread
            else ()
        )
        return Table(f"{self.name}-numbers", self.title, columns, rows, notes)


def panels_of(pools: Sequence[Pool]) -> list[Panel]:
    """The panels for which there are numbers: ``loss``, ``accuracy`` (every student's where there is one
    pool), ``diversity``, ``lr`` and ``kd_weight``, the ramp of the distillation."""
    together = (
        ", all students"
        if any(pool.recipe.students > 1 or pool.recipe.teacher for pool in pools)
        else ""
    )
    several = len(pools) > 1
    panels = [
        Panel(
            "loss", f"loss on train{together}", _each(pools, lambda _, row: row["train"]["loss"])
        ),
        Panel("accuracy", "top-1 on test, as reported (%)", _each(pools, _reported, _by_whom))
        if several
        else _students(pools[0]),
        Panel("diversity", "diversity of the peers on test", _each(pools, _diversity)),
        Panel("lr", "learning rate", _each(pools, lambda _, row: row.get("lr"))),
    ]
    if any(pool.recipe.students > 1 for pool in pools):
        weight = _each(pools, lambda _, row: row.get("kd_weight"))
        panels.append(Panel("kd_weight", "weight of the distillation (ramp)", weight))
    return [panel for panel in panels if panel.curves]


def _each(
    pools: Sequence[Pool], value: Value, label: Callable[[Pool], str] = lambda pool: pool.label
) -> list[Curve]:
    """A curve for each pool that has values; its style is its place among the pools."""
    curves = []
    for index, pool in enumerate(pools):
        found = pool.curve(partial(value, pool))
        if found[0]:
            curves.append(Curve(label(pool), index, *found))
    return curves


def _reported(pool: Pool, row: EpochMetrics) -> float | None:
    return 100 * pool.recipe.score(row["test"]) if "test" in row else None


def _by_whom(pool: Pool) -> str:
    return f"{pool.label}, {pool.reported}"


def _diversity(_: Pool, row: EpochMetrics) -> float | None:
    return row["test"]["diversity"] if "test" in row else None


def _students(pool: Pool) -> Panel:
    """Test accuracy of every student, and of the ensemble if there are several."""
    curves = []
    alone = pool.recipe.students == 1
    for student in range(pool.recipe.students):
        name = who(pool, student)
        label = "student" if alone else name if name == "leader" else f"student {name}"
        found = pool.curve(partial(_top1, "student_top1", student))
        curves.append(Curve(label, student, *found, "leader" if name == "leader" else ""))
    if not alone:
        found = pool.curve(partial(_top1, "ensemble_top1", None))
        curves.append(Curve("ensemble", pool.recipe.students, *found, "ensemble"))
    return Panel(
        "accuracy",
        f"top-1 on test, {pool.recipe.dataset} (%)",
        [curve for curve in curves if curve.epochs],
    )


def _top1(name: str, student: int | None, row: EpochMetrics) -> float | None:
    """The test accuracy ``name`` of an epoch in %, of one student or of all together."""
    if "test" not in row:
        return None
    found = row["test"][name]
    return 100.0 * (found if student is None else found[student])


def who(pool: Pool, student: int) -> str:
    """``"leader"``, or the student's number."""
    leader = pool.has_leader and student == pool.recipe.students - 1
    return "leader" if leader else str(student)
