"""The settings of averaged weights: which go together, and whose accuracy a run then has.

``recipe.py`` imports this file, so a recipe is ``Any`` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastokd.errors import UserError
from fastokd.recipe.fields import BELOW_ONE, at_least


@dataclass(frozen=True, kw_only=True)
class AverageSettings:
    """Averages of weights."""

    ema: Annotated[
        float,
        "Decay of an exponential moving average of a student's weights over the steps, such as 0.999; 0 "
        "for none.",
        BELOW_ONE,
    ] = 0.0
    ema_warmup: Annotated[
        bool, "The decay rises to `ema`: the average spans a tenth of the steps taken at most."
    ] = True
    swa: Annotated[
        bool, "A uniform average of a student's weights over the steps from `average_start` on."
    ] = False
    average_start: Annotated[
        int,
        "The epoch from which weights are averaged; before it the average is a copy of them.",
        at_least(0),
    ] = 0
    average_every: Annotated[
        int,
        "Steps between two updates of the average; an epoch's number as SWA was published.",
        at_least(1),
    ] = 1
    average_students: Annotated[
        Literal["kept", "all"], "Whose weights are averaged: the `kept` student's, or `all`."
    ] = "kept"
    average_norms: Annotated[
        Literal["averaged", "recomputed"],
        "Running statistics of an averaged student: `averaged` as its weights are, or `recomputed` on "
        "training images at each evaluation.",
    ] = "averaged"
    keep: Annotated[
        Literal["average", "raw"],
        "Which weights are reported, kept and exported where there is an average (of pcl and okdph the mean "
        "model or hybrid): the `average`, or the students' `raw` ones.",
    ] = "average"


def check_averages(recipe: Any) -> None:
    """Raises UserError for settings of an average that contradict each other."""
    if recipe.ema and recipe.swa:
        raise UserError(
            f"ema is {recipe.ema} and swa is true: a run has one average, leave one of them out"
        )
    if recipe.average_start >= recipe.epochs:
        raise UserError(
            f"average_start is {recipe.average_start}, but the run ends after {recipe.epochs} epochs: "
            "choose an earlier one"
        )


def averaged_students(recipe: Any) -> tuple[int, ...]:
    """The numbers of the students whose weights are averaged."""
    if not recipe.ema and not recipe.swa:
        return ()
    if recipe.average_students == "all":
        return tuple(range(recipe.students))
    return (recipe.kept_student,)


def judged_average(recipe: Any, metrics: dict[str, Any]) -> str | None:
    """Whose average's accuracy is reported, or None where the raw weights are kept: ``"average"`` for the
    kept student's; if every student has one, ``"ema_"`` and what ``reported`` says."""
    if recipe.keep == "raw" or "ema_top1" not in metrics:
        return None
    if recipe.students == 1 or recipe.reported == "kept" or "ema_mean_top1" not in metrics:
        return "average"
    return f"ema_{recipe.reported}"
