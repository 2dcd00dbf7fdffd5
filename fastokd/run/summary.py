"""A run in a few numbers: the reported accuracy of its last epoch and of its best."""

from __future__ import annotations

from dataclasses import dataclass

from fastokd.errors import UserError
from fastokd.metrics import choosing_split
from fastokd.recipe.names import Recipe
from fastokd.run.folder import Run


@dataclass(frozen=True)
class Summary:
    """Top-1 on the test set, fractions; epochs count from 1. ``reported`` is whose.

    ``best_on`` is what the best epoch was chosen by: ``"val"``, or ``"test"`` as the papers do it,
    which flatters.
    """

    last: float
    last_epoch: int
    best: float
    best_epoch: int
    best_on: str
    reported: str


def summarise(run: Run, judged_by: Recipe | None = None) -> Summary:
    """The numbers of one run, by what its recipe reports or by what ``judged_by`` does.

    Raises:
        UserError: the run has no measured epoch yet.
    """
    recipe = judged_by or run.recipe
    rows = [row for row in run.metrics if "test" in row]
    if not rows:
        raise UserError(f"{run.folder} has no measured epoch yet: train it on with --resume")
    chosen_on = choosing_split(rows)
    # As its best checkpoint: an epoch that was cut counts only where there is no other.
    whole = [row for row in rows if row["epoch"] < run.standing.epochs]
    best = max(whole or rows, key=lambda row: recipe.score(row[chosen_on]))
    return Summary(
        last=recipe.score(rows[-1]["test"]),
        last_epoch=rows[-1]["epoch"] + 1,
        best=recipe.score(best["test"]),
        best_epoch=best["epoch"] + 1,
        best_on=chosen_on,
        reported=recipe.judged(rows[-1]["test"]),
    )
