"""Runs of one recipe and several seeds, taken together."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastokd.errors import UserError
from fastokd.recipes import Recipe
from fastokd.report.statistics import Sample
from fastokd.report.summary import summarise
from fastokd.training.run_folder import Run

Row = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Runs that differ in nothing but their seeds, and what to call them.

    ``recipe`` is the first one's.
    """

    label: str
    recipe: Recipe
    runs: tuple[Run, ...]

    def curve(
        self, value: Callable[[Row], float | None]
    ) -> tuple[list[int], list[float], list[float]]:
        """Epochs (from 1), and the mean and deviation over the runs of ``value`` in each.

        An epoch counts where every run has a value.
        """
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for row in run.metrics:
                number = value(row)
                if number is not None:
                    found.setdefault(row["epoch"] + 1, []).append(number)
        epochs = sorted(epoch for epoch, values in found.items() if len(values) == len(self.runs))
        means = [statistics.mean(found[epoch]) for epoch in epochs]
        deviations = [
            statistics.stdev(found[epoch]) if len(self.runs) > 1 else 0.0 for epoch in epochs
        ]
        return epochs, means, deviations

    @property
    def reported(self) -> str:
        """Whose accuracy is reported."""
        return summarise(self.runs[0]).reported

    def last(self) -> Sample:
        """The reported test accuracy after the last epoch, in %."""
        return Sample.of([100 * summarise(run).last for run in self.runs])

    def best(self) -> Sample:
        """Of the best epoch, in %."""
        return Sample.of([100 * summarise(run).best for run in self.runs])

    def of_last(self, value: Callable[[Row], float | None]) -> Sample | None:
        """``value`` of the last measured epoch; None where a run has none."""
        values = [
            value(next(row for row in reversed(run.metrics) if "test" in row)) for run in self.runs
        ]
        return None if None in values else Sample.of([v for v in values if v is not None])


def pool_runs(runs: Sequence[Run]) -> list[Pool]:
    """Runs with the same recipe but the seed, together, in the order given.

    Raises:
        UserError: a run has no measured epoch yet.
    """
    together: list[list[Run]] = []
    for run in runs:
        summarise(run)
        for group in together:
            if _but_seed(group[0].recipe) == _but_seed(run.recipe):
                if run.recipe.seed in (member.recipe.seed for member in group):
                    raise UserError(
                        f"{run.folder} and {group[0].folder} are the same recipe with the same "
                        "seed: name one of them, or compare them by `fastokd diff`"
                    )
                group.append(run)
                break
        else:
            together.append([run])
    names = [group[0].recipe.name for group in together]
    labels = []
    for name, group in zip(names, together, strict=True):
        words = [name]
        if names.count(name) > 1:
            words += _differing(group[0].recipe, [g[0].recipe for g in together])
        labels.append(" ".join(words))
    return [
        Pool(label, group[0].recipe, tuple(group))
        for label, group in zip(labels, together, strict=True)
    ]


def _but_seed(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, seed=0)


def _differing(recipe: Recipe, others: Sequence[Recipe]) -> list[str]:
    """Where recipes of one name differ: ``lr=0.05``."""
    alike = [other for other in others if other.name == recipe.name]
    return [
        f"{name}={value}"
        for name, value in _but_seed(recipe).to_json().items()
        if any(_but_seed(other).to_json()[name] != value for other in alike)
    ]
