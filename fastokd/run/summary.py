"""The reported accuracy of a run's last epoch and of its best."""

from __future__ import annotations

from dataclasses import dataclass

from fastokd.errors import UserError
from fastokd.metrics import choosing_split
from fastokd.recipe.names import Recipe
from fastokd.run.folder import Run

# In words, whose accuracy a recipe judges (Recipe.judged).
_WHOSE = {
    "leader": "the leader",
    "mean": "the students' mean",
    "kept": "the kept student",
    "student": "",
    "ensemble_logits": "the peers' mean logits",
    "companion": "the network beside the students that is kept",
    "average": "the kept student's running average",
    "ema_leader": "the leader's running average",
    "ema_mean": "the mean over the students' running averages",
    "ema_ensemble_logits": "the mean logits of the peers' running averages",
}


@dataclass(frozen=True)
class Summary:
    """Top-1 on the test set, as fractions; epochs count from 1. ``reported``: whose accuracy.

    ``best_on``: the split that the best epoch was chosen on: ``"val"``, or ``"test"`` as in the
    papers, which is biased upward.
    """

    last: float
    last_epoch: int
    best: float
    best_epoch: int
    best_on: str
    reported: str

    @property
    def whose(self) -> str:
        """In words, whose accuracy; empty for a lone student."""
        return _WHOSE[self.reported]

    def __str__(self) -> str:
        return (
            f"test top-1{self.whose and f' of {self.whose}'}: {self.last:.4f} last (epoch {self.last_epoch}), "
            f"{self.best:.4f} best (epoch {self.best_epoch}, chosen on {self.best_on})"
        )


def summarise(run: Run, judged_by: Recipe | None = None) -> Summary:
    """The summary of a run, by the accuracy that its recipe, or ``judged_by``, reports.

    Raises:
        UserError: the run has no measured epoch yet.
    """
    recipe = judged_by or run.recipe
    rows = [row for row in run.metrics if "test" in row]
    if not rows:
        raise UserError(f"{run.folder} has no measured epoch yet: train it on with --resume")
    chosen_on = choosing_split(rows)
    # As for the best checkpoint, an incomplete epoch counts only if there is no other.
    epochs = run.standing.epochs  # read from a file
    whole = [row for row in rows if row["epoch"] < epochs]
    best = max(whole or rows, key=lambda row: recipe.score(row[chosen_on]))
    return Summary(
        last=recipe.score(rows[-1]["test"]),
        last_epoch=rows[-1]["epoch"] + 1,
        best=recipe.score(best["test"]),
        best_epoch=best["epoch"] + 1,
        best_on=chosen_on,
        reported=recipe.judged(rows[-1]["test"]),
    )
