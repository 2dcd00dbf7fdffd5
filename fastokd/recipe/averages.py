"""The settings of averaged weights: which go together, and whose accuracy a run then has.

``recipe.py`` imports this file, so a recipe is ``Any`` here.
"""

from __future__ import annotations

from typing import Any

from fastokd.errors import UserError

# What each setting is where nothing is averaged.
UNSET = {
    **{"ema_warmup": True, "average_start": 0, "average_every": 1, "average_students": "kept"},
    **{"average_norms": "averaged", "keep": "average"},
}


def check_averages(recipe: Any) -> None:
    """Raises UserError for settings of an average that contradict each other."""
    if recipe.ema and recipe.swa:
        raise UserError(
            f"ema is {recipe.ema} and swa is true: a run has one average, leave one of them out"
        )
    if not recipe.ema and not recipe.swa:
        for name, usual in UNSET.items():
            if getattr(recipe, name) != usual:
                raise UserError(
                    f"{name} is {getattr(recipe, name)!r}, but no weights are averaged: set ema or swa, "
                    "or leave it out"
                )
    if recipe.swa and not recipe.ema_warmup:
        raise UserError("ema_warmup is False, but swa has no decay: leave it out")
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
