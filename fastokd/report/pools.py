"""Pools: runs of one recipe with several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastokd.errors import UserError
from fastokd.recipe.names import Recipe
from fastokd.report.published import Changes, from_its_name, options_of, shown
from fastokd.report.statistics import Sample
from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run
from fastokd.run.summary import summarise

# One line of metrics.jsonl.
EpochMetrics = dict[str, Any]
# Options that a label names only if pools of the same recipe differ in them.
UNSAID = ("precision", "eval_every")


@dataclass(frozen=True)
class Pool:
    """Runs that differ only in their seeds (and the machine), and their label.

    ``recipe`` is the first run's.
    """

    label: str
    recipe: Recipe
    runs: tuple[Run, ...]

    def curve(
        self, value: Callable[[EpochMetrics], float | None]
    ) -> tuple[list[int], list[float], list[float]]:
        """Epochs (from 1), and the mean and deviation over the runs of ``value`` in each.

        An epoch counts only if every run has a value.
        """
        found: dict[int, list[float]] = {}
        for row in (row for run in self.runs for row in run.metrics):
            if (number := value(row)) is not None:
                found.setdefault(row["epoch"] + 1, []).append(number)
        epochs = sorted(epoch for epoch, values in found.items() if len(values) == len(self.runs))
        samples = [Sample.of(found[epoch]) for epoch in epochs]
        return epochs, [s.mean for s in samples], [s.std or 0.0 for s in samples]

    @property
    def reported(self) -> str:
        """Whose accuracy is reported."""
        return summarise(self.runs[0]).reported

    def last(self) -> Sample:
        """The reported test accuracy after the last epoch, in %."""
        return Sample.of([100 * summarise(run).last for run in self.runs])

    def best(self) -> Sample:
        """The reported test accuracy of the best epoch, in %."""
        return Sample.of([100 * summarise(run).best for run in self.runs])

    def of_last(self, value: Callable[[EpochMetrics], float | None]) -> Sample | None:
        """``value`` of the last measured epoch; None if a run has none."""
        rows = [[row for row in run.metrics if "test" in row][-1] for run in self.runs]
        values = [number for row in rows if (number := value(row)) is not None]
        return Sample.of(values) if len(values) == len(self.runs) else None


def pool_runs(runs: Sequence[Run]) -> list[Pool]:
    """Pools runs with the same recipe and options except the seed, in the given order. Incomplete
    runs are pooled separately.

    Raises:
        UserError: a run has no measured epoch yet.
    """
    together: list[tuple[_What, list[Run]]] = []
    for run in runs:
        summarise(run)
        what = _What.of(run)
        group = next((group for known, group in together if known == what), None)
        if group is None:
            together.append((what, [run]))
            continue
        if run.recipe.seed in (member.recipe.seed for member in group):
            raise UserError(
                f"{run.folder} and {group[0].folder} are the same recipe with the same "
                "seed: name one of them, or compare them by `fastokd diff`"
            )
        group.append(run)
    kinds = [what for what, _ in together]
    return [Pool(_label(what, kinds, runs), runs[0].recipe, tuple(runs)) for what, runs in together]


@dataclass(frozen=True)
class _What:
    """What the runs of a pool have in common."""

    recipe: Recipe
    options: Changes
    whole: bool

    @staticmethod
    def of(run: Run) -> _What:
        options = options_of(run)
        if "init" in options:  # each seed may begin from other weights
            options["init"] = ("trained weights", None)
        precision = RunFacts(run.folder).environment().get("precision")
        options["precision"] = (precision, None)
        return _What(dataclasses.replace(run.recipe, seed=0), options, run.is_whole)

    def changes(self) -> Changes:
        return from_its_name(self.recipe) | self.options


def _label(what: _What, kinds: Sequence[_What], runs: Sequence[Run]) -> str:
    """A recipe's name, and the settings in which the runs differ from it or from other pools."""
    alike = [kind for kind in kinds if kind.recipe.name == what.recipe.name]
    names = dict.fromkeys(name for kind in alike for name in kind.changes())
    ours = dataclasses.asdict(what.recipe) | what.recipe.method_options
    words = [what.recipe.name]
    for name in names:
        values = [kind.changes().get(name) for kind in alike]
        value = what.changes().get(name, (ours.get(name), None))
        if name not in UNSAID or any(other != values[0] for other in values):
            words += shown({name: value})
    if not what.whole:
        epochs = min(run.standing.epochs for run in runs)
        words.append(f"({epochs} of {what.recipe.epochs} epochs)")
    return " ".join(words)
